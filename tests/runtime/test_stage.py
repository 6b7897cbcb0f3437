"""Whose directory is it: a stage's claim on its output."""

import pytest

from wizard_engine.runtime.stage import Stage


def stage(out, lr: float, *, overwrite: bool = False) -> Stage:
    return Stage(out, "sft", {"lr": lr}, {}, overwrite=overwrite)


def test_stage_replaces_a_claim_that_left_no_work(tmp_path) -> None:
    stage(tmp_path, 1.0).start()
    stage(tmp_path, 2.0).start()
    assert stage(tmp_path, 2.0).identity()["config"] == {"lr": 2.0}


@pytest.mark.parametrize("work", ["metrics.jsonl", "stage_1/metrics.jsonl", "stage_1/checkpoints/step_00000001/x"])
def test_stage_keeps_work_of_another_configuration_unless_told_to(tmp_path, work: str) -> None:
    stage(tmp_path, 1.0).start()
    path = tmp_path / work
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}\n")
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(ValueError, match=r"config\.lr \(1\.0 -> 2\.0\)"):
        stage(tmp_path, 2.0).start()
    assert path.exists()
    stage(tmp_path, 2.0, overwrite=True).start()
    assert not path.exists() and other.read_text() == "mine"

"""The whole pipeline and its ablations on a few rows: what they record, and that a second call does nothing again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recipes import ablations, progressive
from wizard_engine.pipeline.run_file import RunFile, read_run_file

TINY = Path(progressive.__file__).parent / "runs" / "tiny.toml"
HELD_OUT = 16
STEPS = {"max-steps": 3, "pack-tokens": 256}
SIZES = {
    "world": {"corpus": 900, "plain": 120, "held-out": HELD_OUT, "questions": 2},
    "co_teach": {"limit": 6},
    "self_teach": {"limit": 12},
}
TRAINED = ("pretraining", "sft", "stage_dpo", "instruction_reward", "process_reward")


def few() -> RunFile:
    """The tiny run with fewer rows and steps."""
    run = read_run_file(TINY)
    options = {name: {**table, **SIZES.get(name, {})} for name, table in run.options.items()}
    for name in TRAINED:
        options[name]["training"] = options[name]["training"] | STEPS
    options["rleif"]["rollout"] = options["rleif"]["rollout"] | {"prompts-per-step": 2, "max-new-tokens": 16}
    return replace(run, options=options, measure=replace(run.measure, rows=HELD_OUT), quiet=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished run, and its summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progressive, "read_run_file", lambda path: few())
        patch.setattr(ablations, "read_run_file", lambda path: few())
        cfg = progressive.Config(TINY, out=tmp_path_factory.mktemp("progressive") / "demo")
        yield cfg, progressive.main(cfg)


def untimed(value):
    """A summary without the times."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if not key.startswith("seconds")}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def test_progressive_records_every_stage_of_every_slice(demo):
    cfg, summary = demo
    assert summary == json.loads((cfg.out / "summary.json").read_text())
    names = ("base", "sft", "stage_dpo", "rleif")
    assert [(row["slice"], row["name"]) for row in summary["stages"]] == [(t, n) for t in (1, 2, 3) for n in names]
    for row in summary["stages"]:
        assert row["total"] == HELD_OUT and row["accuracy"] == row["correct"] / HELD_OUT
        assert 0 <= row["sampled_accuracy"] <= 1
    last = {row["name"]: row for row in summary["stages"] if row["slice"] == 2}
    first = {row["name"]: row for row in summary["stages"] if row["slice"] == 3}
    assert first["base"]["correct"] == last["rleif"]["correct"], "a slice starts from the model of the one before"
    for battle in summary["pairwise"]:
        assert battle["wins"] + battle["losses"] + battle["ties"] == HELD_OUT
        assert battle["ci95"][0] - 1e-9 <= battle["win_rate"] <= battle["ci95"][1] + 1e-9
    assert "<svg" in (cfg.out / "report.html").read_text()


def test_progressive_again_skips_every_stage(demo):
    cfg, summary = demo
    metrics = {path: path.stat().st_mtime_ns for path in cfg.out.rglob("metrics.jsonl")}
    assert untimed(progressive.main(cfg)) == untimed(summary)
    assert {path: path.stat().st_mtime_ns for path in cfg.out.rglob("metrics.jsonl")} == metrics and metrics


@pytest.mark.slow
def test_ablations_measure_each_variant_against_the_demo(demo, tmp_path):
    cfg, _ = demo
    result = ablations.main(ablations.Config(demo=cfg.out, out=tmp_path / "ablations", quiet=True))
    assert result == json.loads((tmp_path / "ablations" / "ablations.json").read_text())
    tables = {table["name"]: [row["setting"] for row in table["rows"]] for table in result["tables"]}
    assert list(tables) == ["slices", "Evol Lab and co-teaching", "sampling", "RLEIF reward"]
    assert tables["RLEIF reward"] == ["before RLEIF", "instruction x process", "instruction", "process"]
    assert all(row["total"] == HELD_OUT for table in result["tables"] for row in table["rows"])


def test_ablations_need_a_finished_demo(tmp_path):
    with pytest.raises(ValueError, match=r"demo: expected a finished run with summary.json in .*; run make demo first"):
        ablations.main(ablations.Config(demo=tmp_path, out=tmp_path / "out"))

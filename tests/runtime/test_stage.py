"""Stages: their identity, their claim on a directory, what makes them current."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from wizard_engine.runtime import files
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.stage import INCIDENTAL, VERSION, Stage, StageState, finish_stage, identity, open_stage


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


# Catches: options of other names taken for the defaults of the new ones; a finished stage of a former release reused.
@pytest.mark.parametrize("is_finished", [False, True])
def test_stage_refuses_a_run_directory_of_another_version(tmp_path, is_finished: bool) -> None:
    first = stage(tmp_path, 1.0)
    first.start()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    if is_finished:
        first.finish({}, [])
    for path in tmp_path.glob("*.json"):
        fields = json.loads(path.read_text())
        assert fields.pop("version") == VERSION
        del fields["checksum"]
        path.write_text(json.dumps(fields))
    again = stage(tmp_path, 1.0)
    assert not again.is_current()
    with pytest.raises(
        ValueError, match=rf"options of version {VERSION}, got version 1.*choose another --out, or --ov"
    ):
        again.start()
    assert (tmp_path / "metrics.jsonl").exists()
    stage(tmp_path, 1.0, overwrite=True).start()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_finished_stage_prints_one_line_with_what_it_wrote(tmp_path, capsys) -> None:
    model = tmp_path / "model"
    model.mkdir()
    first = stage(tmp_path, 1.0)
    first.start()
    first.finish({"counts": {"rejected": 3}}, [model], "2 of 5 answers rejected")
    rejects = tmp_path / "rejects.jsonl"
    assert capsys.readouterr().out == f"done: {model}; 2 of 5 answers rejected; 3 rows rejected, see {rejects}\n"
    stage(tmp_path, 1.0).finish({"rejected": 0}, [])
    assert capsys.readouterr().out == f"done: {tmp_path}\n"
    Stage(tmp_path, "sft", {}, {}, quiet=True).finish({}, [model])
    assert capsys.readouterr().out == ""


@dataclass(frozen=True)
class Recipe:
    out: Path = field(metadata=INCIDENTAL)
    overwrite: bool = field(default=False, metadata=INCIDENTAL)
    quiet: bool = field(default=False, metadata=INCIDENTAL)


@pytest.mark.parametrize("quiet", [False, True])
def test_stage_that_is_done_before_says_so(tmp_path, capsys, quiet: bool) -> None:
    cfg = Recipe(tmp_path / "out", quiet=quiet)
    finish_stage(open_stage(cfg, "sft", Runtime()), Runtime(), {"n": 1}, [])
    capsys.readouterr()
    assert open_stage(cfg, "sft", Runtime()).done
    assert capsys.readouterr().out == ("" if quiet else f"done before, nothing to do: {tmp_path / 'out'}\n")


@dataclass(frozen=True)
class Inner:
    speed: int = field(default=1, metadata=INCIDENTAL)
    lr: float = 0.5


@dataclass(frozen=True)
class Options:
    out: Path
    quiet: bool = field(default=False, metadata=INCIDENTAL)
    # Of the name of an incidental option elsewhere, and not incidental itself.
    speed: int = 2
    inner: Inner = field(default_factory=Inner)


def test_identity_skips_fields_that_are_incidental_and_no_others(tmp_path):
    options, inputs = identity(Options(tmp_path))
    assert options == {"speed": 2, "inner": {"lr": 0.5}} and inputs == {"out": tmp_path}


def finished(tmp_path, config=None, text="rows"):
    """A stage of one input and one output, done."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_text(text)
    stage = Stage(out, "double", config or {"lr": 0.1, "seed": 0}, {"source": source})
    stage.start()
    (out / "result.txt").write_text(text * 2)
    (out / "folder").mkdir(exist_ok=True)
    (out / "folder" / "x").write_text("x")
    stage.finish({"rows": 2}, [out / "result.txt", out / "folder"])
    return Stage(out, "double", config or {"lr": 0.1, "seed": 0}, {"source": source})


def test_stage_is_current_when_nothing_changed(tmp_path):
    stage = finished(tmp_path)
    assert stage.is_current() and stage.result() == {"rows": 2}


def test_stage_does_not_mind_where_its_input_lies(tmp_path):
    stage = finished(tmp_path)
    moved = tmp_path / "moved"
    stage.inputs["source"].rename(moved)
    assert Stage(stage.out, "double", {"seed": 0, "lr": 0.1}, {"source": moved}).is_current()


@pytest.mark.parametrize("change", ["input", "no input", "config", "output", "no output", "in folder", "name"])
def test_stage_is_not_current_after_a_change(tmp_path, change):
    stage = finished(tmp_path)
    config, name = {"lr": 0.1, "seed": 0}, "double"
    if change == "input":
        stage.inputs["source"].write_text("Rows")
    elif change == "no input":
        stage.inputs["source"].unlink()
    elif change == "config":
        config["lr"] = 0.2
    elif change == "output":
        (stage.out / "result.txt").write_text("rowsRows")
    elif change == "no output":
        (stage.out / "result.txt").unlink()
    elif change == "in folder":
        (stage.out / "folder" / "y").write_text("y")
    else:
        name = "triple"
    assert not Stage(stage.out, name, config, stage.inputs).is_current()


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("stage.json", lambda text: text[:14], "expected JSON"),
        ("stage.json", lambda text: text.replace('"rows": 2', '"rows": 3'), "corrupt: its content"),
        ("stage.json", lambda text: text.replace('"version": 3', '"version": 2'), "corrupt: its content"),
        ("stage.json", lambda text: text[: text.index(',\n  "checksum"')] + "}", "corrupt: its content"),
        ("config.json", lambda text: text.replace("0.1", "0.2"), "corrupt: its content"),
    ],
)
def test_stage_names_a_damaged_record_and_what_to_do(tmp_path, name, damage, text):
    stage = finished(tmp_path)
    path = stage.out / name
    content = path.read_text()
    assert damage(content) != content
    path.write_text(damage(content))
    advice = "remove the file to run the stage again" if name == "stage.json" else "choose another --out"
    with pytest.raises(ValueError, match=rf"{name}: {text}.*{advice}"):
        stage.is_current() if name == "stage.json" else stage.start()


def test_stage_goes_on_where_only_its_length_is_larger(tmp_path):
    lengths = ("training.epochs", "training.max_steps")

    def make(epochs, max_steps, lr=0.1):
        options = {"training": {"epochs": epochs, "max_steps": max_steps, "lr": lr}}
        return Stage(tmp_path, "sft", options, {}, extendable=lengths)

    first = make(1.0, 5)
    first.start()
    (tmp_path / "checkpoints").mkdir()
    first.finish({}, [])
    for changes in ((0.5, 5), (1.0, 4), (2.0, 4), (2.0, 5, 0.2)):
        with pytest.raises(ValueError, match="expected the configuration that is there"):
            make(*changes).start()
    for changes in ((2.0, 5), (2.0, 9), (2.5, None)):
        stage = make(*changes)
        assert not stage.is_current()
        stage.start()
        assert (tmp_path / "checkpoints").is_dir() and not (tmp_path / "stage.json").exists()
        stage.finish({}, [])
        assert make(*changes).is_current()
    with pytest.raises(ValueError, match=r"max_steps \(null -> 9\)"):
        make(2.5, 9).start()


def test_stage_refuses_checkpoints_without_their_configuration(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"config\.json: expected the configuration of the checkpoints beside it"):
        stage(tmp_path, 1.0).start()
    stage(tmp_path, 1.0, overwrite=True).start()
    assert not (tmp_path / "checkpoints").exists() and (tmp_path / "other" / "checkpoints").exists()


def test_stage_start_refuses_another_configuration_and_names_the_fields(tmp_path):
    stage = finished(tmp_path)
    other = Stage(stage.out, "double", {"lr": 0.2, "seed": 0, "extra": {"k": 1}}, stage.inputs)
    with pytest.raises(ValueError, match=r"config\.lr \(0\.1 -> 0\.2\).*config\.extra") as caught:
        other.start()
    assert "seed" not in str(caught.value)
    assert stage.is_current()


def test_stage_start_refuses_changed_inputs(tmp_path):
    stage = finished(tmp_path)
    stage.inputs["source"].write_text("other")
    with pytest.raises(ValueError, match=r"inputs\.source"):
        Stage(stage.out, "double", stage.config, stage.inputs).start()


def test_stage_overwrite_removes_what_the_former_stage_wrote_and_nothing_else(tmp_path):
    stage = finished(tmp_path)
    (stage.out / "checkpoints" / "step_00000001").mkdir(parents=True)
    (stage.out / "notes.txt").write_text("mine")
    Stage(stage.out, "double", {"lr": 0.2}, stage.inputs, overwrite=True).start()
    assert sorted(os.listdir(stage.out)) == ["config.json", "notes.txt"]


def test_stage_start_keeps_what_an_interrupted_run_left(tmp_path):
    stage = finished(tmp_path)
    (stage.out / "checkpoints").mkdir()
    again = Stage(stage.out, "double", stage.config, stage.inputs, overwrite=True)
    again.start()
    assert (stage.out / "checkpoints").is_dir() and not again.is_current()
    with pytest.raises(ValueError, match="no stage"):
        again.result()


@pytest.mark.parametrize("text", ['{"architectures": []}', "[]", "{"])
def test_stage_start_refuses_a_directory_with_a_foreign_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="choose another --out"):
        Stage(tmp_path, "x", {}, {}, overwrite=True).start()
    assert (tmp_path / "config.json").read_text() == text


def test_stage_names_absent_inputs_and_outputs(tmp_path):
    with pytest.raises(ValueError, match="input rows: expected a file"):
        Stage(tmp_path / "out", "x", {}, {"rows": tmp_path / "absent"}).start()
    assert not (tmp_path / "out").exists()
    stage = Stage(tmp_path, "x", {}, {})
    stage.start()
    with pytest.raises(ValueError, match=r"output .*absent"):
        stage.finish({}, [tmp_path / "absent"])


def test_large_output_is_recognised_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE_FILE_BYTES", 3)
    stage = finished(tmp_path)
    assert stage.is_current()
    assert "mtime_ns" in json.loads((stage.out / "stage.json").read_text())["outputs"]["result.txt"]
    os.utime(stage.out / "result.txt", ns=(1, 1))
    assert not stage.is_current()


def test_state_of_a_stage_says_what_there_is_and_changes_nothing(tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"

    def made(lr=1.0):
        return Stage(out, "sft", {"lr": lr}, {"data": rows}, quiet=True)

    assert made().state() == StageState("waits", f"no {rows}") and not out.exists()
    rows.write_text("a\n")
    assert made().state() == StageState("new")
    stage = made()
    stage.start()
    assert made().state() == StageState("new"), "a claim without work"
    (out / "metrics.jsonl").write_text("{}\n")
    assert made().state() == StageState("begun") and made(2.0).state().kind == "other"
    (out / "model").write_text("weights")
    stage.finish({}, [out / "model"])
    assert made().state() == StageState("done")
    assert made(2.0).state() == StageState("other", "config.lr (1.0 -> 2.0)")
    (out / "model").write_text("other")
    assert made().state() == StageState("begun", "its outputs have changed since")
    rows.write_text("b\n")
    assert made().state() == StageState("other", "data has other content")
    rows.unlink()
    assert made().state() == StageState("waits", f"no {rows}") and made(2.0).state().kind == "other"


# Catches: a finished stage that is trained again or refused for other held-out rows, or not measured on them.
def test_what_is_measured_is_no_part_of_the_identity_but_makes_a_finished_stage_run(tmp_path) -> None:
    rows = tmp_path / "rows"
    rows.write_text("a")

    def measured(*paths):
        return Stage(tmp_path / "out", "sft", {"lr": 1.0}, {}, measured=({}, dict(zip("ab", paths))))

    first = measured()
    first.start()
    (tmp_path / "out" / "checkpoints").mkdir()
    first.finish({"loss": 1.0})
    assert measured().is_current() and not measured(rows).is_current()
    again = measured(rows)
    again.start()
    assert (tmp_path / "out" / "checkpoints").exists() and again.identity() == first.identity()
    again.finish({"loss": 1.0, "held_out": 2.0})
    assert measured(rows).is_current() and measured().is_current() and not measured(rows, rows).is_current()
    rows.write_text("b")
    assert not measured(rows).is_current()
    with pytest.raises(ValueError, match=r"sft: input a: expected a file or directory, got none at .*nowhere"):
        measured(tmp_path / "nowhere").start()


def test_long_values_are_shown_where_they_differ(tmp_path):
    def stage(spec):
        return Stage(tmp_path, "x", {"agent": spec}, {}, quiet=True)

    long = "openai:a-model-with-a-long-name@http://some.host.example:8000/v1#reasoning_effort="
    stage(long + "low").finish({}, [])
    stage(long + "low").start()
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r'agent \(\.\.\.\S*effort=low" -> \.\.\.\S*effort=high"\)'):
        stage(long + "high").start()

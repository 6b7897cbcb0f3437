"""Processes, signals, atomic files, hashes, and stages."""

import enum
import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from wizard_engine import runtime
from wizard_engine.runtime import files


def test_start_outside_torchrun_is_a_single_process():
    got = runtime.start("cpu")
    assert (got.rank, got.world_size, got.device.type, got.is_main) == (0, 1, "cpu", True)


@pytest.mark.parametrize(("arguments", "text"), [(("tpu",), "device"), (("cpu", 0), "threads")])
def test_start_refuses_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=f"{text}: expected"):
        runtime.start(*arguments)


# Catches: NCCL that learns its device from the first collective, and guesses it for a barrier.
@pytest.mark.parametrize(("device", "bound"), [("cuda", torch.device("cuda", 1)), ("cpu", None)])
def test_start_tells_nccl_its_device(monkeypatch, device, bound):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda name, **more: calls.append((name, more)))
    monkeypatch.setattr(runtime, "_die_with_parent", lambda: None)
    monkeypatch.setattr(runtime, "run_store", lambda purpose: None)
    monkeypatch.setattr(runtime, "Watch", lambda *found: None)
    monkeypatch.setattr(runtime, "_watch", None)
    assert runtime.start(device).device.type == device
    name, options = calls[-1]
    assert name == {"cuda": "nccl", "cpu": "gloo"}[device] and options.get("device_id") == bound
    assert [call for call in calls if call[0] == "set_device"] == ([("set_device", bound)] if bound else [])


RANKS = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from wizard_engine import runtime
rt = runtime.start("cpu", 1)
total = torch.tensor([float(rt.rank + 1)])
dist.all_reduce(total)
found = f"{rt.world_size} {rt.is_main} {dist.get_backend()} {total.item()} {torch.get_num_threads()}"
(Path(sys.argv[1]) / f"rank{rt.rank}").write_text(found)
runtime.stop()
assert not dist.is_initialized()
"""


def test_start_under_torchrun_joins_the_ranks(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path),
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(runtime.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{i}").read_text() for i in (0, 1)] == ["2 True gloo 3.0 1", "2 False gloo 3.0 1"]


def test_start_ends_a_rank_whose_torchrun_is_gone(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (settings | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "_die_with_parent", lambda: None)
    with pytest.raises(OSError, match=rf"torchrun: expected its store at 127.0.0.1:{port}, got .*refused; start again"):
        runtime.start("cpu")
    assert not torch.distributed.is_initialized()


def test_seed_all_repeats_every_generator():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    runtime.seed_all(7)
    first = draw()
    runtime.seed_all(7)
    assert draw() == first
    runtime.seed_all(8)
    assert draw() != first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_takes_one_signal_and_gives_the_handlers_back(number):
    before = signal.getsignal(number)
    with runtime.StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert signal.getsignal(number) is before
    assert signal.getsignal(signal.SIGTERM) is not None


def test_write_is_whole_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "deep" / "x.json"
    runtime.write_json(path, {"a": Path("b"), "n": 0.1, "é": (1, None)})
    assert json.loads(path.read_text("utf-8")) == {"a": "b", "n": 0.1, "é": [1, None]}
    runtime.write_text(path, "neu")
    runtime.write_bytes(path, b"\x00")
    assert path.read_bytes() == b"\x00" and os.listdir(path.parent) == ["x.json"]


def test_write_that_fails_keeps_the_former_file_and_names_the_path(tmp_path):
    path = tmp_path / "x"
    runtime.write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=str(path)) as caught:
            runtime.write_bytes(path, b"n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_write_that_cannot_take_its_place_keeps_the_former_file(tmp_path, monkeypatch):
    runtime.write_text(tmp_path / "x", "old")

    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="x: not written"):
        runtime.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_write_json_of_something_else_changes_nothing(tmp_path):
    runtime.write_json(tmp_path / "x", [1])
    with pytest.raises(TypeError, match="got object"):
        runtime.write_json(tmp_path / "x", object())
    assert json.loads((tmp_path / "x").read_text()) == [1]


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Config:
    out: Path
    data: tuple[Path, ...] = ()
    model: str = "demo"
    lr: float = 0.1
    colour: Colour = Colour.RED
    quiet: bool = False
    overwrite: bool = False


def test_content_hash_ignores_key_order_and_nothing_else():
    assert runtime.content_hash({"a": 1, "b": [1, 2]}) == runtime.content_hash({"b": (1, 2), "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, ["a", 1], {"b": 1}, {"a": None}, {"a": True}]
    assert len({runtime.content_hash(value) for value in different}) == len(different)
    assert runtime.content_hash(Config(Path("x"))) == runtime.content_hash(runtime.to_plain(Config(Path("x"))))


def test_file_hash_of_a_directory_sees_names_and_contents(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "f").write_text("1")
    seen = {runtime.file_hash(tmp_path / "a")}
    (tmp_path / "a" / "sub" / "f").write_text("2")
    seen.add(runtime.file_hash(tmp_path / "a"))
    (tmp_path / "a" / "sub" / "f").rename(tmp_path / "a" / "f")
    seen.add(runtime.file_hash(tmp_path / "a"))
    assert len(seen) == 3
    with pytest.raises(ValueError, match="nothing there"):
        runtime.file_hash(tmp_path / "absent")


def finished(tmp_path, config=None, text="rows"):
    """A stage of one input and one output, done."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_text(text)
    stage = runtime.Stage(out, "double", config or {"lr": 0.1, "seed": 0}, {"source": source})
    stage.start()
    (out / "result.txt").write_text(text * 2)
    (out / "folder").mkdir(exist_ok=True)
    (out / "folder" / "x").write_text("x")
    stage.finish({"rows": 2}, [out / "result.txt", out / "folder"])
    return runtime.Stage(out, "double", config or {"lr": 0.1, "seed": 0}, {"source": source})


def test_stage_is_current_when_nothing_changed(tmp_path):
    stage = finished(tmp_path)
    assert stage.is_current() and stage.result() == {"rows": 2}


def test_stage_does_not_mind_where_its_input_lies(tmp_path):
    stage = finished(tmp_path)
    moved = tmp_path / "moved"
    stage.inputs["source"].rename(moved)
    assert runtime.Stage(stage.out, "double", {"seed": 0, "lr": 0.1}, {"source": moved}).is_current()


@pytest.mark.parametrize(
    "change", ["input", "no input", "config", "output", "no output", "in folder", "record", "name"]
)
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
    elif change == "record":
        (stage.out / "stage.json").write_text('{"stage": "dou')
    else:
        name = "triple"
    assert not runtime.Stage(stage.out, name, config, stage.inputs).is_current()


def test_stage_start_refuses_another_configuration_and_names_the_fields(tmp_path):
    stage = finished(tmp_path)
    other = runtime.Stage(stage.out, "double", {"lr": 0.2, "seed": 0, "extra": {"k": 1}}, stage.inputs)
    with pytest.raises(ValueError, match=r"config\.lr \(0\.1 -> 0\.2\).*config\.extra") as caught:
        other.start()
    assert "seed" not in str(caught.value)
    assert stage.is_current()


def test_stage_start_refuses_changed_inputs(tmp_path):
    stage = finished(tmp_path)
    stage.inputs["source"].write_text("other")
    with pytest.raises(ValueError, match=r"inputs\.source"):
        runtime.Stage(stage.out, "double", stage.config, stage.inputs).start()


def test_stage_overwrite_removes_what_the_former_stage_wrote_and_nothing_else(tmp_path):
    stage = finished(tmp_path)
    (stage.out / "checkpoints" / "step_00000001").mkdir(parents=True)
    (stage.out / "notes.txt").write_text("mine")
    runtime.Stage(stage.out, "double", {"lr": 0.2}, stage.inputs, overwrite=True).start()
    assert sorted(os.listdir(stage.out)) == ["config.json", "notes.txt"]


def test_stage_start_keeps_what_an_interrupted_run_left(tmp_path):
    stage = finished(tmp_path)
    (stage.out / "checkpoints").mkdir()
    again = runtime.Stage(stage.out, "double", stage.config, stage.inputs, overwrite=True)
    again.start()
    assert (stage.out / "checkpoints").is_dir() and not again.is_current()
    with pytest.raises(ValueError, match="no stage"):
        again.result()


@pytest.mark.parametrize("text", ['{"architectures": []}', "[]", "{"])
def test_stage_start_refuses_a_directory_with_a_foreign_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="choose another --out"):
        runtime.Stage(tmp_path, "x", {}, {}, overwrite=True).start()
    assert (tmp_path / "config.json").read_text() == text


def test_stage_names_absent_inputs_and_outputs(tmp_path):
    with pytest.raises(ValueError, match="input rows: expected a file"):
        runtime.Stage(tmp_path, "x", {}, {"rows": tmp_path / "absent"}).start()
    stage = runtime.Stage(tmp_path, "x", {}, {})
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

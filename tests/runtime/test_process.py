"""Ranks, devices, seeds and signals of a process."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wizard_engine.runtime import process


def test_start_outside_torchrun_is_a_single_process():
    got = process.start("cpu")
    assert (got.rank, got.world_size, got.device.type, got.is_main) == (0, 1, "cpu", True)


@pytest.mark.parametrize(("arguments", "text"), [(("tpu",), "device"), (("cpu", 0), "threads")])
def test_start_refuses_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=f"{text}: expected"):
        process.start(*arguments)


# Catches: NCCL that learns its device from the first collective, and guesses it for a barrier.
@pytest.mark.parametrize(("device", "bound"), [("cuda", torch.device("cuda", 1)), ("cpu", None)])
def test_start_tells_nccl_its_device(monkeypatch, device, bound):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(process.dist, "init_process_group", lambda name, **more: calls.append((name, more)))
    monkeypatch.setattr(process, "_die_with_parent", lambda: None)
    monkeypatch.setattr(process, "run_store", lambda purpose: None)
    monkeypatch.setattr(process, "Heartbeat", lambda *arguments: None)
    monkeypatch.setattr(process, "_heartbeat", None)
    assert process.start(device).device.type == device
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
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path),
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(process.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{i}").read_text() for i in (0, 1)] == ["2 True gloo 3.0 1", "2 False gloo 3.0 1"]


def test_start_ends_a_rank_whose_torchrun_is_gone(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (settings | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "_die_with_parent", lambda: None)
    with pytest.raises(OSError, match=rf"torchrun: expected its store at 127.0.0.1:{port}, got .*refused; start again"):
        process.start("cpu")
    assert not torch.distributed.is_initialized()


def test_seed_all_repeats_every_generator():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    process.seed_all(7)
    first = draw()
    process.seed_all(7)
    assert draw() == first
    process.seed_all(8)
    assert draw() != first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_takes_one_signal_and_gives_the_handlers_back(number):
    before = signal.getsignal(number)
    with process.StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert signal.getsignal(number) is before
    assert signal.getsignal(signal.SIGTERM) is not None

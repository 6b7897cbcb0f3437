"""The lock of a run directory: one process at a time, named to the second one, free after a kill."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from many_ranks import torchrun

from wizard_engine.runtime import run_lock
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.run_lock import RunLock
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage

HOLDER = """
import os, sys, types
from pathlib import Path
# Without torch, whose import takes seconds.
for name in ("wizard_engine", "wizard_engine.runtime"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path({root!r}, *name.split(".")))]
from wizard_engine.runtime.run_lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
if len(sys.argv) > 2:
    # A child that outlives its parent, as a worker of a killed run does.
    if not os.fork():
        os.setsid()
        print("held", flush=True)
        sys.stdin.readline()
        os._exit(0)
else:
    print("held", flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Config:
    out: Path = field(metadata=INCIDENTAL)
    overwrite: bool = field(default=False, metadata=INCIDENTAL)


def holder(out: Path, *arguments: str) -> subprocess.Popen:
    """A process that has the lock of a directory."""
    script = HOLDER.format(root=str(Path(__file__).parents[2]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script, str(out), *arguments], **pipes)
    assert process.stdout.readline() == "held\n"
    return process


# Catches: a second run that tidies away what the first one writes; a lock that outlives its process, or is not named.
@pytest.mark.parametrize("arguments", [(), ("fork",)])
def test_second_run_of_a_directory_is_refused_with_who_has_it_until_that_is_killed(tmp_path, arguments):
    with holder(tmp_path, *arguments) as process:
        who = (
            rf"process {process.pid} on {re.escape(socket.gethostname())} since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\+00:00"
        )
        text = rf"{tmp_path}: expected no other run in this directory, got one: {who}; wait until it ends"
        with pytest.raises(ValueError, match=text):
            open_stage(Config(tmp_path), "test", Runtime())
        assert os.listdir(tmp_path) == [".lock"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        stage = open_stage(Config(tmp_path), "test", Runtime())
        assert not stage.done
        finish_stage(stage, Runtime(), {}, [])
        process.stdin.close()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "stage.json"]


RANK = """
import sys
from dataclasses import dataclass, field
from pathlib import Path
from wizard_engine import runtime
from wizard_engine.runtime.stage import INCIDENTAL, finish_stage, open_stage

@dataclass(frozen=True)
class Config:
    out: Path = field(metadata=INCIDENTAL)
    overwrite: bool = field(default=False, metadata=INCIDENTAL)

rt = runtime.start("cpu")
try:
    finish_stage(open_stage(Config(Path(sys.argv[1])), "test", rt), rt, {}, [])
    print("ended", flush=True)
except ValueError as error:
    print(f"refused: {error}", flush=True)
runtime.stop()
"""


# Catches: ranks that refuse each other; a rank that goes on where rank 0 is refused.
@pytest.mark.slow
def test_ranks_have_one_lock_and_are_refused_together(tmp_path):
    script, out = tmp_path / "rank.py", tmp_path / "out"
    script.write_text(RANK)
    with holder(out) as process:
        refused = torchrun(2, script, out)
        assert refused.returncode == 0, refused.stderr[-2000:]
        assert refused.stdout.count("expected no other run in this directory, got one: process") == 2
        process.communicate("\n")
    done = torchrun(2, script, out)
    assert (
        done.stdout.count("ended") == 2
        and done.stdout.count("done: ") == 1
        and sorted(os.listdir(out)) == ["config.json", "stage.json"]
    )


def test_finished_stage_is_read_without_the_lock(tmp_path):
    finish_stage(open_stage(Config(tmp_path), "test", Runtime()), Runtime(), {"n": 1}, [])
    with holder(tmp_path) as process:
        stage = open_stage(Config(tmp_path), "test", Runtime())
        assert stage.done and stage.result() == {"n": 1}
        process.communicate("\n")


def test_failed_run_does_not_keep_its_process_out(tmp_path):
    first = open_stage(Config(tmp_path), "test", Runtime())
    assert not open_stage(Config(tmp_path), "test", Runtime()).done
    del first


def test_stage_that_is_forgotten_frees_its_directory(tmp_path):
    stage = open_stage(Config(tmp_path), "test", Runtime())
    assert (tmp_path / ".lock").exists()
    del stage
    assert os.listdir(tmp_path) == ["config.json"]
    with holder(tmp_path) as process:
        process.communicate("\n")


def test_lock_whose_file_was_removed_in_between_is_taken_again(tmp_path, monkeypatch):
    whole, removed = fcntl.flock, []

    def flock(descriptor, how):
        whole(descriptor, how)
        if not removed:
            # What the former holder does between our open and our lock.
            (tmp_path / ".lock").unlink()
            removed.append(True)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = RunLock.take(tmp_path)
    assert (tmp_path / ".lock").exists()
    lock.release()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    RunLock.take(tmp_path).release()
    assert "this file system has no locks: a second run here is not noticed" in capsys.readouterr().err


def test_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"\.lock: not written .*the run has not begun"):
        RunLock.take(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"

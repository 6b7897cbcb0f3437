"""Forked processes end, print and fail like those that start from nothing: other tests believe what they are told."""

import signal
import time

import pytest
from forked import run_python, run_ranks, run_together


@pytest.mark.parametrize(
    ("code", "status", "out", "err"),
    [
        ("print(__name__, 1)", 0, "__main__ 1\n", ""),
        ("import sys; print(sys.argv, sys.stdin.read())", 0, "['-c', 'a'] text\n", ""),
        ("raise SystemExit(3)", 3, "", ""),
        ("raise SystemExit('no')", 1, "", "no\n"),
        ("import os; os._exit(4)", 4, "", ""),
        ("import atexit, sys; atexit.register(print, 'late'); sys.exit()", 0, "late\n", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "", ""),
    ],
)
def test_status_and_streams_are_those_of_the_process(code, status, out, err):
    done = run_python("-c", code, "a", text="text")
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_error_is_a_traceback_and_status_1(tmp_path):
    (tmp_path / "script.py").write_text("import neighbour\n")
    (tmp_path / "neighbour.py").write_text("raise KeyError('x')\n")
    done = run_python(tmp_path / "script.py", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("KeyError: 'x'")
    done = run_python("-m", "neighbour", folder=tmp_path)
    assert done.returncode == 1 and "KeyError: 'x'" in done.stderr


def test_processes_share_no_generator_and_no_change():
    code = "import os, random, numpy; print(random.random(), numpy.random.rand()); os.environ['X'] = 'y'"
    lines = run_together([("-c", code)] * 2).stdout.split()
    assert len(set(lines)) == 4 and run_python("-c", "import os; print(os.environ.get('X'))").stdout == "None\n"


def test_process_that_hangs_is_killed():
    began = time.monotonic()
    done = run_python("-c", "import time; time.sleep(60)", timeout=0.5)
    assert done.returncode == -signal.SIGKILL and time.monotonic() - began < 30


# Catches: a rank whose failure is lost behind the others'.
def test_status_of_ranks_is_that_of_the_one_that_failed(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import os, sys\nprint(os.environ['WORLD_SIZE'])\nsys.exit(int(os.environ['RANK']) * 2)\n"
    )
    done = run_ranks(2, tmp_path / "rank.py")
    assert done.returncode == 2 and done.stdout == "2\n2\n"

"""A GPU check without a GPU: `--stand-in fake_gpu` puts a CPU in its place, and phases that misbehave."""

import os
import signal
import subprocess
import sys
import time

import torch

from benchmarks import check_phases, phase_processes
from benchmarks.check_cases import run_cases
from benchmarks.phase_processes import Phase


def right(value=1):
    return lambda: [{"value": value, "pid": os.getpid()}]


def kill():
    yield {"value": "before the end"}
    os.kill(os.getpid(), signal.SIGSEGV)


def lose():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def refuse():
    raise ValueError("odd\nshape")


def hang():
    yield {"value": "before the hang"}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield {"child": child.pid}
    time.sleep(60)


def flood(visit):
    for number in range(400):
        (visit.out / f"dump.{number}").write_text("x")
    (visit.out / "deep" / "deeper" / "deepest").mkdir(parents=True)
    (visit.out / "log.txt").write_text("old line\n" * 3_000_000)
    print("y" * 30_000_000)
    print("line\n" * 100_000)
    visit.note("flooded")
    return run_cases(visit, [("one", right())])


def phases():
    of = lambda *cases: lambda visit: run_cases(visit, cases)  # noqa: E731
    bad = of(("a", right()), ("b", kill), ("c", right(3)), ("d", lose), ("e", refuse), ("f", right(5)))
    return (
        Phase("bad", 200, bad),
        Phase("hang", 10, of(("x", hang))),
        Phase("flood", 100, flood),
        Phase("dies", 100, of(*((str(n), lose) for n in range(9)))),
    )


def install():
    torch.cuda.is_available = lambda: True
    phase_processes.RESTARTS = 2
    check_phases.gpu = lambda: torch.device("cpu")
    check_phases.device_bytes = lambda device: 2**40
    check_phases.PHASES = phases()

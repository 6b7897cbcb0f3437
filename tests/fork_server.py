"""A process that has imported torch and the engine, and forks the Python processes that tests ask for.

`forked.py` starts it and writes requests to its input, a JSON object a line. It answers with the exit status of each
process, negative where a signal ended it.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
from types import ModuleType

import numpy as np

PRELOADED = (
    *("torch", "triton", "torch.distributed.nn.functional", "safetensors.torch", "tokenizers", "sentencepiece"),
    *("wizard_engine.agents", "wizard_engine.rl.sampler", "wizard_engine.training.run"),
)
PERIOD_SECONDS = 0.01
# Ranks whose peer has failed exit by themselves within this time.
GRACE_SECONDS = 8.0


def statuses(pids: list[int], seconds: float) -> list[int]:
    """Exit statuses of the processes; kills them after `seconds`, or a grace period after the first that failed."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(ended) < len(pids):
        for pid in set(pids) - ended.keys():
            waited, status = os.waitpid(pid, os.WNOHANG)
            if waited:
                ended[pid] = os.waitstatus_to_exitcode(status)
                if ended[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(PERIOD_SECONDS)
    return [ended[pid] for pid in pids]


def serve() -> dict | None:
    """Fork and wait for the processes of each request; in a forked process return what it is to run."""
    # What is forked gets standard streams of its own, and none of these two.
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    gc.collect()
    gc.freeze()
    for line in requests:
        request = json.loads(line)
        pids = []
        for process in request["processes"]:
            pid = os.fork()
            if pid == 0:
                os.close(requests.fileno())
                os.close(answers.fileno())
                return process
            pids.append(pid)
        answers.write(json.dumps(statuses(pids, request["seconds"])) + "\n")
        answers.flush()
    return None


def run(process: dict) -> None:
    """Be `python ARGUMENTS` in this environment and directory, with these files as standard streams."""
    for number, (path, flags) in enumerate(zip(process["streams"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
        os.dup2(os.open(path, flags), number)
    os.environ.clear()
    os.environ.update(process["environment"])
    os.chdir(process["folder"])
    # Forks share the state of these generators; processes of their own do not.
    random.seed()
    np.random.seed()
    kind, *rest = process["arguments"]
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, process["folder"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [kind, *rest], os.path.dirname(kind)
        runpy.run_path(kind, run_name="__main__")


def status_of(process: dict) -> int:
    """Exit status that the interpreter gives the end of `run`."""
    try:
        run(process)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end(status: int) -> None:
    """End this process as the interpreter does, but for the modules of the server, which it need not take down."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    forked = serve()
    end(0 if forked is None else status_of(forked))

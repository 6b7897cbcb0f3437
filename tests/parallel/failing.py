"""Worker of the tests of faults: trains a tiny model with the supervised recipe, and lets one rank go wrong."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from recipes import sft
from wizard_engine.checkpoint import latest
from wizard_engine.runtime.launch import launch
from wizard_engine.training.run import Run

HOW, RANK, STEP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.argv[1:] = sys.argv[4:]
torch.set_num_threads(1)


def go_wrong(run):
    # The checkpoint before is written beside the training: on a busy machine it would not be there yet.
    until = time.monotonic() + 6.0
    while HOW in ("error", "bug") and latest(run.out) is None and time.monotonic() < until:
        time.sleep(0.01)
    if HOW == "nan":
        run.sharded.gradients[0][3] = float("nan")
    if HOW == "error":
        raise ValueError("rows.jsonl:7: this row is bad")
    if HOW == "bug":
        raise KeyError("nobody expected this")
    if HOW == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if HOW == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if HOW == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    if HOW == "late":
        time.sleep(60)


inner = Run.update


def update(self):
    if self.step == STEP and int(os.environ["RANK"]) == RANK:
        go_wrong(self)
    inner(self)


Run.update = update
if HOW == "rows" and int(os.environ["RANK"]) == RANK:
    at = sys.argv.index("--data") + 1
    sys.argv[at] = str(Path(sys.argv[at]).with_name("other.jsonl"))
if HOW == "tokens" and int(os.environ["RANK"]) == RANK:
    read = sft.read_samples

    def read_other(*args, **options):
        samples, rejected = read(*args, **options)
        samples[3].tokens[1] += 1
        return samples, rejected

    sft.read_samples = read_other
if HOW == "options" and int(os.environ["RANK"]) == RANK:
    sys.argv += ["--training.lr", "0.5"]
launch(sft.main, sft.Config)

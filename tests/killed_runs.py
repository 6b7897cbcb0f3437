"""A run of progressive.py that is killed at random moments and started again, and what runs made."""

import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forked import ENVIRONMENT

from recipes import progressive

NAMES = ("rows", "preferences", "battles", "sft", "processes", "answers")


def results(out):
    """Content of everything that the stages made and the clock did not."""
    names = ("*.safetensors", *(f"{name}.jsonl" for name in NAMES))
    paths = sorted(path for name in names for path in out.rglob(name) if "checkpoints" not in path.parts)
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def finished(out):
    """How many stages of a run have ended."""
    return sum(1 for _ in out.rglob("stage.json"))


def moments(out, count, seed):
    """When to kill a run that ends as the one in `out`: after so many stages, and so many seconds later, in order."""
    chance = random.Random(seed)
    return [(stages, 0.4 * chance.random()) for stages in sorted(chance.sample(range(finished(out) - 1), count))]


def start_until_done(path, out, kills=()):
    """Start a run, whose results are in `out`, until it ends by itself; it is killed once at each of the moments."""
    command = [sys.executable, progressive.__file__, str(path)]
    for stages, delay in [*kills, (None, 0)]:
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, env=ENVIRONMENT, stdout=errors, stderr=errors, cwd=Path(__file__).parents[1]
            )
            deadline = time.monotonic() + 300
            while process.poll() is None and (stages is None or finished(out) < stages):
                assert time.monotonic() < deadline, "the run does not end"
                time.sleep(0.02)
            time.sleep(delay)
            process.kill()
            code = process.wait()
            errors.seek(0)
            assert code == (0 if stages is None else -signal.SIGKILL), errors.read()

"""A run of progressive.py that is killed at random moments and started again, and what runs made."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

from forked import ENVIRONMENT

from recipes import progressive

NAMES = ("rows", "preferences", "battles", "sft", "processes", "answers")


def results(out):
    """Content of everything that the stages made and the clock did not."""
    names = ("*.safetensors", *(f"{name}.jsonl" for name in NAMES))
    paths = sorted(path for name in names for path in out.rglob(name) if "checkpoints" not in path.parts)
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def start_until_done(path, seed, most, *, spread=4.0):
    """Start a run until it ends by itself, and kill it `most` times, 3 to 3 + `spread` seconds after its start.

    Returns how often it was killed.
    """
    command, chance, kills = [sys.executable, progressive.__file__, str(path)], random.Random(seed), 0
    while True:
        process = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        try:
            # The import of torch takes some seconds of it.
            _, errors = process.communicate(timeout=3 + chance.random() * spread if kills < most else 300)
            assert process.returncode == 0, errors
            return kills
        except subprocess.TimeoutExpired:
            kills += 1
            process.kill()
            process.communicate()

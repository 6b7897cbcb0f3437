"""Helpers of tests that run on multiple ranks: torchrun, short texts, and the metrics that depend on the clock.

`forked.run_ranks` starts ranks in less time; torchrun is for tests of what it does, and of ranks that share nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from forked import ENVIRONMENT, run_ranks

from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.model import ModelConfig, Transformer, save_model
from wizard_engine.runtime.metrics import read_metrics

TIMED = {
    "wait_seconds",
    "seconds",
    "hand_over_seconds",
    "generate_seconds",
    "score_seconds",
    "train_seconds",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "mfu",
    "peak_memory_gib",
}


def torchrun_command(ranks, *arguments, launcher=()):
    """The command line that starts a script on `ranks` ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *launcher]
    return [str(argument) for argument in (*command, *arguments)]


def torchrun(ranks, *arguments, timeout=240):
    """Run a script on `ranks` ranks and wait for its end."""
    command = torchrun_command(ranks, *arguments)
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def word_texts(count):
    """Random texts of 2 to 24 words from a list of ten."""
    generator = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [" ".join(generator.choice(words, generator.integers(2, 25))) for _ in range(count)]


def save_base(path, texts, **shapes):
    """Save a small random model with a tokenizer trained on `texts`, and return its configuration."""
    tokenizer = train_tokenizer(texts, vocab_size=300, atoms=CHAT_ATOMS)
    shapes = {"max_positions": 128, "init_std": 0.2} | shapes
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **shapes)
    save_model(Transformer(config, seed=0), tokenizer, path)
    return config


def untimed(out):
    """A run's metrics without those that depend on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(out / "metrics.jsonl")]


def selected(request, parameter):
    """Sorted values of a parameter among this file's selected test cases."""
    cases = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    return sorted({params[parameter] for params in cases if parameter in params})


def results_by_rank(script, worlds, out, names=(), timeout=500):
    """Run a script once per world size: world size -> the JSON that each rank wrote to OUT/result_WORLD_RANK.json.

    Args:
        names: cases to run; the script reads them from OUT/cases.json.
    """
    Path(out, "cases.json").write_text(json.dumps(list(names)))
    for world in worlds:
        done = run_ranks(world, script, out, timeout=timeout)
        assert done.returncode == 0, done.stderr[-3000:]
    return {
        world: [json.loads((Path(out) / f"result_{world}_{rank}.json").read_text()) for rank in range(world)]
        for world in worlds
    }

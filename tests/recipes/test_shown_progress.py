"""Every phase that lasts shows a bar, on rank 0 alone, and none of them with --quiet."""

import json
import sys

import pytest
import torch
import torch.distributed as dist
from many_ranks import save_base

from recipes import analyze, sample, stage_dpo
from wizard_engine import checkpoint
from wizard_engine.agents.local import LocalAgent
from wizard_engine.runtime import launch, metrics
from wizard_engine.runtime.process import Runtime
from wizard_engine.training.options import Training

TEXTS = [f"Name {number} old rivers and say why. The river is number {number}." for number in range(24)]


@pytest.fixture
def bars(monkeypatch):
    """Labels of the bars that are shown, in their order."""
    seen, right = [], metrics.Progress.__init__

    def made(self, *items, desc, **options):
        right(self, *items, desc=desc, **options)
        seen.extend([desc] if self.is_shown else ())

    monkeypatch.setattr(metrics.Progress, "__init__", made)
    return seen


@pytest.fixture
def base(tmp_path):
    """A tiny model, rows and pairs."""
    rows = [{"instruction": text[:34], "output": text[34:]} for text in TEXTS]
    pairs = [{"instruction": row["instruction"], "chosen": row["output"], "rejected": "No."} for row in rows]
    for name, lines in (("rows", rows), ("kept", rows[:2]), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_base(tmp_path / "base", TEXTS, layers=1, max_positions=256)
    return tmp_path


def configurations(base, quiet):
    rows, model = (base / "rows.jsonl",), base / "base"
    training = Training(max_steps=2, pack_tokens=128, save_every=1)
    return [
        (analyze, analyze.Config(rows, base / f"analysis{quiet}", model, quiet=quiet)),
        (
            sample,
            sample.Config(rows, base / f"sample{quiet}", evaluation=(base / "kept.jsonl",), hold_out=2, quiet=quiet),
        ),
        (
            stage_dpo,
            stage_dpo.Config((base / "pairs.jsonl",), base / f"dpo{quiet}", str(model), training=training, quiet=quiet),
        ),
    ]


# Catches: a phase without a bar; one that --quiet does not reach, which has no such option of its own.
def test_long_phases_show_bars_that_quiet_silences(base, bars, monkeypatch):
    for quiet in (False, True):
        for recipe, cfg in configurations(base, quiet):
            monkeypatch.setattr(launch, "_options", lambda config, presets, cfg=cfg: cfg)
            monkeypatch.setattr(sys, "argv", ["recipe"])
            launch.launch(recipe.main, None)
        if not quiet:
            everywhere = [f"read inputs of {name}" for name in ("analyze", "sample", "stage_dpo")]
            of_models = [f"load {base / 'base'}", f"save {base / 'dpoFalse'}", "key of the reference"]
            of_rows = ["perplexities", "language", "difficulty", "cluster", "duplicates", "held-out texts", "tokenize"]
            of_training = ["reference log-probabilities", "audit", "stage_dpo 1/1"]
            missing = {*everywhere, *of_models, *of_rows, *of_training} - {name.split("/.")[0] for name in bars}
            assert not missing, (missing, bars)
            bars.clear()
    assert bars == []


def test_checkpoints_and_fingerprints_show_bars(base, bars):
    saver = checkpoint.Saver(base / "run", Runtime())
    saver.save(1, {"model": {"x": torch.ones(5)}}, {})
    saver.wait()
    with checkpoint.Checkpoint(base / "run" / "checkpoints" / "step_00000001") as saved:
        saved.verify()
    agent = LocalAgent.from_directory(base / "base")
    assert agent.fingerprint
    said = " ".join(bars)
    for words in ("write checkpoint in", "check ", "fingerprint "):
        assert words in said, words


def test_other_ranks_show_nothing(bars, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        list(metrics.progress([1], desc=f"rank {rank}", unit="row"))
    assert bars == ["rank 0"]

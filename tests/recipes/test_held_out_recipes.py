"""Held-out measures of the training recipes: the numbers, equal weights, resume, finished runs, ranks."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from forked import run_python, run_ranks
from safetensors.torch import load_file

from recipes import reward, sft, stage_dpo
from wizard_engine.data.samples import answer_pair, read_pairs, read_samples
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.generation import sequence_logprobs
from wizard_engine.model import PRESETS, Transformer, load_model, save_model
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.training import held_out_rows
from wizard_engine.training.options import Training
from wizard_engine.training.run import Run

QUICK = {"pack_tokens": 384, "packs_per_step": 2, "lr": 2e-3}
TIMES = ("tokens_per_second", "tokens_per_second_per_device", "mfu", "wait_seconds", "peak_memory_gib")


def same_weights(a, b):
    one, two = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def trained(out):
    """The log without times and held-out values."""
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("held_out")} for line in lines]


def row_lines(out):
    return [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]


def supervised(world, out, model=None, **changes):
    training = Training(**QUICK, max_steps=5, epochs=3, save_every=changes.pop("save_every", 2))
    options = {"data": (world.write("few.jsonl", world.single[:40]),), "model": model or world.base, "audit": False}
    return sft.Config(out=out, training=training, quiet=True, **{**options, **changes})


@pytest.fixture(scope="module")
def rows(world):
    """Held-out conversations."""
    return world.write("kept.jsonl", world.single[50:62])


@pytest.fixture(scope="module")
def mixture(world, tmp_path_factory):
    """A random tiny mixture with the world's tokenizer."""
    tokenizer = load_tokenizer(world.root / "tokenizer")
    config = dataclasses.replace(PRESETS["tiny-mixtral"], vocab_size=tokenizer.vocab_size, balance_loss=0.02)
    return str(save_model(Transformer(config, seed=0), tokenizer, tmp_path_factory.mktemp("mixture") / "m"))


@pytest.fixture(scope="module")
def plain(world, mixture, tmp_path_factory):
    """A run of the mixture without held-out rows."""
    out = tmp_path_factory.mktemp("plain")
    sft.main(supervised(world, out, mixture))
    return out


def losses(world, model_directory, path, **options):
    """(N,) nats and (N,) tokens of rows under a model."""
    model, tokenizer = load_model(model_directory)
    read = {"kind": "conversation", "max_length": 385, "on_error": "raise", "rejects": world.root / "r", **options}
    samples, _ = read_samples([path], tokenizer, **read)
    return -sequence_logprobs(model, samples), np.array([s.weights[1:].sum() for s in samples])


# Catches: a measurement that changes gradients, weights, the load of experts or the log; values of another step.
def test_sft_is_measured_and_trains_as_without(world, plain, mixture, rows, tmp_path):
    result = sft.main(supervised(world, tmp_path, mixture, held_out=(rows,), eval_every=2))["held_out"]
    assert same_weights(plain, tmp_path) and trained(plain) == trained(tmp_path)
    measured = {x["step"]: x["held_out_loss"] for x in read_metrics(tmp_path / "metrics.jsonl") if "held_out_loss" in x}
    assert list(measured) == [2, 4, 5] and measured[5] == result["after"]["loss"][0] < result["before"]["loss"][0]
    for name, directory in (("before", mixture), ("after", tmp_path / "model")):
        nats, tokens = losses(world, directory, rows)
        assert result[name]["loss"][0] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
        lines = row_lines(tmp_path)
        assert [line[name]["loss"] for line in lines] == pytest.approx((nats / tokens).tolist(), rel=1e-5)
        assert [line["tokens"] for line in lines] == tokens.tolist()
    assert result["rows"] == len(lines) == 12 and result["rejected"] == 0
    shift = sum(x["tokens"] * (x["after"]["loss"] - x["before"]["loss"]) for x in lines) / tokens.sum()
    mean, error = result["difference"]["loss"]
    assert mean == pytest.approx(shift, rel=1e-5) and error > 0


# Catches: a first measurement with trained weights after a resume, or one that is made twice.
def test_a_killed_run_keeps_its_first_measurement(world, plain, mixture, rows, tmp_path, monkeypatch):
    cfg = supervised(world, tmp_path / "cut", mixture, held_out=(rows,), eval_every=2)
    right, scored = Run.update, []
    score = held_out_rows.SupervisedRows.score
    monkeypatch.setattr(held_out_rows.SupervisedRows, "score", lambda *a: scored.append(1) or score(*a))

    def killed(self):
        if self.step == 3:
            self.close()
            raise KeyboardInterrupt
        right(self)

    monkeypatch.setattr(Run, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        sft.main(cfg)
    assert len(scored) == 2
    monkeypatch.setattr(Run, "update", right)
    resumed = sft.main(cfg)
    assert len(scored) == 4 and same_weights(plain, tmp_path / "cut")
    whole = sft.main(dataclasses.replace(cfg, out=tmp_path / "whole"))
    assert resumed == whole and row_lines(tmp_path / "cut") == row_lines(tmp_path / "whole")
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole")]
    assert [x.get("held_out_loss") for x in lines[0]] == [x.get("held_out_loss") for x in lines[1]]
    # A stored measurement of other rows is not taken.
    other = world.write("other.jsonl", world.single[70:75])
    assert sft.main(dataclasses.replace(cfg, held_out=(other,)))["held_out"]["rows"] == 5


def test_a_finished_run_is_measured_without_training(world, plain, mixture, rows, tmp_path, monkeypatch):
    cfg = supervised(world, tmp_path, mixture)
    result = sft.main(cfg)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(Run, "update", None)
    measured = sft.main(dataclasses.replace(cfg, held_out=(rows,)))
    assert measured == result | {"held_out": measured["held_out"]} and same_weights(plain, tmp_path)
    assert measured["held_out"]["after"]["loss"][0] < measured["held_out"]["before"]["loss"][0]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sft.main(cfg) == sft.main(dataclasses.replace(cfg, held_out=(rows,), eval_every=3)) == measured


def test_text_is_measured_and_bad_held_out_rows_are_named_or_counted(world, tmp_path, capsys):
    good = [json.dumps({"text": f"{n} apples and {n} pears."}) for n in range(4)]
    path, broken = tmp_path / "held.jsonl", tmp_path / "broken.jsonl"
    path.write_text("\n".join(good) + "\n")
    broken.write_text("\n".join([*good, '{"texts": "x"}', json.dumps({"text": "word " * 900})]) + "\n")
    cfg = supervised(world, tmp_path / "out", data=(world.root / "plain.jsonl",), kind="text", held_out=(broken,))
    with pytest.raises(ValueError, match=r"broken\.jsonl:5: "):
        sft.main(cfg)
    result = sft.main(dataclasses.replace(cfg, on_error="skip", quiet=False, out=tmp_path / "skip"))["held_out"]
    assert (result["rows"], result["rejected"]) == (4, 2)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out")]
    assert len(printed) == 1 and printed[0].endswith(", 4 rows)") and "nats a token" in printed[0]
    nats, tokens = losses(world, tmp_path / "skip" / "model", path, kind="text")
    assert result["after"]["loss"][0] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    with pytest.raises(ValueError, match=r"input held_out: expected a file or directory, got none at .*nowhere"):
        sft.main(dataclasses.replace(cfg, held_out=(tmp_path / "nowhere",), out=tmp_path / "none"))


def test_stage_dpo_is_measured_over_all_stages(world, tmp_path):
    pairs = world.preferences(30)
    held = world.write("kept_pairs.jsonl", pairs[20:])
    training = Training(**{**QUICK, "lr": 1e-3}, epochs=2)
    cfg = stage_dpo.Config(
        data=(world.write("some_pairs.jsonl", pairs[:14]),),
        out=tmp_path / "with",
        model=world.base,
        slices=2,
        beta=0.5,
        training=training,
        held_out=(held,),
        eval_every=3,
        quiet=True,
    )
    result = stage_dpo.main(cfg)
    stage_dpo.main(dataclasses.replace(cfg, out=tmp_path / "without", held_out=(), eval_every=0))
    assert same_weights(tmp_path / "with", tmp_path / "without")
    counts = [stage["steps"] for stage in result["stages"]]
    expected = [[n for n in range(1, k + 1) if (n + b) % 3 == 0 or n == k] for k, b in zip(counts, (0, counts[0]))]
    logs = [read_metrics(tmp_path / "with" / f"stage_{n}" / "metrics.jsonl") for n in (1, 2)]
    assert [[x["step"] for x in log if "held_out_margin" in x] for log in logs] == expected and counts[0] % 3
    held_out = result["held_out"]
    before, after = held_out["before"], held_out["after"]
    assert before["accuracy"] == [0.5, 0.0] and before["margin"] == [0.0, 0.0]
    assert before["loss"] == pytest.approx([math.log(2), 0.0], abs=1e-9)
    values = []
    for directory in (world.base, tmp_path / "with" / "model"):
        model, tokenizer = load_model(directory)
        encode = {"on_error": "raise", "rejects": tmp_path / "r"}
        encoded, _ = read_pairs([held], partial(answer_pair, tokenizer, max_length=385), **encode)
        values.append(sequence_logprobs(model, [p.chosen for p in encoded] + [p.rejected for p in encoded]))
    tokens = np.array([s.weights[1:].sum() for side in zip(*[(p.chosen, p.rejected) for p in encoded]) for s in side])
    gain, per_token = (values[1] - values[0]).reshape(2, -1), (values[1] / tokens).reshape(2, -1)
    margin = 0.5 * (gain[0] - gain[1])
    assert after["margin"][0] == pytest.approx(margin.mean(), rel=1e-3, abs=1e-4)
    assert after["accuracy"][0] == (margin > 0).mean() and logs[1][-1]["held_out_accuracy"] == after["accuracy"][0]
    assert after["loss"][0] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    assert after["preferred"][0] == (per_token[0] > per_token[1]).mean()


@pytest.mark.parametrize("kind", ["instruction", "process"])
def test_reward_models_are_measured_on_other_rows(world, tmp_path, kind):
    made = world.rankings(20) if kind == "instruction" else world.processes(30)
    data, held = world.write(f"{kind}_data.jsonl", made[:14]), world.write(f"{kind}_kept.jsonl", made[14:])
    training = Training(**{**QUICK, "lr": 5e-3}, epochs=3)
    options = {"kind": kind, "data": (data,), "model": world.base, "training": training, "quiet": True}
    result = reward.main(reward.Config(out=tmp_path / "with", held_out=(held,), eval_every=2, **options))
    without = reward.main(reward.Config(out=tmp_path / "without", **options))
    assert same_weights(tmp_path / "with", tmp_path / "without")
    assert {name: value for name, value in result.items() if name != "held_out"} == without
    held_out, lines = result["held_out"], read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert held_out["rows"] == len(made) - 14 == len(row_lines(tmp_path / "with"))
    # The head starts at zero: all scores are equal.
    start = held_out["before"]["accuracy" if kind == "instruction" else "answer_auc"]
    assert start == [0.5, 0.0] and lines[-1]["held_out_accuracy"] == held_out["after"]["accuracy"][0]
    for name, (mean, error) in held_out["difference"].items():
        assert mean == pytest.approx(held_out["after"][name][0] - held_out["before"][name][0]) and error >= 0
    # The same rows as the own share of another run, measured by the code that was there before.
    model, tokenizer = load_model(tmp_path / "with" / "model")
    reader = reward.Instruction() if kind == "instruction" else reward.Process()
    cfg = reward.Config(out=tmp_path, **options)
    measured, _ = reader.measure(model, reader.read(cfg, tokenizer, 385, (held,), "r.jsonl")[0], quiet=True)
    assert held_out["after"]["accuracy"][0] == pytest.approx(measured["held_out_accuracy"])
    if kind == "process":
        assert held_out["after"]["answer_auc"][0] == pytest.approx(measured["held_out_answer_auc"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--mesh.dp-shard", 1]], ids=["sharded", "copies"])
def test_two_ranks_measure_what_one_does_and_train_as_without(world, rows, tmp_path, options):
    shared = ["recipes/sft.py", "--data", rows, "--model", world.base, "--quiet", "--no-audit", "--device", "cpu"]
    shared += ["--training.pack-tokens", 384, "--training.packs-per-step", 2, "--training.max-steps", 2]
    shared += ["--training.epochs", 2]
    held_out = ["--held-out", rows, "--eval-every", 1]
    for name, ranks, own in (("1", 1, held_out), ("2", 2, [*options, *held_out]), ("without", 2, options)):
        arguments = [*shared, *own, "--out", tmp_path / name]
        done = run_python(*arguments) if ranks == 1 else run_ranks(ranks, *arguments)
        assert done.returncode == 0, done.stderr
    one, two = (row_lines(tmp_path / name) for name in ("1", "2"))
    assert [line["before"] for line in one] == [line["before"] for line in two]
    after = [[line["after"]["loss"] for line in lines] for lines in (one, two)]
    assert after[0] == pytest.approx(after[1], rel=1e-4)
    assert same_weights(tmp_path / "2", tmp_path / "without") and trained(tmp_path / "2") == trained(
        tmp_path / "without"
    )


def test_a_damaged_first_measurement_is_refused(world, rows, tmp_path):
    cfg = supervised(world, tmp_path, held_out=(rows,))
    sft.main(cfg)
    (tmp_path / "stage.json").unlink()
    path = tmp_path / "held_out_before.json"
    path.write_text(path.read_text().replace("-1", "-2", 1))
    with pytest.raises(ValueError, match=r"held_out_before\.json: corrupt: .*the rows are measured again"):
        sft.main(cfg)

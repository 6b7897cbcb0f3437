"""Training runs: resume is bit-equal, steps that are not finite are skipped and counted, a signal saves."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from host_reads import HostReads
from torch.utils.flop_counter import FlopCounterMode

from wizard_engine import checkpoint
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample
from wizard_engine.loss import sft_loss
from wizard_engine.model import ModelConfig, ScoringModel, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.planning.flops import flops_per_token
from wizard_engine.runtime.files import write_sealed
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.runtime.process import Interrupted, Runtime
from wizard_engine.training.base_run import STATE_VERSION, blame
from wizard_engine.training.options import Training
from wizard_engine.training.run import Run, passes, step_flops

OPTIONS = {"lr": 3e-2, "epochs": 2, "pack_tokens": 24, "packs_per_step": 2, "warmup": 0.2, "weight_decay": 0.1}
TIMES = ("tokens_per_second", "tokens_per_second_per_device", "mfu", "wait_seconds", "peak_memory_gib")


class Killed(Exception):
    """What ends a run at once in these tests."""


def samples():
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 20, 18)
    starts = generator.integers(0, 31, 18)
    rows = [(start + np.arange(n)) % 31 for n, start in zip(lengths, starts)]
    return [Sample(row.astype(np.int32), np.ones(len(row), np.float32)) for row in rows]


def train(out, *, at=None, before=None, seed=0, saves_last=False, **changes):
    """A whole run; `at` maps a step to what happens to its losses, `before` to what happens to the model before it.

    Returns the model and the run.
    """
    config = ModelConfig(vocab_size=31, width=8, layers=1, heads=2, kv_heads=1, head_width=4, ffn_width=12)
    model, rows = Transformer(config, seed=seed), samples()
    lengths = [len(row.tokens) - 1 for row in rows]
    names = {"seed": 3, "name": "test", "quiet": True, "saves_last": saves_last}
    run = Run(Training(**{**OPTIONS, **changes}), Runtime(), model, lengths, out, **names)
    try:
        for packs in run.steps():
            batches = [collate([rows[i] for i in pack]) for pack in packs]
            (before or {}).get(run.step, lambda _: None)(model)
            num_tokens = sum(float(b.weights.sum()) for b in batches)
            for batch in batches:
                hidden = model(*batch.inputs)
                out = sft_loss(hidden, model.head_weight, batch.targets, batch.weights, num_tokens=num_tokens)
                loss = (at or {}).get(run.step, lambda x: x)(out.loss)
                loss.backward()
                run.add(loss, batch.tokens.numel(), logprob=out.logprob, double=2 * loss.detach())
            run.update()
    finally:
        run.close()
    return model, run


def metrics(out):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(out / "metrics.jsonl")]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def kill(loss):
    raise Killed


def test_run_learns_and_logs_every_step(tmp_path):
    model, run = train(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, run.total + 1)) and run.total >= 8
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"] and lines[-1]["tokens"] == 2 * sum(
        len(s.tokens) - 1 for s in samples()
    )
    assert all(line["double"] == pytest.approx(2 * line["loss"]) for line in lines)
    assert {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "skipped", *TIMES} <= lines[0].keys()
    assert max(line["lr"] for line in lines) == 3e-2 and lines[0]["lr"] < 3e-2
    assert run.result() == {"steps": run.total, "tokens": lines[-1]["tokens"], "skipped": 0}
    assert not same(model, train(tmp_path / "other", seed=1)[0])


@pytest.mark.parametrize("killed_at", [2, 5])
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, killed_at):
    whole, _ = train(tmp_path / "whole", save_every=2)
    with pytest.raises(Killed):
        train(tmp_path / "cut", save_every=2, at={killed_at: kill})
    saved = killed_at // 2 * 2
    assert checkpoint.latest(tmp_path / "cut").name == f"step_{saved:08d}"
    resumed, run = train(tmp_path / "cut", save_every=2, seed=9)
    assert same(whole, resumed) and run.step == run.total
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_run_keeps_the_last_checkpoints_and_none_without_save_every(tmp_path):
    train(tmp_path / "two", save_every=1, keep_last=2)
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 2
    train(tmp_path / "none", save_every=0)
    assert checkpoint.latest(tmp_path / "none") is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_that_is_not_finite_is_skipped_and_counted(tmp_path, bad):
    model, run = train(tmp_path, at={3: lambda loss: loss * bad})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert run.skipped == 1 and [line["skipped"] for line in lines[:5]] == [0, 0, 0, 1, 1]
    assert lines[3]["loss"] is None and all(line["loss"] is not None for line in lines[4:])
    assert all(torch.isfinite(p).all() for p in model.parameters())


# Catches: more epochs that begin anew, that miss the rest of a pass that was a fraction, or that end a step too early.
@pytest.mark.parametrize("first", [0.5, 1, 1.6])
def test_finished_run_goes_on_with_more_epochs(tmp_path, first):
    lines = {}
    for epochs in (first, 2.5):
        model, run = train(tmp_path, epochs=epochs, save_every=100, packs_per_step=3, saves_last=True)
        lines[epochs] = metrics(tmp_path)
    assert lines[2.5][: len(lines[first])] == lines[first] and len(lines[first]) < len(lines[2.5]) == run.total
    whole = train(tmp_path / "whole", epochs=2.5, packs_per_step=3)[1]
    assert lines[2.5][-1]["tokens"] == whole.tokens
    # Of the longer run's schedule, which begins at the step where the shorter one ended.
    if first == 1:
        assert lines[2.5][len(lines[first])]["lr"] > lines[first][-1]["lr"]
    again, run = train(tmp_path, epochs=2.5, save_every=100, packs_per_step=3, saves_last=True)
    assert same(model, again) and run.step == run.total


def test_skipped_step_does_not_change_the_weights(tmp_path):
    before, _ = train(tmp_path / "a", max_steps=3, epochs=2, warmup=1e-9, lr_floor=1.0)
    after, run = train(tmp_path / "b", max_steps=4, warmup=1e-9, lr_floor=1.0, at={3: lambda loss: loss * float("nan")})
    assert run.step == 4 and same(before, after)


def test_run_ends_when_too_many_steps_are_not_finite(tmp_path):
    bad = dict.fromkeys((1, 2, 4), lambda loss: loss * float("nan"))
    with pytest.raises(ValueError, match=r"test: step 4: .* more than 2 steps were not finite; lower --training\.lr"):
        train(tmp_path, at=bad, max_skipped=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_call_goes_on(tmp_path, number):
    handler = signal.getsignal(number)

    waiting = [number]

    def hit(loss):
        if waiting:
            os.kill(os.getpid(), waiting.pop())
        return loss

    whole, _ = train(tmp_path / "whole", save_every=0)
    with pytest.raises(Interrupted, match=r"stopped at step 4, saved in .*the same command resumes"):
        train(tmp_path / "cut", save_every=0, at={3: hit})
    assert checkpoint.latest(tmp_path / "cut").name == "step_00000004" and signal.getsignal(number) is handler
    resumed, _ = train(tmp_path / "cut", save_every=0)
    assert same(whole, resumed) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_run_refuses_rows_that_fit_no_pack_and_other_data_on_resume(tmp_path):
    with pytest.raises(ValueError, match=r"lengths\[\d+\]: expected 1 to 8 tokens"):
        train(tmp_path / "a", pack_tokens=8)
    train(tmp_path / "b", save_every=1)
    with pytest.raises(ValueError, match="loader state: expected order"):
        train(tmp_path / "b", pack_tokens=30)


def test_run_refuses_a_checkpoint_of_another_version(tmp_path):
    train(tmp_path, save_every=2)
    path = checkpoint.latest(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["state"].pop("version") == STATE_VERSION
    del manifest["checksum"]
    write_sealed(path, manifest, indent=None)
    with pytest.raises(ValueError, match=r"state of version 2, got version 1; finish the run with the release that"):
        train(tmp_path, save_every=2)


# Catches: attention counted over the packed row; a pair counted as one document; a third of the training's operations.
@pytest.mark.parametrize("documents", [None, [(4, 2), (10,)]])
def test_mfu_counts_the_attention_of_each_document(tmp_path, monkeypatch, documents):
    config = ModelConfig(vocab_size=31, width=8, layers=3, heads=2, kv_heads=1, head_width=4, ffn_width=12)
    model = Transformer(config, seed=0)
    training = Training(pack_tokens=64, save_every=0)
    run = Run(training, Runtime(), model, [6, 10], tmp_path, seed=0, name="test", quiet=True, documents=documents)
    monkeypatch.setattr("wizard_engine.training.run.peak_flops", lambda device: 1e6)
    for packs in run.steps():
        run._began = -0.5
        monkeypatch.setattr("wizard_engine.training.run.time.perf_counter", lambda: 1.5)
        assert sorted(packs[0].tolist()) == [0, 1]
        run.update()
    line = read_metrics(tmp_path / "metrics.jsonl")[0]
    # Of a token: 2 operations a weight (q, k, v, out; gate, up, down; the head), and 4 H C for every key of a layer.
    weights = 3 * (8 * 4 * 2 * (2 + 1) + 3 * 8 * 12) + 8 * 31
    keys = sum(n * (n + 1) / 2 for n in (6, 10) if documents is None) or 4 * 5 / 2 + 2 * 3 / 2 + 10 * 11 / 2
    work = 3 * (2 * 16 * weights + 4 * 3 * 2 * 4 * keys)
    assert line["mfu"] == pytest.approx(work / 2.0 / 1e6, rel=1e-12)


def test_step_that_is_not_finite_names_its_token(tmp_path, capsys):
    """NaN in the head's row of one vocabulary entry makes every log-probability NaN, the first token's first."""

    def poison(model):
        with torch.no_grad():
            model.head_weight[7] = float("nan")

    with pytest.raises(
        ValueError, match=r"step 4: loss nan, .*, micro-batch 0 token 0: log-probability nan: more than 1"
    ):
        train(tmp_path, before={3: poison}, max_skipped=1)
    warned = capsys.readouterr().err
    assert "[rank 0/1] test: step 3: loss nan" in warned and "token 0: log-probability nan: the step is" in warned


def test_blame_names_the_first_token_that_is_not_finite():
    fine, bad = torch.tensor([-1.0, 0.0]), torch.tensor([-1.0, -2.0, -math.inf, math.nan])
    assert blame([fine, bad]) == ", micro-batch 1 token 2: log-probability -inf"
    assert blame([fine]) == "" and blame([]) == ""


def test_spikes_are_skipped_counted_and_limited(tmp_path):
    def leap(loss):
        return loss * 50

    _, run = train(tmp_path / "a", epochs=40, max_steps=60, spike=6.0, at={45: leap, 50: leap}, lr=1e-3)
    lines = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert run.skipped == 2 and [line["skipped"] for line in lines[44:51]] == [0, 1, 1, 1, 1, 1, 2]
    with pytest.raises(ValueError, match=r"test: step 50: .*more than 1 steps were spikes"):
        train(tmp_path / "b", epochs=40, max_steps=60, spike=6.0, at={45: leap, 50: leap}, lr=1e-3, max_skipped=1)
    assert train(tmp_path / "c", epochs=40, max_steps=60, at={45: leap}, lr=1e-3)[1].skipped == 0


def test_spikes_after_a_resume_are_those_of_no_resume(tmp_path):
    options = {"epochs": 40, "max_steps": 60, "spike": 6.0, "lr": 1e-3, "save_every": 20}
    leaps = {45: lambda loss: loss * 50}
    whole, _ = train(tmp_path / "whole", at=leaps, **options)
    with pytest.raises(Killed):
        train(tmp_path / "cut", at={42: kill}, **options)
    resumed, run = train(tmp_path / "cut", at=leaps, **options)
    assert run.skipped == 1 and same(whole, resumed) and metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


# Catches: a norm, a loss or a metric that the host reads before the optimizer has been launched, or one by one.
@pytest.mark.parametrize("spike", [0.0, 6.0])
def test_numbers_of_a_step_are_read_once_behind_the_optimizer(tmp_path, monkeypatch, spike):
    log, update = [], Run.update
    # What AdamW reads on the CPU, where reading waits for nothing, is its own affair.
    monkeypatch.setattr(AdamW, "step", lambda self, lr: log.append("launch"))

    def watched(run):
        with monkeypatch.context() as patch, HostReads(log, patch):
            update(run)

    monkeypatch.setattr(Run, "update", watched)
    train(tmp_path, max_steps=2, spike=spike)
    assert log == (["read", "launch"] if spike else ["launch", "read"]) * 2


# Catches: a count of updates that a skipped step went into; a decision on the loss alone, or on the norm alone.
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skipped_steps_do_not_change_the_bias_correction(tmp_path, monkeypatch, what):
    update = Run.update

    def poisoned(run):
        if run.step == 3 and what == "gradient":
            run.sharded.gradients[0][0] = float("inf")
        elif run.step == 3:
            run._sums["loss"] = run._sums["loss"] * float("nan")
        update(run)

    monkeypatch.setattr(Run, "update", poisoned)
    _, run = train(tmp_path, max_steps=6, save_every=4)
    assert run.optimizer.count == 5 and run.skipped == 1 and run.step == 6
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert (lines[3]["loss"] is None) == (what == "loss") and (lines[3]["grad_norm"] is None) == (what == "gradient")


CONFIG = ModelConfig(vocab_size=31, width=8, layers=2, heads=2, kv_heads=1, head_width=4, ffn_width=12, tied=False)


# Catches: a frozen body counted as trained, which gave an MFU of 2.5; a vocabulary that reward models do not have.
@pytest.mark.parametrize(
    ("make", "frozen", "expected"),
    [
        (lambda: Transformer(CONFIG), [], (3, 3)),
        (lambda: ScoringModel(CONFIG, 3, surprise=True), [], (1, 1)),
        (lambda: ScoringModel(CONFIG, 1), [], (3, 0)),
        (lambda: Transformer(CONFIG), ["embedding", "blocks.0"], (2, 3)),
        (lambda: Transformer(CONFIG), ["blocks.0", "head"], (2.5, 2)),
        (lambda: Transformer(CONFIG), ["embedding", "blocks", "norm", "head"], (1, 1)),
    ],
    ids=["language", "surprise", "scoring", "lower_half", "one_block", "frozen"],
)
def test_frozen_parts_count_their_forward_alone(make, frozen, expected):
    model = make()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    assert passes(model) == expected
    layers, head = expected
    whole, vocabulary = flops_per_token(CONFIG, 5), 2 * CONFIG.width * CONFIG.vocab_size
    flops = (
        5 * (layers * (whole - vocabulary) + head * vocabulary)
        + 1 * layers * (flops_per_token(CONFIG, 1) - vocabulary)
        + head * vocabulary
    )
    assert step_flops(model, [(5, 0, 1), ()]) == pytest.approx([flops, 0])


def counted(model, batch):
    """Operations of a training step as torch counts them, without those of a small scoring head."""
    hidden, vocabulary = batch.tokens.numel() * CONFIG.width, CONFIG.vocab_size
    head = torch.ops.wizard_engine.linear_logprob_statistics
    with FlopCounterMode(display=False, custom_mapping={head: lambda *_, **__: 2 * hidden * vocabulary}) as counter:
        if isinstance(model, ScoringModel):
            loss = model(*batch.inputs).square().sum()
        else:
            own = model(*batch.inputs), model.head_weight
            loss = sft_loss(*own, batch.targets, batch.weights, num_tokens=float(batch.weights.sum())).loss
        loss.backward()
    small = 0.0
    for name, layer in model.named_modules():
        if name.startswith("score") and isinstance(layer, torch.nn.Linear):
            # Its forward and the gradient of its weights, and that of its input where it is not the first of all.
            passes_of_layer = 3 if not model.surprise or layer is model.score[-1] else 2
            small += 2 * batch.tokens.numel() * layer.weight.numel() * passes_of_layer
    return counter.get_total_flops() - small


# Catches: a formula that counts what is not computed, whatever it says of itself: torch counts its products.
@pytest.mark.parametrize(
    ("make", "frozen"),
    [
        (lambda config: Transformer(config), []),
        (lambda config: Transformer(config), ["embedding", "blocks.0"]),
        (lambda config: ScoringModel(config, 1), []),
        (lambda config: ScoringModel(config, 3, surprise=True), []),
    ],
    ids=["language", "lower_half", "scoring", "surprise"],
)
def test_operations_of_a_step_are_those_that_torch_counts(make, frozen):
    model = make(CONFIG)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    # Of longer documents torch counts the keys that are masked too.
    batch = collate([Sample(np.array([3, 4], dtype=np.int32), np.ones(2, np.float32)) for _ in range(12)])
    assert step_flops(model, [(1,) * 12])[0] == counted(model, batch)

"""Training recipes on a tiny mixture: router losses and load in the log, resume, the balance loss at work, RLEIF."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from recipes import reward, rleif, sft, stage_dpo
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.model import PRESETS, Routes, Transformer, save_model
from wizard_engine.parallel import Mesh
from wizard_engine.parallel.reductions import pack
from wizard_engine.rl.options import PPOOptions, RewardOptions, RolloutOptions
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.training.options import OnlineTraining, Training
from wizard_engine.training.router_metrics import RouterMeter
from wizard_engine.training.run import Run

QUICK = {"pack_tokens": 384, "packs_per_step": 2, "lr": 2e-3}
LONGER = Training(**QUICK | {"lr": 1e-2}, max_steps=40, epochs=20)
KEYS = {"router_loss", "expert_load_max", "expert_load_min"}


def base(world, path, **changes):
    """A random tiny mixture with the world's tokenizer."""
    tokenizer = load_tokenizer(world.root / "tokenizer")
    config = dataclasses.replace(PRESETS["tiny-mixtral"], vocab_size=tokenizer.vocab_size, init_std=0.1, **changes)
    return str(save_model(Transformer(config, seed=0), tokenizer, path))


def supervised(world, out, model, steps=4, **changes):
    training = Training(**QUICK, max_steps=steps)
    data = (world.write("few.jsonl", world.single[:40]),)
    return sft.Config(data=data, out=out, model=model, training=training, quiet=True, **changes)


def test_router_numbers_are_in_every_line(world, tmp_path):
    sft.main(supervised(world, tmp_path / "sft", base(world, tmp_path / "m", z_loss=0.01), steps=8))
    lines = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line.keys() >= KEYS and len(line["expert_load_max"]) == len(line["expert_load_min"]) == 2
        assert all(
            1 <= high <= 4 and 0 <= low <= 1 for high, low in zip(line["expert_load_max"], line["expert_load_min"])
        )
        # Two choices of an even load give a balance loss of 2, and log(4)^2 is the z-loss of small logits.
        assert 0.001 * 2 * 0.9 < line["router_loss"] - 0.01 * torch.tensor(4.0).log().item() ** 2 < 0.02


def test_dense_models_have_no_router_numbers(world, tmp_path):
    sft.main(supervised(world, tmp_path / "sft", world.base, steps=1))
    assert not KEYS & read_metrics(tmp_path / "sft" / "metrics.jsonl")[0].keys()


# Catches: a balance loss that is logged but not trained, or trained with the wrong sign.
def test_the_balance_loss_evens_the_load_out(world, tmp_path):
    worst = {}
    for weight in (0.0, 1.0):
        out = tmp_path / str(weight)
        model = base(world, tmp_path / f"m{weight}", balance_loss=weight)
        sft.main(dataclasses.replace(supervised(world, out, model, audit=False), training=LONGER))
        lines = read_metrics(out / "metrics.jsonl")[-5:]
        worst[weight] = max(sum(line["expert_load_max"]) / 2 for line in lines)
    assert worst[1.0] < 1.3 and worst[1.0] < worst[0.0] - 0.15, worst


def test_an_interrupted_run_resumes_bit_equal(world, tmp_path, monkeypatch):
    model = base(world, tmp_path / "m")
    training = Training(**QUICK, max_steps=4, save_every=2)
    cfg = dataclasses.replace(supervised(world, tmp_path / "whole", model, audit=False), training=training)
    sft.main(cfg)
    right = Run._log

    def killed(self, *arguments):
        if self.step == 3:
            self.close()
            raise KeyboardInterrupt
        right(self, *arguments)

    monkeypatch.setattr(Run, "_log", killed)
    with pytest.raises(KeyboardInterrupt):
        sft.main(dataclasses.replace(cfg, out=tmp_path / "cut"))
    monkeypatch.setattr(Run, "_log", right)
    sft.main(dataclasses.replace(cfg, out=tmp_path / "cut"))
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_preferences_rewards_and_rleif_train_mixtures(world, tmp_path):
    model = base(world, tmp_path / "m", balance_loss=0.02)
    shared = {"model": model, "quiet": True}
    stage_dpo.main(
        stage_dpo.Config(
            data=(world.write("pairs.jsonl", world.preferences(12)),),
            out=tmp_path / "dpo",
            slices=1,
            training=Training(**QUICK, max_steps=2),
            **shared,
        )
    )
    for kind, rows in (("instruction", world.rankings(8)), ("process", world.processes(8))):
        data = (world.write(f"{kind}.jsonl", rows),)
        training = Training(**QUICK, max_steps=2)
        reward.main(reward.Config(kind=kind, data=data, out=tmp_path / kind, training=training, **shared))
    for name in ("dpo/stage_1", "instruction"):
        assert read_metrics(tmp_path / name / "metrics.jsonl")[0].keys() >= KEYS
    cfg = rleif.Config(
        data=(world.write("prompts.jsonl", world.single[:5]),),
        out=tmp_path / "rleif",
        reward=RewardOptions(tmp_path / "instruction" / "model", tmp_path / "process" / "model"),
        training=OnlineTraining(pack_tokens=256),
        ppo=PPOOptions(minibatches=2),
        rollout=RolloutOptions(steps=2, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=8),
        **shared,
    )
    rleif.main(cfg)
    lines = read_metrics(tmp_path / "rleif" / "metrics.jsonl")
    assert lines[0].keys() >= KEYS | {f"critic_{name}" for name in KEYS} and lines[0]["ratio_error"] < 1e-4
    assert lines[0]["router_loss"] > 0.02
    free = dataclasses.replace(cfg.rollout, replay_routing=False)
    rleif.main(dataclasses.replace(cfg, out=tmp_path / "free", rollout=free))


def test_meter_by_hand():
    config = PRESETS["tiny-mixtral"]
    model = Transformer(config, seed=0)
    meter = RouterMeter(dataclasses.replace(config, balance_loss=1.0), Mesh(torch.device("cpu")))
    meter.start(30)
    loss_sum, loads = 0.0, []
    for length in (12, 18):
        routes = Routes()
        model(torch.arange(length), torch.arange(length), torch.tensor([0, length]).int(), length, routes)
        loss_sum += float(meter.loss(routes))
        loads.append(routes.load())
    metrics = meter.metrics(pack(meter.pop_sums(), torch.device("cpu")).tolist())
    assert metrics["router_loss"] == pytest.approx(loss_sum) and 1.8 < loss_sum < 3
    load_ratio = (sum(loads) / sum(loads).float().mean(1, keepdim=True)).amax(1)
    assert metrics["expert_load_max"] == pytest.approx(load_ratio.tolist(), abs=1e-4)
    assert pack(meter.pop_sums(), torch.device("cpu")).tolist() == [0.0] * (1 + config.layers * config.experts)
    dense = RouterMeter(PRESETS["tiny"], Mesh(torch.device("cpu")))
    dense.start(3)
    assert dense.loss(Routes()) == 0.0 and dense.pop_sums() == [] and dense.metrics([]) == {}

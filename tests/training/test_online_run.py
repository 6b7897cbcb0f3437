"""The loop of online reinforcement learning: what its update reads and skips, what it sums up."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from host_reads import HostReads

from wizard_engine.model import PRESETS, ScoringModel, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.rl.options import CriticOptions, RolloutOptions
from wizard_engine.runtime.process import Runtime
from wizard_engine.training.online_run import OnlineRun
from wizard_engine.training.options import OnlineTraining

CONFIG = dataclasses.replace(PRESETS["tiny"], vocab_size=31, width=16, layers=1)
OPTIONS = {
    "training": OnlineTraining(lr=1e-2, clip=0.1, warmup=0.0, lr_floor=1.0, save_every=0),
    "rollout": RolloutOptions(steps=4, prompts_per_step=2, samples_per_prompt=1),
    "critic": CriticOptions(lr=1e-2),
    "average_from": 1.0,
    "seed": 0,
    "quiet": True,
}


@pytest.fixture
def run(tmp_path):
    policy, critic = Transformer(CONFIG, seed=0), ScoringModel(CONFIG, 1)
    critic.body.initialise(1)
    made = OnlineRun(SimpleNamespace(out=tmp_path, **OPTIONS), Runtime(), policy, critic, num_prompts=4)
    steps = made.steps()
    next(steps)
    yield made
    made.close()


def backward(run):
    """Gradients of policy and critic."""
    run.zero_grad()
    row = torch.arange(5), torch.arange(5), torch.tensor([0, 5], dtype=torch.int32), 5
    policy = run.modules["policy"]
    (policy(*row) @ policy.head_weight.T).log_softmax(-1)[:, 1].sum().backward()
    (run.modules["critic"](*row) - 1).square().sum().backward()


# Catches: a norm read before the optimizers are launched, or one by one; shares and differences read as they come.
def test_update_reads_once_behind_both_launches(run, monkeypatch):
    log = []
    backward(run)
    monkeypatch.setattr(AdamW, "step", lambda self, lr: log.append("launch"))
    with monkeypatch.context() as patch, HostReads(log, patch):
        for _ in range(2):
            run.add(torch.zeros(3), policy_loss=torch.tensor(0.5, requires_grad=True), other=torch.tensor(1.0))
            run.share(value_loss=torch.tensor(2.0))
            run.note_difference(torch.tensor([0.1, -0.3]))
            run.note_difference(torch.zeros(0))
        assert log == []
        run.update()
        assert log == ["launch", "launch", "read"]
        shares, difference = run._read()
    assert log[3:] == ["read"]
    assert shares == {"policy_loss": 1.0, "other": 2.0, "value_loss": 4.0}
    assert difference == float(torch.tensor(0.3))


# Catches: both skipped for one; a bias correction that counts a skipped update; a warm-up that is taken back.
@pytest.mark.parametrize("bad", ["policy", "critic"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_update_that_is_not_finite_is_skipped_and_does_not_count(run, bad, warmup, capsys):
    run.cfg.critic = CriticOptions(lr=1e-2, warmup_steps=warmup)
    backward(run)
    run.optimizers[bad].gradients[0][0] = float("nan")
    before = {name: optimizer.sharded.master.clone() for name, optimizer in run.optimizers.items()}
    run.update()
    for name, optimizer in run.optimizers.items():
        moves = name != bad and not (name == "policy" and warmup)
        assert torch.equal(optimizer.sharded.master, before[name]) != moves and optimizer.count == moves
    assert run.skipped == 1 and f"rleif: step 0: {bad}: gradient norm nan" in capsys.readouterr().err


def test_difference_that_is_not_a_number_does_not_hide_another(run):
    for values in ([0.2], [float("nan")], [-0.1]):
        run.note_difference(torch.tensor(values))
    assert run._read() == ({}, float(torch.tensor(0.2)))

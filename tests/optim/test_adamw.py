"""AdamW over flat buffers against torch's on the plain module; the schedule's values."""

import copy

import pytest
import torch
from torch import nn

from wizard_engine.optim import AdamW, cosine_with_warmup


class Tied(nn.Module):
    """Matrices, vectors, a tied weight and a frozen one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.inner(self.embedding(tokens)))) @ self.frozen.new_ones(4, 4))


def model(seed=0):
    torch.manual_seed(seed)
    return Tied()


def loss(module, step):
    generator = torch.Generator().manual_seed(step)
    tokens, targets = (torch.randint(0, 7, (12,), generator=generator) for _ in range(2))
    return nn.functional.cross_entropy(module(tokens), targets)


def train(module, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss(module, step).backward()
        optimizer.step(0.05 / (step + 1))


def test_adamw_equals_torch_with_decay_on_matrices_alone():
    ours, plain = model(), copy.deepcopy(model())
    matrices = [p for p in plain.parameters() if p.dim() >= 2 and p.requires_grad]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    optimizer = AdamW(ours, betas=(0.8, 0.9), epsilon=1e-6, weight_decay=0.3)
    for step in range(6):
        for group in theirs.param_groups:
            group["lr"] = 0.05 / (step + 1)
        theirs.zero_grad()
        loss(plain, step).backward()
        theirs.step()
        train(ours, optimizer, [step])
        for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(ours.frozen, torch.ones(3, 3)) and ours.head.weight is ours.embedding.weight


def test_adamw_gradients_accumulate_in_the_buffers():
    module = model()
    optimizer = AdamW(module)
    # Every parameter begins at a multiple of 8 elements.
    assert sum(g.numel() for g in optimizer.gradients) == 32 + 16 + 3 * 8
    loss(module, 0).backward()
    once = [g.clone() for g in optimizer.gradients]
    loss(module, 0).backward()
    assert all(torch.equal(g, 2 * o) for g, o in zip(optimizer.gradients, once)) and once[0].norm() > 0
    optimizer.zero_grad()
    assert all(float(p.grad.abs().max()) == 0 for p in module.parameters() if p.requires_grad)


def test_adamw_state_names_every_element_once():
    module = model()
    optimizer = AdamW(module, weight_decay=0.1)
    train(module, optimizer, range(3))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shards = {(moment, name): (start, values) for moment, name, start, values in optimizer.state_shards()}
    assert shards.keys() == {(moment, name) for moment in ("exp_avg", "exp_avg_sq") for name in trained}
    for (_, name), (start, values) in shards.items():
        assert start == 0 and values.shape == (trained[name].numel(),) and values.abs().max() > 0
    for (_, _), (_, values) in shards.items():
        values.zero_()
    assert optimizer.exp_avg.abs().max() == 0 and optimizer.exp_avg_sq.abs().max() == 0


def filled(value=0.5):
    """An optimizer whose gradients are all one number, and their norm."""
    optimizer = AdamW(model(), weight_decay=0.1)
    for gradient in optimizer.gradients:
        gradient.fill_(value)
    return optimizer, value * sum(g.numel() for g in optimizer.gradients) ** 0.5


# Catches: a clip that multiplies the gradients, a factor above 1, a factor for the wrong norm.
@pytest.mark.parametrize("max_norm", [0.0, 100.0, 1.0, 0.3])
def test_clip_gives_the_norm_and_the_step_scales_to_it(max_norm):
    optimizer, norm = filled()
    factor = min(1.0, max_norm / norm) if max_norm else 1.0
    assert optimizer.clip(max_norm) == pytest.approx(norm)
    assert all((g == 0.5).all() for g in optimizer.gradients)
    optimizer.step(0.1)
    scaled, _ = filled()
    for gradient in scaled.gradients:
        gradient.mul_(factor)
    scaled.step(0.1)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(optimizer, name), getattr(scaled, name), rtol=1e-6, atol=0.0)
    assert optimizer.clip(max_norm) == pytest.approx(norm) and optimizer.sharded.norm().dtype == torch.float64


# Catches: a factor that is divided in fp32.
def test_clip_factor_has_the_bits_of_a_division_in_double():
    optimizer, _ = filled()
    for value in torch.rand(300, generator=torch.Generator().manual_seed(0)).tolist():
        for gradient in optimizer.gradients:
            gradient.fill_(value)
        norm = float(optimizer.clip(0.3))
        assert optimizer._scale.item() == torch.tensor(min(1.0, 0.3 / norm)).item()


# Catches: a bias correction that counts a skipped step; an infinite norm that becomes a factor of 0; a scale that is
# kept for the step after; the loss not looked at.
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_step_that_is_not_finite_changes_nothing_and_does_not_count(where, value):
    optimizer, _ = filled()
    optimizer.clip(1.0)
    optimizer.step(0.1)
    before = [x.clone() for x in (optimizer.sharded.master, optimizer.exp_avg, optimizer.exp_avg_sq)]
    if where == "gradient":
        optimizer.gradients[0][0] = value
    norm = optimizer.clip(1.0, torch.tensor(value if where == "loss" else 1.0, dtype=torch.float64))
    assert norm.isfinite() == (where == "loss")
    optimizer.step(0.1)
    optimizer.take_back()
    after = (optimizer.sharded.master, optimizer.exp_avg, optimizer.exp_avg_sq)
    assert all(torch.equal(a, b) for a, b in zip(after, before)) and optimizer.count == 1
    optimizer.zero_grad()
    loss(optimizer_model(optimizer), 0).backward()
    optimizer.step(0.1)
    assert not torch.equal(optimizer.sharded.master, before[0]) and optimizer.count == 2


def optimizer_model(optimizer):
    """A module with the optimizer's parameters."""
    module = model()
    flat_grads = dict(
        zip(
            [slot.name for f in optimizer.sharded.training for slot in f.layout.slots],
            [p for f in optimizer.sharded.training for p in f.parameters],
        )
    )
    for name, parameter in flat_grads.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
    module.head.weight = module.embedding.weight
    return module


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.5), (3, 2.0), (4, 2.0), (8, 1.1), (6, 0.2 + 0.9 * (1 + 0.5**0.5)), (12, 0.2), (99, 0.2)],
)
def test_cosine_with_warmup_values(step, expected):
    """Peak 2 after 4 of 12 steps, a tenth of it left at the end."""
    assert cosine_with_warmup(step, peak=2.0, warmup=4, total=12, floor=0.1) == pytest.approx(expected)

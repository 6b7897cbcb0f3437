"""One process: a model that computes in bf16 beside fp32 masters, and parameters that are not gathered."""

import dataclasses

import pytest
import torch

from wizard_engine.loss import sft_loss
from wizard_engine.model import PRESETS, ScoringModel, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import Sharding, parallelize, sharded
from wizard_engine.parallel.fsdp_units import is_absent
from wizard_engine.parallel.mesh import Mesh

CPU = Mesh(torch.device("cpu"))
CONFIG = dataclasses.replace(PRESETS["tiny-mistral"], vocab_size=64)


def train(model, steps, **options):
    """Losses of steps on one batch, its loss weights in two micro-batches."""
    optimizer, losses = AdamW(model, weight_decay=0.1, **options), []
    tokens = torch.randint(64, (33,), generator=torch.Generator().manual_seed(0))
    positions, marks = torch.arange(32), torch.tensor([0, 32], dtype=torch.int32)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_sum = 0.0
        for half in (torch.arange(32) < 16, torch.arange(32) >= 16):
            hidden = model(tokens[:-1], positions, marks, 32)
            loss = sft_loss(hidden, model.head_weight, tokens[1:], half.float(), num_tokens=32.0).loss
            loss.backward()
            loss_sum += float(loss.detach())
        optimizer.sharded.finish()
        optimizer.clip(1.0)
        optimizer.step(3e-3)
        losses.append(loss_sum)
    return losses


@pytest.mark.parametrize("host", [False, True])
def test_bf16_trains_beside_fp32_masters(host):
    wide, narrow = Transformer(CONFIG, seed=0), Transformer(CONFIG, seed=0)
    parallelize(narrow, CPU, Sharding(dtype="bfloat16", offload_optimizer=host))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    expected, losses = train(wide, 8), train(narrow, 8)
    assert losses[-1] < 0.9 * losses[0] and losses == pytest.approx(expected, rel=0.02)
    engine = sharded(narrow)
    assert engine.master.dtype == torch.float32 and engine.gradients[0].dtype == torch.float32
    for flat in engine.training:
        assert flat.weights.dtype == torch.bfloat16 and torch.equal(flat.weights, flat.master.bfloat16())
        assert not torch.equal(flat.master, flat.master.bfloat16().float())
    for (name, parameter), other in zip(narrow.named_parameters(), wide.parameters()):
        moved = (other - Transformer(CONFIG, seed=0).get_parameter(name)).abs().max()
        assert (parameter.float() - other).abs().max() < 0.02 + 0.5 * moved, name


def test_scores_compute_in_fp32_beside_a_body_in_bf16():
    model = ScoringModel(CONFIG, 3, surprise=True)
    parallelize(model, CPU, Sharding(dtype="bfloat16"))
    assert {p.dtype for p in model.body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.score.parameters()} == {torch.float32}
    names = {slot.name for flat in sharded(model).training for slot in flat.layout.slots}
    assert names and all(name.startswith("score.") for name in names)


def test_numbers_come_by_element_into_a_model_without_any():
    whole = Transformer(CONFIG, seed=3)
    with torch.device("meta"):
        empty = Transformer(CONFIG)
    engine = sharded(parallelize(empty, CPU))
    assert set(engine.shapes) == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        flat = parameter.detach().flatten()
        for start in range(0, len(flat), 700):
            engine.load(name, flat[start : start + 700], start)
    engine.publish()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), empty.parameters(), strict=True))
    assert not any(is_absent(p) for p in empty.parameters())

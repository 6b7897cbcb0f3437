"""Copies between device and host memory, late ones: nothing is read before its event, nothing overwritten."""

import dataclasses

import pytest
import torch
from late_link import LateLink

import wizard_engine.optim.adamw as optimizers
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import Sharding, lockstep, parallelize, sharded
from wizard_engine.parallel.fsdp import Sharded
from wizard_engine.parallel.mesh import Mesh
from wizard_engine.parallel.offload import DirectLink, GradientOffload
from wizard_engine.parallel.parallelize import unit_specs

CPU = Mesh(torch.device("cpu"))
CONFIG = dataclasses.replace(PRESETS["tiny"], vocab_size=64, width=32, layers=3, tied=False)


def offloaded(dtype, link):
    """A model whose optimizer is in other memory, which `link` copies to and from."""
    model = Transformer(CONFIG, seed=0)
    specs = unit_specs(model, model, getattr(torch, dtype))
    model._sharded = Sharded(specs, CPU, host=True, link=link)
    return model


def train(model, micro_batches, steps=3):
    """Losses, norms, and weights at the end."""
    optimizer, seen = AdamW(model, weight_decay=0.1), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in lockstep(range(micro_batches), model, backward=True):
            tokens = torch.randint(64, (9,), generator=generator)
            hidden = model(tokens, torch.arange(9), torch.tensor([0, 9], dtype=torch.int32), 9)
            loss = -(hidden @ model.head_weight.T).float().log_softmax(-1)[:, 3].mean()
            loss.backward()
            seen.append(loss.detach())
        optimizer.sharded.finish()
        seen.append(optimizer.clip(0.1).float())
        optimizer.step(1e-2)
    engine = sharded(model)
    master = {name: values.clone() for name, _, values in engine.shards(engine.master)}
    return torch.stack(seen), master, [p.detach().clone() for p in model.parameters()]


# Catches: a gradient, a master or a weight read before its event; a room or a source overwritten while it is copied;
# a gradient added twice or not at all.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_late_copies_give_the_numbers_of_no_copies(dtype, micro_batches):
    losses, master, weights = train(offloaded(dtype, LateLink()), micro_batches)
    at_once = train(offloaded(dtype, DirectLink()), micro_batches)
    assert torch.equal(losses, at_once[0]) and all(torch.equal(master[n], at_once[1][n]) for n in master)
    assert all(torch.equal(a, b) for a, b in zip(weights, at_once[2], strict=True))
    plain = parallelize(Transformer(CONFIG, seed=0), CPU, Sharding(dtype=dtype, offload_optimizer=True))
    expected = train(plain, micro_batches)
    # Chunks of the norm begin with every unit there, so that the clip factor may round apart.
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
    for name, values in master.items():
        torch.testing.assert_close(values, expected[1][name], rtol=1e-4, atol=1e-6)


# Catches: weights that leave when all are updated; an update that waits for the copy of the one before.
def test_weights_are_copied_out_while_the_next_flat_is_updated(monkeypatch):
    link = LateLink()
    model = offloaded("bfloat16", link)
    engine, optimizer = sharded(model), AdamW(model)
    assert len(engine.training) == 5
    hidden = model(torch.arange(9), torch.arange(9), torch.tensor([0, 9], dtype=torch.int32), 9)
    (hidden @ model.head_weight.T).float().sum().backward()
    optimizer.clip(1.0)
    link.log.clear()
    first = link.started
    inner = optimizers.offloaded_adamw
    monkeypatch.setattr(optimizers, "offloaded_adamw", lambda *a, **k: link.log.append("update") or inner(*a, **k))
    optimizer.step(1e-2)
    updates = [2 if all(flat.decay_split()) else 1 for flat in engine.training]
    expected = [line for n, count in enumerate(updates) for line in (*["update"] * count, f"start {first + n}")]
    assert link.log == [*expected, *(f"end {first + n}" for n in range(5))]


# Catches: the norm of a flat that waits for all flats to be there.
def test_norm_of_a_flat_waits_for_that_flat_alone():
    link = LateLink()
    model = offloaded("bfloat16", link)
    engine = sharded(model)
    hidden = model(torch.arange(9), torch.arange(9), torch.tensor([0, 9], dtype=torch.int32), 9)
    (hidden @ model.head_weight.T).float().sum().backward()
    assert not [line for line in link.log if line.startswith("end")]
    norms = engine._norm_pieces(None)
    assert next(norms).isfinite().all() and link.waiting
    assert all(norm.isfinite().all() for norm in norms) and not link.waiting


def test_landing_adds_in_order_with_two_rooms():
    link = LateLink()
    gradient_offload, target = GradientOffload(link, pinned=False), torch.empty(4)
    event = gradient_offload.store(target, torch.full((4,), 1.0))
    for value in (2.0, 4.0, 8.0):
        gradient_offload.add(target, torch.full((4,), value))
    gradient_offload.settle()
    event.synchronize()
    assert target.tolist() == [15.0] * 4
    gradient_offload.add(target[:2], torch.ones(2))
    gradient_offload.settle()
    assert target.tolist() == [16.0, 16.0, 15.0, 15.0]

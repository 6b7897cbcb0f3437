"""Memory and traffic of sharded models, simulated: 7B and 70B on 8, 64 and 512 ranks, on the meta device."""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import use_backend
from wizard_engine.loss import sft_loss
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, parallelize, sharded
from wizard_engine.parallel.estimate import estimate
from wizard_engine.runtime import Runtime

META = torch.device("meta")
TINY = dataclasses.replace(PRESETS["tiny"], layers=4)
MODELS = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tied=False),
    "mixture": dataclasses.replace(TINY, tied=False, experts=4),
    "tied mixture": dataclasses.replace(TINY, experts=4),
}


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def simulated(config, ranks, sharding, **options):
    """(plain model, mesh, divided model) of one of many ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = make_mesh(MeshOptions(**options), Runtime(0, ranks, 0, META))
    with META:
        plain, model = Transformer(config), Transformer(config)
    return plain, mesh, parallelize(model, mesh, sharding)


def step(model, tokens, micro_batches=1, between=lambda: None):
    engine = sharded(model)
    ids, weights = torch.zeros(tokens, dtype=torch.int64, device=META), torch.ones(tokens, device=META)
    marks = torch.zeros(2, dtype=torch.int32, device=META)
    engine.zero_grad()
    for number in range(micro_batches):
        between()
        engine.last = number + 1 == micro_batches
        hidden = model(ids, ids, marks, tokens)
        loss = sft_loss(hidden, model.head_weight, ids, weights, num_tokens=float(tokens)).loss
        del hidden
        loss.backward()
    engine.finish()


def peak(model, tokens, micro_batches):
    """Peak bytes of two steps, as torch's own tracker sees them."""
    engine, optimizer, tracker = sharded(model), AdamW(model), MemTracker()
    units = (*engine.units, *engine.resident)
    buffers = {id(unit.place): unit.place.buffer for unit in units}
    parts = (engine.master, optimizer.exp_avg, optimizer.exp_avg_sq, *engine.copies)
    tracker.track_external(*parts, *buffers.values())
    with tracker, use_backend("triton"):
        step(model, tokens, micro_batches, tracker.reset_mod_stats)
    return tracker.get_tracker_snapshot("peak")[META]["Total"]


@pytest.mark.parametrize(
    ("preset", "ranks", "recompute", "micro_batches"),
    [
        *(("7b", ranks, recompute, 1) for ranks in (8, 64, 512) for recompute in ("none", "selective", "full")),
        *(("70b", ranks, "full", 1) for ranks in (8, 64, 512)),
        ("7b", 8, "full", 2),
    ],
)
def test_peak_memory_of_a_rank_is_within_the_closed_bound(preset, ranks, recompute, micro_batches):
    sharding = Sharding(dtype="bfloat16", recompute=recompute)
    plain, mesh, model = simulated(PRESETS[preset], ranks, sharding)
    bound = estimate(plain, mesh, sharding, tokens=4096, micro_batches=micro_batches)
    found = peak(model, 4096, micro_batches)
    print(f"{preset} {ranks} ranks {recompute}: {found / 2**30:.2f} GiB of {bound.peak / 2**30:.2f}")
    assert found <= bound.peak and found > 0.8 * bound.peak
    # Everything but the activations is not a bound but the sum itself.
    engine, optimizer = sharded(model), AdamW(model)
    parts = (engine.master, engine.master, optimizer.exp_avg, optimizer.exp_avg_sq, *engine.copies)
    assert bound.parts == sum(part.nbytes for part in parts)


class Traffic(TorchDispatchMode):
    """Bytes of the whole buffers of gathers, reductions and sums, by what torch dispatches."""

    def __init__(self):
        super().__init__()
        self.gathered = self.reduced = self.replicated = 0
        self.order = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name == "_allgather_base_":
            self.gathered += args[0].nbytes
            self.order.append(("gather", args[0].numel()))
        elif name == "_reduce_scatter_base_":
            self.reduced += args[1].nbytes
            self.order.append(("reduce", args[1].numel()))
        elif name == "allreduce_":
            self.replicated += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "recompute", "accumulate", "micro_batches"),
    itertools.product(MODELS, ("none", "full"), ("sharded", "whole"), (1, 3)),
)
def test_bytes_moved_are_those_of_the_closed_form(name, recompute, accumulate, micro_batches):
    sharding = Sharding(dtype="bfloat16", recompute=recompute, accumulate=accumulate)
    plain, mesh, model = simulated(MODELS[name], 8, sharding, dp_replicate=2)
    expected = estimate(plain, mesh, sharding, tokens=64, micro_batches=micro_batches)
    for _ in range(2):
        with Traffic() as traffic, use_backend("triton"):
            step(model, 64, micro_batches)
        assert traffic.gathered == expected.gathered and traffic.reduced == expected.reduced
        assert traffic.replicated == expected.replicated
        sharded(model).updated()
    assert sharded(model).gathered_bytes == 2 * expected.gathered
    assert sharded(model).reduced_bytes == 2 * expected.reduced


def test_next_unit_is_asked_for_before_this_one_computes_and_before_gradients_leave():
    _, _, model = simulated(MODELS["untied"], 8, Sharding(dtype="bfloat16"))
    with Traffic() as traffic, use_backend("triton"):
        step(model, 64)
    sizes = {unit.flats[0].layout.size: unit.spec.name.partition(".")[0] for unit in sharded(model).units}
    found = [f"{kind} {sizes[size]}" for kind, size in traffic.order]
    forward = ["gather embedding", *["gather blocks"] * 4, "gather head"]
    # The last block is still there; the third is asked for before the head's gradients leave, and so on.
    backward = ["gather blocks", "reduce head", *["gather blocks", "reduce blocks"] * 2, *["reduce blocks"] * 2]
    assert found == [*forward, *backward, "reduce embedding"]
    # While a unit computes, the next one is under way.
    engine, seen = sharded(model), []
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, n=number: seen.append((n, engine.units[n + 2].place.owner.index)))
    with use_backend("triton"):
        step(model, 64)
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 5)]


def test_copies_alone_move_their_sum_and_nothing_else():
    sharding = Sharding(dtype="bfloat16")
    plain, mesh, model = simulated(TINY, 4, sharding, dp_shard=1)
    expected = estimate(plain, mesh, sharding, tokens=64)
    with Traffic() as traffic, use_backend("triton"):
        step(model, 64, 2)
    assert (traffic.gathered, traffic.reduced, traffic.replicated) == (0, 0, expected.replicated)
    assert expected.gathered == expected.reduced == 0 and expected.replicated == sharded(model).master.nbytes

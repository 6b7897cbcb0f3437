"""Memory and traffic of sharded models, simulated: 7B and 70B on 8, 64 and 512 ranks, on the meta device."""

import itertools

import pytest
import torch
import torch.distributed as dist
from simulated_models import MODELS, TINY
from torch.testing._internal.distributed.fake_pg import FakeStore

from kernels import use_backend
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, parallelize, sharded
from wizard_engine.planning.estimate import estimate
from wizard_engine.planning.simulate import Record, language_step, peak_bytes
from wizard_engine.runtime.process import Runtime

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def simulated(config, ranks, sharding, **options):
    """(plain model, mesh, sharded model) of one of many ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = make_mesh(MeshOptions(**options), Runtime(0, ranks, 0, META))
    with META:
        plain, model = Transformer(config), Transformer(config)
    return plain, mesh, parallelize(model, mesh, sharding)


def measured_peak(model, tokens, micro_batches):
    """Peak bytes of a step."""
    return peak_bytes(model, AdamW(model), tokens, micro_batches)


@pytest.mark.every(7)
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
    measured = measured_peak(model, 4096, micro_batches)
    print(f"{preset} {ranks} ranks {recompute}: {measured / 2**30:.2f} GiB of {bound.peak / 2**30:.2f}")
    assert measured <= bound.peak and measured > 0.8 * bound.peak
    # Everything but the activations is not a bound but the sum itself.
    engine, optimizer = sharded(model), AdamW(model)
    buffers = (engine.master, engine.master, optimizer.exp_avg, optimizer.exp_avg_sq, *engine.copies)
    assert bound.shards == sum(buffer.nbytes for buffer in buffers)


def moved(model, tokens, micro_batches=1):
    """(gathers, reductions, sums) of a step."""
    with Record() as record, use_backend("triton"):
        language_step(model, tokens, micro_batches)
    kinds = ("gather", "reduce", "sum")
    return record.collectives, *(sum(c.size for c in record.collectives if c.kind == kind) for kind in kinds)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("name", "recompute", "accumulate", "micro_batches"),
    list(itertools.product(MODELS, ("none", "full"), ("sharded", "whole"), (1, 3))),
)
def test_bytes_moved_are_those_of_the_closed_form(name, recompute, accumulate, micro_batches):
    sharding = Sharding(dtype="bfloat16", recompute=recompute, accumulate=accumulate)
    plain, mesh, model = simulated(MODELS[name], 8, sharding, dp_replicate=2)
    expected = estimate(plain, mesh, sharding, tokens=64, micro_batches=micro_batches)
    for _ in range(2):
        bytes_moved = moved(model, 64, micro_batches)[1:]
        assert bytes_moved == (expected.gathered, expected.reduced, expected.replicated)
        sharded(model).updated()
    assert sharded(model).gathered_bytes == 2 * expected.gathered
    assert sharded(model).reducer.reduced_bytes == 2 * expected.reduced


def test_next_unit_is_gathered_before_this_one_computes_and_before_gradients_are_reduced():
    _, _, model = simulated(MODELS["untied"], 8, Sharding(dtype="bfloat16"))
    collectives = moved(model, 64)[0]
    sizes = {unit.flats[0].layout.size: unit.spec.name.partition(".")[0] for unit in sharded(model).units}
    order = [f"{one.kind} {sizes[one.size // one.dtype.itemsize]}" for one in collectives]
    forward = ["gather embedding", *["gather blocks"] * 4, "gather head"]
    # The last block is still there; the third is asked for before the head's gradients leave, and so on.
    backward = ["gather blocks", "reduce head", *["gather blocks", "reduce blocks"] * 2, *["reduce blocks"] * 2]
    assert order == [*forward, *backward, "reduce embedding"]
    # While a unit computes, the next one is under way.
    engine, seen = sharded(model), []
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda *_, n=number: seen.append((n, engine.units[n + 2].gather_buffer.owner.index))
        )
    with use_backend("triton"):
        language_step(model, 64)
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 5)]


def test_replicas_move_only_the_sum_of_their_gradients():
    sharding = Sharding(dtype="bfloat16")
    plain, mesh, model = simulated(TINY, 4, sharding, dp_shard=1)
    expected = estimate(plain, mesh, sharding, tokens=64)
    assert moved(model, 64, 2)[1:] == (0, 0, expected.replicated)
    assert expected.gathered == expected.reduced == 0 and expected.replicated == sharded(model).master.nbytes

"""Thousands of ranks on one CPU: traffic, memory and owners of every layout, and collectives that do not fit."""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from simulated_models import MODELS, TINY

from kernels import use_backend
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import MeshOptions, Sharding, parallelize, sharded
from wizard_engine.parallel.mesh import resolve
from wizard_engine.planning.estimate import estimate, mesh_of
from wizard_engine.planning.simulate import (
    META,
    Record,
    by_axis,
    by_ranks,
    first_difference,
    language_step,
    peak_bytes,
    record,
    simulated_rank,
)

LAYOUTS = [
    {},
    {"tp": 2},
    {"cp": 2},
    {"cp": 2, "tp": 2},
    {"tp": 2, "dp_shard": 1},
    {"ep": 2},
    {"tp": 2, "ep": 4},
    {"cp": 2, "tp": 2, "ep": 2, "dp_replicate": 2},
]


def empty(config):
    with META:
        return Transformer(config)


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("name", "options"),
    [(n, options) for n, options in itertools.product(MODELS, LAYOUTS) if MODELS[n].experts or "ep" not in options],
)
def test_bytes_on_every_axis_are_those_of_the_closed_form(name, options):
    for recompute, micro_batches in itertools.product(("none", "selective", "full"), (1, 3)):
        sharding = Sharding(dtype="bfloat16", recompute=recompute)
        with simulated_rank(MeshOptions(**options), 3, 8) as mesh, use_backend("triton"):
            model = parallelize(empty(MODELS[name]), mesh, sharding)
            with Record() as calls:
                language_step(model, 64, micro_batches)
            expected = estimate(empty(MODELS[name]), mesh, sharding, tokens=64, micro_batches=micro_batches)
            assert by_ranks(by_axis(calls.collectives, mesh), mesh) == by_ranks(expected.traffic, mesh)


@pytest.mark.every(10)
@pytest.mark.parametrize(
    ("preset", "ranks", "options", "recompute", "tokens"),
    [
        ("7b", 8, {"tp": 8}, "selective", 4096),
        ("7b", 8, {"cp": 2}, "full", 8192),
        ("7b", 1024, {"tp": 4}, "none", 4096),
        ("70b", 64, {"tp": 8}, "none", 4096),
        ("70b", 8, {"tp": 8}, "full", 4096),
        ("70b", 1024, {"tp": 8, "cp": 2}, "selective", 8192),
        ("8x22b", 8, {"ep": 8}, "full", 4096),
        ("8x22b", 64, {"ep": 8, "tp": 8, "cp": 2}, "none", 4096),
        ("8x22b", 128, {"ep": 8}, "none", 4096),
        ("8x22b", 1024, {"ep": 8, "tp": 2, "dp_replicate": 4}, "selective", 4096),
    ],
)
def test_peak_memory_is_within_the_closed_bound(preset, ranks, options, recompute, tokens):
    config, sharding = PRESETS[preset], Sharding(dtype="bfloat16", recompute=recompute)
    with simulated_rank(MeshOptions(**options), ranks - 1, ranks) as mesh:
        model = parallelize(empty(config), mesh, sharding)
        measured = peak_bytes(model, AdamW(model), tokens)
        bound = estimate(empty(config), mesh, sharding, tokens=tokens)
    print(f"{preset} {ranks} ranks {options} {recompute}: {measured / 2**30:.2f} GiB of {bound.peak / 2**30:.2f}")
    assert 0.93 * bound.peak < measured <= bound.peak


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (8, {"ep": 8}),
        (64, {"ep": 8, "tp": 2}),
        (128, {"ep": 4, "dp_replicate": 2}),
        pytest.param(1024, {"ep": 8, "tp": 4, "cp": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_element_has_one_owner_in_each_copy(ranks, options):
    """Counted by sums of places: rows of experts, vocabulary entries and heads, each element of each shard once."""
    config = dataclasses.replace(PRESETS["8x22b"], layers=1, width=64, ffn_width=96, vocab_size=512)
    owned: dict[tuple, list] = {}
    for rank in range(ranks):
        with simulated_rank(MeshOptions(**options), rank, ranks) as mesh:
            engine = sharded(parallelize(empty(config), mesh, Sharding()))
        for name, start, values in engine.shards(engine.master):
            runs = list(engine.shard_specs[name].runs(start, start + values.numel()))
            owned.setdefault((mesh.replicate.index, name), []).extend((first, first + n) for first, _, n in runs)
    shapes = {name: p.numel() for name, p in empty(config).named_parameters()}
    copies = mesh.replicate.size
    assert len(owned) == copies * len(shapes)
    for (_, name), runs in owned.items():
        runs.sort()
        assert runs[0][0] == 0 and runs[-1][1] == shapes[name], name
        assert all(a[1] == b[0] for a, b in itertools.pairwise(runs)), name


@pytest.mark.every(5)
@pytest.mark.parametrize(
    ("preset", "ranks", "options"),
    [
        ("7b", 8, {}),
        ("7b", 64, {"tp": 4, "dp_replicate": 2}),
        ("70b", 64, {"tp": 8, "cp": 2}),
        ("8x22b", 8, {"ep": 8}),
        ("8x22b", 128, {"ep": 8, "tp": 4, "dp_replicate": 2}),
    ],
)
def test_collectives_of_all_ranks_fit(preset, ranks, options):
    config, sharding = dataclasses.replace(PRESETS[preset], layers=2), Sharding(dtype="bfloat16", recompute="full")
    mesh = MeshOptions(**options)
    records = {r: record(lambda: empty(config), mesh, r, ranks, sharding, tokens=4096) for r in range(ranks)}
    assert first_difference(records) == ""
    assert len(records[0]) > 8


@pytest.mark.slow
def test_collectives_of_1024_ranks_fit_in_every_group_of_the_first_and_the_last():
    config, options = dataclasses.replace(PRESETS["8x22b"], layers=1), MeshOptions(ep=8, tp=4, cp=2, dp_replicate=4)
    looked_at = set()
    for rank in (0, 1023):
        with simulated_rank(options, rank, 1024) as mesh:
            for name in ("replicate", "shard", "tp", "cp", "row", "copy", "efsdp", "ep"):
                looked_at |= set(getattr(mesh, name).ranks)
    sharding = Sharding(dtype="bfloat16")
    records = {r: record(lambda: empty(config), options, r, 1024, sharding, tokens=4096) for r in sorted(looked_at)}
    assert len(records) > 256 and first_difference(records) == ""


class Skewed(Transformer):
    """A model with a collective that depends on the rank: what a layer does that looks at its own data first."""

    how = "size"

    def forward(self, *args, **options):
        rank = dist.get_rank()
        if self.how == "absent" and rank != 5:
            dist.all_reduce(torch.zeros(4, device=META))
        if self.how == "never":
            group = dist.new_group(list(range(8)), use_local_synchronization=True)
            if rank != 5:
                dist.all_reduce(torch.zeros(4, device=META), group=group)
        if self.how == "size":
            dist.all_reduce(torch.zeros(4 + (rank == 5), device=META))
        if self.how == "order":
            kinds = [dist.all_reduce, lambda x: dist.broadcast(x, 0)]
            for kind in reversed(kinds) if rank == 5 else kinds:
                kind(torch.zeros(4, device=META))
        return super().forward(*args, **options)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("absent", "collectives of group"),
        ("never", "1 collectives of group 0, 1, 2, 3, ... (8 ranks) against 0"),
        ("size", "bytes"),
        ("order", "sum of 16 bytes"),
    ],
)
def test_collective_that_depends_on_the_rank_is_detected(monkeypatch, how, text):
    monkeypatch.setattr(Skewed, "how", how)

    def build():
        with META:
            return Skewed(TINY)

    records = {r: record(build, MeshOptions(tp=2), r, 8, Sharding(), tokens=64) for r in range(8)}
    difference = first_difference(records)
    assert difference.startswith("ranks 0 and 5: ") and text in difference


def test_sizes_alone_make_the_mesh_of_an_estimate():
    shape = resolve(MeshOptions(tp=2, cp=2, ep=4, dp_replicate=2), 32)
    mesh = mesh_of(shape, META)
    with simulated_rank(MeshOptions(tp=2, cp=2, ep=4, dp_replicate=2), 0, 32) as real:
        assert mesh.shape == real.shape
        for name in ("replicate", "shard", "tp", "cp", "row", "copy", "efsdp", "ep", "data"):
            assert getattr(mesh, name).size == getattr(real, name).size, name


def test_simulation_beside_real_ranks_is_refused():
    inside = simulated_rank(MeshOptions(), 0, 2)
    with inside, pytest.raises(ValueError, match="expected a process without ranks"):
        simulated_rank(MeshOptions(), 0, 2).__enter__()

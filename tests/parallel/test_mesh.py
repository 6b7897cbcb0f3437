"""The mesh: which ranks make which groups, and what is said of sizes that do not fit."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from wizard_engine.model import PRESETS, Transformer
from wizard_engine.parallel import MeshOptions, make_mesh, parallelize
from wizard_engine.parallel.mesh import lines, resolve
from wizard_engine.runtime.process import Runtime


@pytest.mark.parametrize(
    ("options", "ranks", "shape"),
    [
        ({}, 1, (1, 1, 1, 1, 1, 1)),
        ({}, 8, (1, 8, 1, 1, 8, 1)),
        ({"dp_shard": 1}, 8, (8, 1, 1, 1, 1, 1)),
        ({"dp_replicate": 2}, 8, (2, 4, 1, 1, 4, 1)),
        ({"dp_shard": 4, "tp": 2}, 16, (2, 4, 1, 2, 8, 1)),
        ({"tp": 2, "ep": 8}, 16, (1, 8, 1, 2, 2, 8)),
        ({"dp_replicate": 2, "dp_shard": 4}, 8, (2, 4, 1, 1, 4, 1)),
        ({"cp": 2, "tp": 4, "ep": 4, "dp_shard": 1}, 16, (2, 1, 2, 4, 2, 4)),
    ],
)
def test_sizes_left_out_take_the_rest(options, ranks, shape):
    mesh_shape = resolve(MeshOptions(**options), ranks)
    assert (
        mesh_shape.replicate,
        mesh_shape.dp_shard,
        mesh_shape.cp,
        mesh_shape.tp,
        mesh_shape.efsdp,
        mesh_shape.ep,
    ) == shape


@pytest.mark.parametrize(
    ("options", "ranks", "text"),
    [
        ({"tp": 0}, 8, "tp: expected at least 1, got 0"),
        ({"dp_shard": -1}, 8, "dp_shard: expected at least 1, got -1"),
        ({"tp": 3}, 8, r"mesh\.tp must divide the ranks: tp=3, ranks = 8; choose from \[1, 2, 4, 8\]"),
        ({"tp": 2, "cp": 3}, 8, r"mesh\.cp must divide the ranks / tp: cp=3, ranks / tp = 4; choose from \[1, 2, 4\]"),
        ({"dp_shard": 3}, 8, r"dp_shard=3, ranks / \(cp x tp\) = 8; choose from \[1, 2, 4, 8\]"),
        ({"dp_replicate": 5, "tp": 2}, 12, r"dp_replicate=5, ranks / \(cp x tp\) = 6; choose from \[1, 2, 3, 6\]"),
        (
            {"dp_replicate": 2, "dp_shard": 2},
            8,
            r"expected dp_replicate x dp_shard x cp x tp = 8 ranks, got 2 x 2 x 1 x 1 = 4; with cp=1 and tp=1 choose "
            r"dp_replicate x dp_shard from 1 x 8, 2 x 4, 4 x 2, 8 x 1, or start 4 ranks",
        ),
        ({"ep": 3}, 8, r"ep=3, dp_shard x cp x tp = 8; choose from \[1, 2, 4, 8\]"),
        ({"dp_replicate": 4, "ep": 4}, 8, r"ep=4, dp_shard x cp x tp = 2; choose from \[1, 2\]"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_would(options, ranks, text):
    with pytest.raises(ValueError, match=text):
        resolve(MeshOptions(**options), ranks)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5, 1), (4, 1, 2)])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_lines_divide_the_ranks_and_vary_along_their_axes_alone(shape, axes):
    place = {rank: at for rank, at in enumerate(itertools.product(*map(range, shape)))}
    groups = lines(shape, axes)
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(math.prod(shape)))
    for ranks in groups:
        assert len(ranks) == math.prod(shape[axis] for axis in axes)
        for axis in set(range(3)) - set(axes):
            assert len({place[rank][axis] for rank in ranks}) == 1


@pytest.fixture
def simulated():
    """make_mesh of one rank of many, without the others."""

    def of(rank, world, **options):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        return make_mesh(MeshOptions(**options), Runtime(rank, world, 0, torch.device("meta")))

    yield of
    if dist.is_initialized():
        dist.destroy_process_group()


def test_every_rank_of_512_agrees_on_who_is_with_whom(simulated):
    meshes = [simulated(rank, 512, dp_replicate=4, tp=8, ep=16, cp=2) for rank in range(0, 512, 37)]
    for mesh in meshes:
        assert mesh.shape == "dp_replicate 4 x dp_shard 8 x cp 2 x tp 8, efsdp 8 x ep 16"
        for name in ("replicate", "shard", "tp", "cp", "row", "copy", "efsdp", "ep", "data"):
            axis = getattr(mesh, name)
            assert axis.ranks[axis.index] == mesh.rank and len(axis.ranks) == axis.size
            for other in meshes:
                theirs = getattr(other, name)
                assert axis.ranks == theirs.ranks or not set(axis.ranks) & set(theirs.ranks), name
        # tp and ep are among neighbours; gathers and reductions have groups of their own.
        assert mesh.tp.ranks == tuple(range(mesh.rank // 8 * 8, mesh.rank // 8 * 8 + 8))
        assert mesh.ep.ranks == tuple(range(mesh.rank // 16 * 16, mesh.rank // 16 * 16 + 16))
        assert mesh.shard.group is not mesh.shard.reduce and mesh.replicate.reduce is None


# Catches: a group that some ranks leave out: NCCL's communicators are splits of the world's, in which all take part.
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (8, {}),
        (8, {"dp_replicate": 2}),
        (16, {"tp": 2, "ep": 8}),
        (16, {"cp": 2, "tp": 2, "ep": 4}),
        (16, {"dp_replicate": 2, "tp": 4, "ep": 8}),
        (12, {"dp_shard": 1, "tp": 2, "cp": 3, "ep": 2}),
    ],
)
def test_every_rank_joins_every_split_of_the_world(simulated, monkeypatch, world, options):
    made = []
    monkeypatch.setattr(dist, "new_group", lambda ranks, **more: made[-1].append(tuple(ranks)))
    for rank in range(world):
        made.append([])
        simulated(rank, world, **options)
    assert len({len(rank_groups) for rank_groups in made}) == 1 and made[0]
    for groups in zip(*made):
        assert sorted(rank for ranks in set(groups) for rank in ranks) == list(range(world))


@pytest.mark.parametrize(
    ("preset", "options", "text"),
    [
        ("tiny-mixtral", {"tp": 4}, r"mesh\.tp must divide kv_heads: tp=4, kv_heads=2; choose from \[1, 2\]"),
        ("tiny-mixtral", {"ep": 8}, r"mesh\.ep must divide experts: ep=8, experts=4; choose from \[1, 2, 4\]"),
    ],
)
def test_layouts_that_do_not_divide_a_model_name_those_that_would(simulated, preset, options, text):
    with torch.device("meta"):
        model = Transformer(PRESETS[preset])
    with pytest.raises(ValueError, match=text):
        parallelize(model, simulated(0, 16, **options))
    mesh = simulated(0, 16)
    parallelize(model, mesh)
    with pytest.raises(ValueError, match="expected one that is not divided yet"):
        parallelize(model, mesh)


SCRIPT = """
from wizard_engine import runtime
from wizard_engine.parallel import MeshOptions, make_mesh

rt = runtime.start("cpu", timeout_seconds=20)
try:
    make_mesh(MeshOptions(tp=2) if rt.rank == 0 else MeshOptions(cp=2), rt)
except ValueError as error:
    print(f"rank {rt.rank} heard: {error}")
runtime.stop()
"""


def test_ranks_with_other_options_are_refused_on_every_rank(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_ranks(2, tmp_path / "script.py", timeout=60)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        text = f"rank {rank} heard: [rank 1/2] mesh: tp: expected the same on every rank, got 1, and 2 on rank 0"
        assert text in done.stdout


@pytest.mark.parametrize(("what", "number"), [("heads", 6), ("vocab_size", 250), ("ffn_width", 90)])
def test_every_width_that_tp_divides_is_looked_at(simulated, what, number):
    config = dataclasses.replace(PRESETS["tiny-llama"], heads=4, kv_heads=4, head_width=8, vocab_size=256, ffn_width=96)
    with torch.device("meta"):
        model = Transformer(
            dataclasses.replace(config, **{what: number} | ({"kv_heads": 2} if what == "heads" else {}))
        )
    with pytest.raises(ValueError, match=f"mesh.tp must divide {what}: tp=4, {what}={number}; choose from"):
        parallelize(model, simulated(0, 4, tp=4))

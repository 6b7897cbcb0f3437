"""The mesh of ranks, and the only place that makes process groups.

Dense parameters see the ranks as dp_replicate x dp_shard x tp, rank = (replicate * dp_shard + shard) * tp + t; experts
see the same ranks as dp_replicate x efsdp x ep, rank = (replicate * efsdp + f) * ep + e, with efsdp ep = dp_shard tp.
What stands last varies fastest, so that tp and ep stay among neighbours.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..runtime import Runtime


@dataclass(frozen=True)
class MeshOptions:
    """How the ranks are divided; of --mesh.dp-replicate and --mesh.dp-shard, what is left out takes the rest."""

    dp_replicate: int | None = None
    """Copies of the sharded model; default 1, or what --mesh.dp-shard leaves."""
    dp_shard: int | None = None
    """Ranks that divide the parameters, gradients and optimizer state of one copy; default: all that are left."""
    tp: int = 1
    """Ranks that divide each matrix; 1 until there is tensor parallelism."""
    ep: int = 1
    """Ranks that divide the experts of a layer; 1 until there is expert parallelism."""
    timeout_seconds: float = 600.0
    """Longest wait for the other ranks in one collective, seconds."""


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    Attributes:
        size, index: ranks along the axis, and which of them this is.   ranks: theirs in the world.
        group: for gathering (None where the axis has one rank).   reduce: the same ranks behind a communicator of its
            own, so that a gather does not wait for a reduction.
    """

    size: int = 1
    index: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    reduce: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands among all, and its groups.

    shard: ranks that divide one copy of the dense parameters.   replicate: ranks that hold the same part of each copy.
    tp: ranks that divide each matrix.   efsdp, ep: of the experts.   data: ranks with rows of their own (replicate and
    shard together).
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    replicate: Axis = Axis()
    shard: Axis = Axis()
    tp: Axis = Axis()
    efsdp: Axis = Axis()
    ep: Axis = Axis()
    data: Axis = Axis()

    @property
    def shape(self) -> str:
        """`dp_replicate 2 x dp_shard 4 x tp 1, efsdp 4 x ep 1`."""
        return (
            f"dp_replicate {self.replicate.size} x dp_shard {self.shard.size} x tp {self.tp.size}, "
            f"efsdp {self.efsdp.size} x ep {self.ep.size}"
        )


def resolve(options: MeshOptions, world_size: int) -> tuple[int, int, int, int, int]:
    """(dp_replicate, dp_shard, tp, efsdp, ep) of a number of ranks.

    Raises:
        ValueError: a size below 1, or sizes that do not divide the ranks; names the choices that would.
    """
    for name in ("dp_replicate", "dp_shard", "tp", "ep"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"mesh.{name}: expected at least 1, got {value}")
    if world_size % options.tp:
        raise ValueError(
            f"mesh.tp must divide the ranks: tp={options.tp}, ranks={world_size}; choose from {_divisors(world_size)}"
        )
    data = world_size // options.tp
    replicate, shard = options.dp_replicate, options.dp_shard
    if replicate is not None and shard is not None and replicate * shard != data:
        fitting = ", ".join(f"{n} x {data // n}" for n in _divisors(data))
        raise ValueError(
            f"mesh: expected dp_replicate x dp_shard x tp = {world_size} ranks, got {replicate} x {shard} x "
            f"{options.tp} = {replicate * shard * options.tp}; with tp={options.tp} choose dp_replicate x dp_shard "
            f"from {fitting}, or start {replicate * shard * options.tp} ranks"
        )
    for name, value in (("dp_replicate", replicate), ("dp_shard", shard)):
        if value is not None and data % value:
            raise ValueError(
                f"mesh.{name} must divide the ranks of data: {name}={value}, ranks / tp = {data}; choose from "
                f"{_divisors(data)}"
            )
    if replicate is None:
        replicate = 1 if shard is None else data // shard
    shard = data // replicate
    if shard * options.tp % options.ep:
        raise ValueError(
            f"mesh.ep must divide dp_shard x tp: ep={options.ep}, dp_shard x tp = {shard * options.tp}; choose from "
            f"{_divisors(shard * options.tp)}"
        )
    return replicate, shard, options.tp, shard * options.tp // options.ep, options.ep


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def lines(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Ranks of a mesh of this shape in groups that vary along some axes alone; the last axis varies fastest."""
    grid = torch.arange(int(torch.tensor(shape).prod())).view(*shape)
    rest = [axis for axis in range(len(shape)) if axis not in axes]
    width = int(torch.tensor([shape[axis] for axis in axes]).prod())
    return [tuple(row) for row in grid.permute(*rest, *axes).reshape(-1, width).tolist()]


def make_mesh(options: MeshOptions, runtime: Runtime) -> Mesh:
    """The mesh of this run; every rank makes the call, with the same options, once its process group exists.

    Raises:
        ValueError: as `resolve`.
    """
    replicate, shard, tp, efsdp, ep = resolve(options, runtime.world_size)
    timeout = datetime.timedelta(seconds=options.timeout_seconds)
    dense, expert = (replicate, shard, tp), (replicate, efsdp, ep)
    made: dict[tuple, dist.ProcessGroup] = {}

    def axis(shape: tuple[int, ...], axes: tuple[int, ...], *, reduce: bool = False) -> Axis:
        groups = lines(shape, axes)
        own = next(ranks for ranks in groups if runtime.rank in ranks)
        if len(own) == 1:
            return Axis(ranks=own)

        def of(purpose: str) -> dist.ProcessGroup:
            # Every rank makes every group, in one order; groups of the same ranks and purpose are made once.
            for ranks in groups:
                if (ranks, purpose) not in made:
                    world = purpose == "gather" and len(ranks) == runtime.world_size
                    made[ranks, purpose] = dist.group.WORLD if world else dist.new_group(list(ranks), timeout=timeout)
            return made[own, purpose]

        return Axis(len(own), own.index(runtime.rank), own, of("gather"), of("reduce") if reduce else None)

    return Mesh(
        device=runtime.device, rank=runtime.rank, world_size=runtime.world_size, replicate=axis(dense, (0,)),
        shard=axis(dense, (1,), reduce=True), tp=axis(dense, (2,)), efsdp=axis(expert, (1,), reduce=True),
        ep=axis(expert, (2,)), data=axis(dense, (0, 1)),
    )  # fmt: skip

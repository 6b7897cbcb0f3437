"""The mesh of ranks. Process groups are made here only.

For dense parameters the ranks form dp_replicate x dp_shard x cp x tp, the last varying fastest. For experts the same
ranks form dp_replicate x efsdp x ep, with efsdp ep = dp_shard cp tp. The last axis joins neighbouring ranks, which have
the fastest links.

Ranks that differ in cp and tp alone have the same packed rows, each with different tokens of them.
"""

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from wizard_engine.runtime.object_collectives import check_same
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.ranges import Checked, Count, ranged

Seconds = ranged(above=0, high=10**7)


@dataclass(frozen=True)
class MeshOptions(Checked):
    """Sizes of the mesh axes. If --mesh.dp-replicate or --mesh.dp-shard is not set, it takes the remaining ranks."""

    dp_replicate: Count[int | None] = None
    """Copies of the sharded model; default 1, or what --mesh.dp-shard leaves."""
    dp_shard: Count[int | None] = None
    """Ranks that divide the parameters, gradients and optimizer state of one copy; default: all that are left."""
    tp: Count[int] = 1
    """Ranks that divide each matrix and the vocabulary, and the tokens between the products."""
    ep: Count[int] = 1
    """Ranks that divide the experts of a layer; they are taken from dp_shard, cp and tp."""
    cp: Count[int] = 1
    """Ranks that divide the tokens of each packed row, for long documents."""
    timeout_seconds: Seconds[float] = 600.0
    """Longest wait for the other ranks in one collective, seconds."""


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    Attributes:
        size, index: ranks along the axis, and which of them this is.   ranks: their ranks in the world.
        group: for gathers (None where the axis has one rank).   reduce: the same ranks with a second communicator, so
            that a gather does not wait for a reduction.
    """

    size: int = 1
    index: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    reduce: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This rank's position on every axis, with the process groups.

    shard: FSDP of dense parameters (dp_shard and cp).   replicate: ranks with the same shard of different replicas.
    tp: tensor parallelism.   cp: context parallelism.   row: cp and tp; ranks with the same packed rows.
    copy: all ranks of one replica of the model.   efsdp, ep: FSDP and expert parallelism of the experts.
    data: ranks with different packed rows (dp_replicate and dp_shard).
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    replicate: Axis = Axis()
    shard: Axis = Axis()
    tp: Axis = Axis()
    cp: Axis = Axis()
    row: Axis = Axis()
    copy: Axis = Axis()
    efsdp: Axis = Axis()
    ep: Axis = Axis()
    data: Axis = Axis()

    @property
    def shape(self) -> str:
        """`dp_replicate 2 x dp_shard 4 x cp 1 x tp 1, efsdp 4 x ep 1`."""
        return (
            f"dp_replicate {self.replicate.size} x dp_shard {self.shard.size // self.cp.size} x cp {self.cp.size} x tp "
            f"{self.tp.size}, efsdp {self.efsdp.size} x ep {self.ep.size}"
        )

    @property
    def is_row_leader(self) -> bool:
        """Whether this rank is the first of those with the same packed rows, and counts them in sums over ranks."""
        return self.row.index == 0


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the axes of a mesh."""

    replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int

    @property
    def copy(self) -> int:
        """Ranks of one copy of the model."""
        return self.dp_shard * self.cp * self.tp

    @property
    def efsdp(self) -> int:
        """Ranks that divide what an expert-parallel rank has of the experts."""
        return self.copy // self.ep


def resolve(options: MeshOptions, world_size: int) -> MeshShape:
    """The shape of a mesh of a number of ranks.

    Raises:
        ValueError: sizes that do not divide the ranks; names the choices that would.
    """
    left = world_size
    for name in ("tp", "cp"):
        value = getattr(options, name)
        if left % value:
            what = "ranks" if left == world_size else "ranks / tp"
            raise ValueError(
                f"mesh.{name} must divide the {what}: {name}={value}, {what} = {left}; choose from {divisors(left)}"
            )
        left //= value
    replicate, shard, rest = options.dp_replicate, options.dp_shard, options.cp * options.tp
    if replicate is not None and shard is not None and replicate * shard != left:
        fitting = ", ".join(f"{n} x {left // n}" for n in divisors(left))
        raise ValueError(
            f"mesh: expected dp_replicate x dp_shard x cp x tp = {world_size} ranks, got {replicate} x {shard} x "
            f"{options.cp} x {options.tp} = {replicate * shard * rest}; with cp={options.cp} and tp={options.tp} "
            f"choose dp_replicate x dp_shard from {fitting}, or start {replicate * shard * rest} ranks"
        )
    for name, value in (("dp_replicate", replicate), ("dp_shard", shard)):
        if value is not None and left % value:
            raise ValueError(
                f"mesh.{name} must divide the ranks of data: {name}={value}, ranks / (cp x tp) = {left}; choose from "
                f"{divisors(left)}"
            )
    if replicate is None:
        replicate = 1 if shard is None else left // shard
    shape = MeshShape(replicate, left // replicate, options.cp, options.tp, options.ep)
    if shape.copy % options.ep:
        raise ValueError(
            f"mesh.ep must divide dp_shard x cp x tp: ep={options.ep}, dp_shard x cp x tp = {shape.copy}; choose from "
            f"{divisors(shape.copy)}"
        )
    return shape


def divisors(number: int) -> list[int]:
    """Of a number, ascending."""
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
        ValueError: as `resolve`, or on every rank where one has other options.
    """
    if runtime.device.type != "meta":
        check_same(runtime, "mesh", asdict(options))
    shape = resolve(options, runtime.world_size)
    timeout = datetime.timedelta(seconds=options.timeout_seconds)
    dense, expert = (shape.replicate, shape.dp_shard, shape.cp, shape.tp), (shape.replicate, shape.efsdp, shape.ep)
    made: dict[tuple, dist.ProcessGroup] = {}

    def axis(shape: tuple[int, ...], *axes: int, purposes: tuple[str, ...] = ()) -> Axis:
        groups = lines(shape, axes)
        group_ranks = next(ranks for ranks in groups if runtime.rank in ranks)
        if len(group_ranks) == 1:
            return Axis(ranks=group_ranks)

        def of(purpose: str) -> dist.ProcessGroup:
            # Only members create a group (local synchronization), all in the same order. Axes with the same ranks and
            # purpose share one communicator.
            if (group_ranks, purpose) not in made:
                world = purpose == "gather" and len(group_ranks) == runtime.world_size
                local = {"timeout": timeout, "use_local_synchronization": True}
                made[group_ranks, purpose] = dist.group.WORLD if world else dist.new_group(list(group_ranks), **local)
            return made[group_ranks, purpose]

        return Axis(
            len(group_ranks), group_ranks.index(runtime.rank), group_ranks, *(of(purpose) for purpose in purposes)
        )

    # Separate communicators: a collective of tokens must not queue behind one of parameters.
    parameters, tokens = ("gather", "reduce"), ("tokens",)
    return Mesh(
        device=runtime.device,
        rank=runtime.rank,
        world_size=runtime.world_size,
        replicate=axis(dense, 0, purposes=("gather",)),
        shard=axis(dense, 1, 2, purposes=parameters),
        tp=axis(dense, 3, purposes=tokens),
        cp=axis(dense, 2, purposes=tokens),
        row=axis(dense, 2, 3, purposes=tokens),
        copy=axis(dense, 1, 2, 3, purposes=parameters),
        efsdp=axis(expert, 1, purposes=parameters),
        ep=axis(expert, 2, purposes=tokens),
        data=axis(dense, 0, 1),
    )

"""One rank of many, simulated: its collectives and its memory in a training step, without numbers or other ranks.

The process group is torch's fake backend, the tensors are on the meta device, and what runs is the engine itself. What
each rank of a group would wait for can be compared with what the others would: a collective that depends on the rank is
a run that hangs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import use_backend
from wizard_engine.loss import sft_loss
from wizard_engine.parallel.fsdp import Sharded, sharded
from wizard_engine.parallel.mesh import Mesh, MeshOptions, make_mesh
from wizard_engine.parallel.parallelize import Sharding, parallelize
from wizard_engine.runtime.process import Runtime

META = torch.device("meta")
# Collective -> its kind, and which of its arguments has the whole buffer.
WHOLE = {
    "_allgather_base_": ("gather", 0),
    "_reduce_scatter_base_": ("reduce", 1),
    "allreduce_": ("sum", 0),
    "alltoall_base_": ("exchange", 1),
    "broadcast_": ("broadcast", 0),
}


@dataclass(frozen=True)
class Collective:
    """One collective as a rank starts it: kind, ranks of its group, dtype, bytes of the whole buffer.

    Of an exchange the bytes are what this rank sends, which may differ from rank to rank.
    """

    kind: str
    ranks: tuple[int, ...]
    purpose: str
    dtype: torch.dtype
    size: int


class Record(TorchDispatchMode):
    """The collectives of the block, in the order in which they start."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d" and name in WHOLE:
            kind, which = WHOLE[name]
            buffers = args[which] if isinstance(args[which], list | tuple) else [args[which]]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            ranks = tuple(dist.get_process_group_ranks(group))
            size = sum(buffer.nbytes for buffer in buffers)
            self.collectives.append(Collective(kind, ranks, group.group_name, buffers[0].dtype, size))
        return func(*args, **(kwargs or {}))


@contextmanager
def simulated_rank(options: MeshOptions, rank: int, ranks: int) -> Iterator[Mesh]:
    """The mesh as one of many ranks sees it; no other process group may be there.

    Raises:
        ValueError: as `make_mesh`, or a process group exists.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("simulation: expected a process without ranks of its own, got one of several; run it alone")
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield make_mesh(options, Runtime(rank, ranks, 0, META))
    finally:
        dist.destroy_process_group()


def language_step(
    model: Any, tokens: int, micro_batches: int = 1, *, before: Callable[[], None] = lambda: None
) -> None:
    """Forward and backward passes of one training step of a language model on rows of one document, on any device.

    Args:
        before: called before each micro-batch.
    """
    engine = sharded(model)
    weights, positions = torch.ones(tokens, device=engine.device), torch.arange(tokens, device=engine.device)
    ids = positions % model.config.vocab_size
    marks = torch.tensor([0, tokens], dtype=torch.int32, device=engine.device)
    engine.zero_grad(multiple=micro_batches > 1)
    for number in range(micro_batches):
        before()
        engine.reducer.is_last_backward = number + 1 == micro_batches
        hidden = model(ids, positions, marks, tokens)
        loss = sft_loss(hidden, model.head_weight, ids, weights, num_tokens=float(tokens), shard=model.shard).loss
        del hidden
        loss.backward()
    engine.finish()


def record(
    build: Callable[[], Any],
    options: MeshOptions,
    rank: int,
    ranks: int,
    sharding: Sharding,
    *,
    tokens: int,
    micro_batches: int = 1,
) -> list[Collective]:
    """Collectives of a training step of one rank; the norm of the gradient, which ends it, included.

    Args:
        build: gives a plain model on the meta device.
    """
    with simulated_rank(options, rank, ranks) as mesh, use_backend("triton"):
        model = parallelize(build(), mesh, sharding)
        with Record() as calls:
            language_step(model, tokens, micro_batches)
        return calls.collectives


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Name of a process group -> axis of the mesh; of axes with the same ranks, the first that has the group."""
    names: dict[str, str] = {}
    for axis in ("shard", "copy", "efsdp", "replicate", "tp", "cp", "ep", "row"):
        value = getattr(mesh, axis)
        for group in (value.group, value.reduce):
            if group is not None:
                names.setdefault(group.group_name, axis)
    return names


def by_axis(collectives: Iterable[Collective], mesh: Mesh) -> dict[tuple[str, str], int]:
    """(kind, axis of the mesh) -> bytes, by `axis_names`."""
    names = axis_names(mesh)
    sums: dict[tuple[str, str], int] = {}
    for one in collectives:
        key = one.kind, names.get(one.purpose, "world")
        sums[key] = sums.get(key, 0) + one.size
    return sums


def by_ranks(traffic: dict[tuple[str, str], int], mesh: Mesh) -> dict[tuple[str, tuple[int, ...]], int]:
    """(kind, ranks) -> bytes, of what `by_axis` or an estimate says: axes of the same ranks count as one."""
    sums: dict[tuple[str, tuple[int, ...]], int] = {}
    for (kind, name), size in traffic.items():
        key = kind, getattr(mesh, name).ranks
        sums[key] = sums.get(key, 0) + size
    return sums


def first_difference(records: dict[int, list[Collective]]) -> str:
    """What two ranks of a group would wait for each other with, in words; "" where all ranks fit.

    Args:
        records: rank -> its collectives; groups are compared among the ranks that are there.
    """
    first: dict[tuple, tuple[int, list[Collective]]] = {}
    for rank, calls in sorted(records.items()):
        of_group: dict[tuple, list[Collective]] = {}
        for one in calls:
            of_group.setdefault((one.ranks, one.purpose), []).append(one)
        for group in {*of_group, *(known for known in first if rank in known[0])}:
            mine = of_group.get(group, [])
            # A rank that never uses a group differs from those that do.
            lowest = next((r for r in group[0] if r in records), rank)
            other, theirs = first.setdefault(group, (rank, mine) if lowest == rank else (lowest, []))
            difference = _difference(theirs, mine, group[0])
            if difference:
                return f"ranks {other} and {rank}: {difference}"
    return ""


def _difference(first: list[Collective], second: list[Collective], ranks: tuple[int, ...]) -> str:
    """Where the collectives of two ranks on one group part."""
    for number, (a, b) in enumerate(zip(first, second)):
        same_size = a.size == b.size or a.kind == "exchange"
        if (a.kind, a.dtype) != (b.kind, b.dtype) or not same_size:
            return f"collective {number} of group {_short(ranks)}: {_described(a)} against {_described(b)}"
    if len(first) != len(second):
        return f"{len(first)} collectives of group {_short(ranks)} against {len(second)}"
    return ""


def _described(one: Collective) -> str:
    return f"{one.kind} of {one.size} bytes in {str(one.dtype).removeprefix('torch.')}"


def _short(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks[:4])) + (f", ... ({len(ranks)} ranks)" if len(ranks) > 4 else "")


def peak_bytes(model: Any, optimizer: Any, tokens: int, micro_batches: int = 1) -> int:
    """Largest memory of a rank in a training step as torch's own tracker sees it, bytes; kernels' workspace aside."""
    from torch.distributed._tools.mem_tracker import MemTracker

    engine: Sharded = sharded(model)
    tracker = MemTracker()
    buffers = {id(unit.gather_buffer): unit.gather_buffer.data for unit in (*engine.units, *engine.resident)}
    state: list[Tensor] = [engine.master, optimizer.exp_avg, optimizer.exp_avg_sq, *engine.copies]
    if not engine.is_sharded:
        state += [flat.gradient for flat in engine.training if flat.gradient is not None]
    tracker.track_external(*state, *(buffer for buffer in buffers.values() if buffer is not None))
    # The step may replace some of them.
    del state
    with tracker, use_backend("triton"):
        language_step(model, tokens, micro_batches, before=tracker.reset_mod_stats)
    return tracker.get_tracker_snapshot("peak")[engine.device]["Total"]

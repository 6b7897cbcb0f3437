"""Statistics and objects over all ranks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import from_host

from ..runtime import Runtime
from .mesh import Axis, Mesh

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether more than one rank takes part."""
    return dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(numbers: dict[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """Each number summed over the ranks, in float64."""
    if not is_distributed():
        return dict(numbers)
    packed = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(numbers, packed.tolist()))


def sum_over_rows(numbers: dict[str, float], mesh: Mesh, **flags: bool) -> dict[str, float]:
    """Each number summed in float64 over the ranks with rows of their own: of those that share rows, one counts.

    Args:
        flags: summed over all ranks, in the same collective.
    """
    own = {name: float(x) if mesh.speaks else 0.0 for name, x in numbers.items()}
    return sum_over_ranks(own | {name: float(flag) for name, flag in flags.items()}, mesh.device)


def pack(numbers: Iterable[Tensor | float], device: torch.device) -> Tensor:
    """(N,) fp64 on a device: numbers of the host and tensors there, flattened end to end, without a wait for it."""
    numbers = list(numbers)
    host = from_host([0.0 if isinstance(x, Tensor) else float(x) for x in numbers], torch.float64, device)
    pieces = [x.detach().reshape(-1) if isinstance(x, Tensor) else host[i : i + 1] for i, x in enumerate(numbers)]
    return torch.cat([piece.to(device, torch.float64, non_blocking=True) for piece in pieces])


def pack_over_rows(numbers: Mapping[str, Tensor | float], mesh: Mesh, *everywhere: Tensor | float) -> Tensor:
    """(N,) fp64 on the device: each number summed over the ranks with rows of their own, in the order of the mapping,
    the same on every rank; without a wait for the device.

    Args:
        everywhere: summed over all ranks, in the same collective; they stand behind the numbers.
    """
    packed = pack([*(x if mesh.speaks else 0.0 for x in numbers.values()), *everywhere], mesh.device)
    if is_distributed():
        dist.all_reduce(packed)
    return packed


def gather_objects(local: object, axis: Axis | None = None) -> list:
    """Every rank's JSON-like object, in rank order, on every rank; of all ranks, or of those of an axis of the mesh."""
    if (axis is not None and axis.size == 1) or not is_distributed():
        return [local]
    group = None if axis is None else axis.group
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, local, group=group)
    return gathered


def with_names_of_all_ranks(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers in one order on every rank, with 0 for what only other ranks have: a rank may be without rows."""
    names = dict.fromkeys(name for names in gather_objects(list(numbers)) for name in names)
    return {name: numbers.get(name, 0.0) for name in names}


def first_error(error: Exception | None, runtime: Runtime) -> str:
    """The first rank's error with that rank in front, on every rank; "" where no rank has one."""
    own = None if error is None else getattr(error, "strerror", None) or str(error) or repr(error)
    if runtime.world_size == 1:
        return own or ""
    for rank, text in enumerate(gather_objects(own)):
        if text is not None:
            return f"[rank {rank}/{runtime.world_size}] {text}"
    return ""


def from_main(runtime: Runtime, work: Callable[[], T]) -> T:
    """The result of `work`, done by rank 0 alone and sent to every rank; its ValueError or OSError is raised on every
    rank, as ValueError on those where it did not happen."""
    if runtime.world_size == 1:
        return work()
    outcome: list[Any] = [None, None]
    if runtime.is_main:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = f"{error}"
    dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise ValueError(f"[rank 0/{runtime.world_size}] {outcome[1]}")
    return outcome[0]


def check_same(runtime: Runtime, what: str, value: Any) -> None:
    """ValueError on every rank, naming the first that differs from most, unless a value is the same everywhere.

    Of mappings, nested ones too, the entry that differs is named.
    """
    if runtime.world_size == 1:
        return
    found = gather_objects(value)
    usual = max(found, key=found.count)
    for rank, other in enumerate(found):
        if other != usual:
            where, own, theirs = _difference(what, other, usual)
            raise ValueError(
                f"[rank {rank}/{runtime.world_size}] {where}: expected the same on every rank, got {_short(own)}, and "
                f"{_short(theirs)} on rank {found.index(usual)}; start every rank with the same options and files"
            )


def _difference(what: str, own: Any, theirs: Any) -> tuple[str, Any, Any]:
    """The first entry in which two values differ: its name, and what it is in both."""
    if isinstance(own, dict) and isinstance(theirs, dict):
        for key in {**own, **theirs}:
            if own.get(key) != theirs.get(key):
                return _difference(f"{what}: {key}", own.get(key), theirs.get(key))
    return what, own, theirs


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."

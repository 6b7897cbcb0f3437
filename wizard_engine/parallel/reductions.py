"""Sums over ranks, and objects along an axis of the mesh."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backend import from_host
from wizard_engine.runtime.object_collectives import gather_objects, is_distributed

from .mesh import Axis, Mesh


def sum_over_ranks(numbers: dict[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """Each number summed over the ranks, in float64."""
    if not is_distributed():
        return dict(numbers)
    packed = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(numbers, packed.tolist()))


def sum_over_rows(numbers: dict[str, float], mesh: Mesh, **flags: bool) -> dict[str, float]:
    """Each number summed in float64 over the data ranks: of the ranks that share packed rows, the leader counts.

    Args:
        flags: summed over all ranks, in the same collective.
    """
    counted = {name: float(x) if mesh.is_row_leader else 0.0 for name, x in numbers.items()}
    return sum_over_ranks(counted | {name: float(flag) for name, flag in flags.items()}, mesh.device)


def pack(numbers: Iterable[Tensor | float], device: torch.device) -> Tensor:
    """(N,) fp64 on a device: host numbers and device tensors, flattened end to end; the host does not wait."""
    numbers = list(numbers)
    host = from_host([0.0 if isinstance(x, Tensor) else float(x) for x in numbers], torch.float64, device)
    pieces = [x.detach().reshape(-1) if isinstance(x, Tensor) else host[i : i + 1] for i, x in enumerate(numbers)]
    return torch.cat([piece.to(device, torch.float64, non_blocking=True) for piece in pieces])


def pack_over_rows(numbers: Mapping[str, Tensor | float], mesh: Mesh, *everywhere: Tensor | float) -> Tensor:
    """(N,) fp64 on the device, the same on every rank: each number summed over the data ranks, in the order of the
    mapping. The host does not wait.

    Args:
        everywhere: summed over all ranks, in the same collective; they follow the numbers.
    """
    packed = pack([*(x if mesh.is_row_leader else 0.0 for x in numbers.values()), *everywhere], mesh.device)
    if is_distributed():
        dist.all_reduce(packed)
    return packed


def gather_along(axis: Axis, local: object) -> list:
    """Every rank's JSON-like object along an axis of the mesh, in rank order, on every rank of it."""
    return [local] if axis.size == 1 else gather_objects(local, axis.group)

"""Replicated data parallelism: equal weights on every rank, gradients and statistics summed."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether more than one rank takes part."""
    return dist.is_initialized() and dist.get_world_size() > 1


def sum_gradients(gradients: Iterable[Tensor]) -> None:
    """All-reduce (SUM) of flat gradient buffers, in place; nothing on one rank."""
    if is_distributed():
        for gradient in gradients:
            dist.all_reduce(gradient)


def sum_over_ranks(numbers: dict[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """Each number summed over the ranks, in float64."""
    if not is_distributed():
        return dict(numbers)
    packed = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(numbers, packed.tolist()))


@torch.no_grad()
def broadcast_parameters(model: nn.Module) -> None:
    """Rank 0's parameters to every rank."""
    if is_distributed():
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)


def gather_objects(local: object) -> list:
    """Every rank's JSON-like object, in rank order, on every rank."""
    if not is_distributed():
        return [local]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    return gathered


def with_names_of_all_ranks(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers in one order on every rank, with 0 for what only other ranks have: a rank may be without rows."""
    names = dict.fromkeys(name for names in gather_objects(list(numbers)) for name in names)
    return {name: numbers.get(name, 0.0) for name in names}

"""Collectives of Python objects: gather, broadcast from rank 0, comparison; errors raised on every rank."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from .process import Runtime

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether more than one rank takes part."""
    return dist.is_initialized() and dist.get_world_size() > 1


def gather_objects(local: object, group: dist.ProcessGroup | None = None) -> list:
    """The JSON-like objects of all ranks, or of a group's ranks, in rank order, on every rank."""
    if not is_distributed():
        return [local]
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, local, group=group)
    return gathered


def with_names_of_all_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics in the same order on every rank, 0 for names that only other ranks have. A rank may have no rows."""
    names = dict.fromkeys(name for names in gather_objects(list(metrics)) for name in names)
    return {name: metrics.get(name, 0.0) for name in names}


def first_error(error: Exception | None, runtime: Runtime) -> str:
    """The error of the first rank that has one, prefixed with that rank, on every rank; "" without an error."""
    message = None if error is None else getattr(error, "strerror", None) or str(error) or repr(error)
    if runtime.world_size == 1:
        return message or ""
    for rank, text in enumerate(gather_objects(message)):
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
        where = "" if outcome[1].startswith("[rank ") else f"[rank 0/{runtime.world_size}] "
        raise ValueError(f"{where}{outcome[1]}")
    return outcome[0]


def check_same(runtime: Runtime, what: str, value: Any) -> None:
    """Raises ValueError on every rank unless a value is the same on all of them.

    The error names the first rank that differs from the majority, and for (nested) mappings the entry that differs.
    """
    if runtime.world_size == 1:
        return
    values = gather_objects(value)
    usual = max(values, key=values.count)
    for rank, other in enumerate(values):
        if other != usual:
            where, differing, common = _difference(what, other, usual)
            raise ValueError(
                f"[rank {rank}/{runtime.world_size}] {where}: expected the same on every rank, got "
                f"{_short(differing)}, and {_short(common)} on rank {values.index(usual)}; start every rank with the "
                "same options and files"
            )


def _difference(what: str, value: Any, other: Any) -> tuple[str, Any, Any]:
    """The first entry in which two values differ: its name, and its value in both."""
    if isinstance(value, dict) and isinstance(other, dict):
        for key in {**value, **other}:
            if value.get(key) != other.get(key):
                return _difference(f"{what}: {key}", value.get(key), other.get(key))
    return what, value, other


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."

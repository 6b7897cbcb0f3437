"""The one place that launches Triton kernels, and can record launches instead, for compiling them ahead of time.

Triton compiles another variant of a kernel where an integer argument is 1 or divisible by 16. Counts (tokens,
sequences, programs, tile slots, pages) change from step to step: they stand in `do_not_specialize`. Strides are
specialised, since a row stride that 16 divides makes wide loads and stores. A model's widths fix those of activations
and weights; those that grow with tokens (log-sum-exp, delta) or chunks of a vocabulary (its gradients) are of whole
blocks. Numbers that are not counts are floats: a plain 0 or 1 would be another type.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_recorded: list["Launch"] | None = None
_observer: Callable[["Launch"], None] | None = None


@dataclass(frozen=True)
class Launch:
    """One launch: kernel, grid, its run-time arguments in order, and constexprs with num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of running them; tensors may be on the meta device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@contextmanager
def observe(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Tell `observer` of every launch of the block, after it."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options) on the device of its tensors; nothing where the grid is empty.

    Args:
        arguments: run-time arguments (tensors, descriptors, numbers, None) in the kernel's order.
        options: constexprs by name, num_warps, num_stages.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, options))
        return
    if 0 in grid:
        return
    tensor = next(x for x in arguments if isinstance(x, Tensor))
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)
    if _observer is not None:
        _observer(Launch(kernel, grid, arguments, options))


def named(operation: str, *constants: str) -> Callable[[Any], str]:
    """A kernel's name in traces and profiles: the operation with the values of some constexprs.

    For `triton.jit(repr=...)`: `attention_forward_128_128_rotated` says what was launched.
    """

    def name(specialization: Any) -> str:
        values = (specialization.constants.get(constant) for constant in constants)
        return "_".join([operation, *(str(value) for value in values)])

    return name

"""Euclidean norm of the gradient: two launches, whatever the number of buffers and elements."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from .backend import runs_triton, same_device

# Elements of a partial sum: one fp32 sum over a large buffer is off by 1e-4 at 4M and 4e-3 at 50M elements.
CHUNK = 2**16
DTYPES = (torch.float32, torch.bfloat16)


def chunk_norms_reference(grads: Iterable[Tensor]) -> Tensor:
    """(N,) norms of the chunks of the buffers, each in at least fp32; any device and float dtype."""
    return torch.stack([_wide(chunk).norm() for grad in grads for chunk in grad.split(CHUNK)])


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


@torch.library.custom_op("wizard_engine::grad_squares", mutates_args=())
def _sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    from ._grad_norm import chunk_squares

    return chunk_squares(grads, CHUNK).sum(dtype=torch.float64)


@_sum_of_squares.register_fake
def _(grads):
    return grads[0].new_empty((), dtype=torch.float64)


@torch.no_grad()
def grad_norm(grads: Iterable[Tensor], *, reduce: Callable[[Tensor], object] | None = None) -> Tensor:
    """Euclidean norm of all buffers together.

    norm = sqrt(sum_i g_i^2), chunks of 65,536 elements summed in fp32, their sums in fp64 (on the CPU in fp32 without
    `reduce`); run twice, the bits are the same.

    Args:
        grads: (P,) each, fp32 or bf16 (on the CPU any float dtype), contiguous, on one device; taken one after the
            other on the CPU, so that an iterator may wait for each of them.
        reduce: adds a () fp64 sum of squares up over ranks in place; None where these are all there are.
    Returns:
        () fp64 on the device of the gradients, without a wait for it.
    Raises:
        ValueError: no buffers, other dtypes, devices or strides.
    """
    grads = iter(grads)
    first = next(grads, None)
    if first is None:
        raise ValueError("grads: expected at least one buffer, got none")
    grads = chain([first], grads)
    if not runs_triton(first, "grads"):
        norms = chunk_norms_reference(grads)
        if reduce is None:
            return norms.norm().double()
        total = norms.double().square().sum()
    else:
        total = _sum_of_squares(list(_checked(grads, first)))
    if reduce is not None:
        reduce(total)
    return total.sqrt()


def _checked(grads: Iterable[Tensor], first: Tensor) -> Iterator[Tensor]:
    for grad in grads:
        if grad.dtype not in DTYPES:
            raise ValueError(f"grads: expected float32 or bfloat16, got {str(grad.dtype).removeprefix('torch.')}")
        if grad.dim() != 1 or not grad.is_contiguous():
            raise ValueError(f"grads: expected contiguous buffers of one dim, got {tuple(grad.shape)}")
        same_device(grads=first, grad=grad)
        yield grad

"""Kernel of the gradient norm: sums of squares of many buffers in one launch.

Program (c, b) adds the squares of chunk c of buffer b in fp32 and stores one number. A table on the device has each
buffer's address, length and bytes per element, so the number of launches does not depend on the number of buffers. The
caller adds the chunks in fp64, in one order.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import from_host
from .configuration import configuration
from .launch import launch, named


@triton.jit
def _add_squares(
    total, pointer, first, count, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """(BLOCK,) sums, each of every BLOCK-th square of a chunk."""
    for start in range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        elements = pointer + at
        if ALIGNED:
            # The compiler cannot see the alignment of an address that was loaded; without the hint, loads are one
            # element wide.
            elements = tl.multiple_of(elements, 16)
        if MASKED:
            x = tl.load(elements, mask=at < count, other=0.0).to(tl.float32)
        else:
            x = tl.load(elements).to(tl.float32)
        total += x * x
    return total


@triton.jit
def _squares(total, pointer, first, count, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """`_add_squares` with masks only where the chunk is the buffer's last one."""
    if first + CHUNK <= count:
        total = _add_squares(total, pointer, first, count, ALIGNED, CHUNK, BLOCK, False)
    else:
        total = _add_squares(total, pointer, first, count, ALIGNED, CHUNK, BLOCK, True)
    return total


@triton.jit(repr=named("grad_norm", "BLOCK", "ALIGNED"))
def grad_norm_kernel(table, sums, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    # A row of the table: address, elements, bytes of an element. A chunk after the end of a short buffer stores 0.
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    address = tl.load(table + row * 3)
    count = tl.load(table + row * 3 + 1)
    first = chunk * CHUNK
    total = tl.zeros((BLOCK,), tl.float32)
    if first < count:
        if tl.load(table + row * 3 + 2) == 2:
            bf16 = address.to(tl.pointer_type(tl.bfloat16))
            total = _squares(total, bf16, first, count, ALIGNED, CHUNK, BLOCK)
        else:
            fp32 = address.to(tl.pointer_type(tl.float32))
            total = _squares(total, fp32, first, count, ALIGNED, CHUNK, BLOCK)
    tl.store(sums + row * tl.num_programs(0).to(tl.int64) + chunk, tl.sum(total, 0))


@lru_cache(maxsize=16)
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The table on a device, cached: buffers that keep their addresses need no new copy."""
    return from_host(numbers, torch.int64, device)


def chunk_squares(grads: Sequence[Tensor], chunk: int) -> Tensor:
    """(N,) fp32: sums of squares of chunks of the buffers, 0 for those that a shorter buffer lacks."""
    device = grads[0].device
    config = configuration("grad_norm", device)
    grid = triton.cdiv(max(grad.numel() for grad in grads), chunk), len(grads)
    sums = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=device)
    aligned = all(grad.data_ptr() % 16 == 0 for grad in grads)
    entries = tuple(x for grad in grads for x in (grad.data_ptr(), grad.numel(), grad.element_size()))
    # In a trace the tensors are stand-ins: their table must not enter the cache.
    make_table = _table if type(grads[0]) is Tensor and not grads[0].is_meta else _table.__wrapped__
    launch(grad_norm_kernel, grid, make_table(entries, device), sums, ALIGNED=aligned, CHUNK=chunk, **config)
    return sums

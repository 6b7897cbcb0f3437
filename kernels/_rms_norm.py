"""Kernels of RMS norm; statistics in fp32, no atomics.

`rms_norm_forward_kernel`: one program takes BLOCK_ROWS whole rows. It adds the residual, rounds the sum to the dtype of
x (that is what the next layer reads), normalises what was rounded, and stores y and rstd. Rows are read once.

`rms_norm_backward_kernel`: a fixed number of programs, each of which walks over every n-th row block, n programs:

    w = dy * weight,  n = s * rstd:    ds = rstd (w - n mean(w n)) + dstream,    dweight = sum over rows of dy n

It keeps its part of dweight in registers and stores it once, (programs, D). `rms_norm_reduce_kernel` adds the parts in
one order, so two runs on a device give the same bits.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

MIN_BLOCK_WIDTH = 16
# Multiprocessors to assume without a GPU: few, so that each program of the backward walks over more than one block.
INTERPRETED_PROGRAMS = 3


@triton.jit(repr=named("rms_norm_forward", "WIDTH", "BLOCK_ROWS"), do_not_specialize=["rows"])
def rms_norm_forward_kernel(
    x,
    residual,
    weight,
    y,
    stream,
    rstd,
    rows,
    epsilon,
    stride_x,
    stride_residual,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = row.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (row < rows)[:, None]
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (column < WIDTH)
    values = tl.load(x + start * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        # The statistics are those of the rounded sum, as in eager code that adds first.
        values += tl.load(residual + start * stride_residual + column, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)
        tl.store(stream + start * WIDTH + column, rounded, mask=mask)
        values = rounded.to(tl.float32)
    row_rstd = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + epsilon)
    tl.store(rstd + row, row_rstd, mask=row < rows)
    weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    # Rounded before the weight is applied, as in Llama.
    normed = (values * row_rstd[:, None]).to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + start * WIDTH + column, (normed * weights).to(x.dtype.element_ty), mask=mask)


@triton.jit(repr=named("rms_norm_backward", "WIDTH", "BLOCK_ROWS"), do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dy,
    dstream,
    stream,
    weight,
    rstd,
    dx,
    partial,
    rows,
    stride_dy,
    stride_dstream,
    stride_stream,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    REREAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    if not REREAD:
        weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    # `dweight` keeps a sum for each row of a block; these are added once, after the loop.
    for block in tl.range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        start = row.to(tl.int64)[:, None]
        mask = (row < rows)[:, None]
        if WIDTH != BLOCK_WIDTH:
            mask = mask & (column < WIDTH)
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        at_dy = dy + start * stride_dy + column
        at_stream = stream + start * stride_stream + column
        dy_tile = tl.load(at_dy, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(at_stream, mask=mask, other=0.0).to(tl.float32) * row_rstd
        if REREAD:
            weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        weighted = dy_tile * weights
        mean = tl.sum(weighted * normed, 1)[:, None] / WIDTH
        if REREAD:
            # Read again, from the cache: the widest rows do not fit into registers beside the sums. The other eviction
            # policy keeps the compiler from merging this load with the first.
            dy_tile = tl.load(at_dy, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            values = tl.load(at_stream, mask=mask, other=0.0, eviction_policy="evict_first")
            normed = values.to(tl.float32) * row_rstd
            weights = tl.load(weight + column, mask=column < WIDTH, other=0.0, eviction_policy="evict_last")
            weighted = dy_tile * weights.to(tl.float32)
        dweight += dy_tile * normed
        dx_tile = (weighted - normed * mean) * row_rstd
        if dstream is not None:
            dx_tile += tl.load(dstream + start * stride_dstream + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + start * WIDTH + column, dx_tile.to(dx.dtype.element_ty), mask=mask)
    at = partial + program.to(tl.int64) * WIDTH + tl.arange(0, BLOCK_WIDTH)
    tl.store(at, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK_WIDTH) < WIDTH)


@triton.jit(repr=named("rms_norm_reduce", "WIDTH"), do_not_specialize=["programs"])
def rms_norm_reduce_kernel(
    partial, dweight, programs, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for first in range(0, programs, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        mask = (row < programs)[:, None] & (column < WIDTH)[None, :]
        sums += tl.load(partial + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    tl.store(dweight + column, tl.sum(sums, 0).to(dweight.dtype.element_ty), mask=column < WIDTH)


def shape_class(x: Tensor) -> dict[str, int]:
    """Keys of the tables: columns of a tile, the next power of two, and bytes of an element."""
    return {"width": max(MIN_BLOCK_WIDTH, triton.next_power_of_2(x.shape[-1])), "bytes": x.element_size()}


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; INTERPRETED_PROGRAMS elsewhere."""
    return _multiprocessors(device.index or 0) if device.type == "cuda" else INTERPRETED_PROGRAMS


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def rms_norm_forward(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D), the sum with the residual (T, D) (empty without one) and rstd (T,) fp32, of x (T, D)."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    stream = torch.empty((0 if residual is None else rows, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    shape = shape_class(x)
    config = configuration("rms_norm_forward", x.device, **shape)
    launch(
        rms_norm_forward_kernel,
        (triton.cdiv(rows, config["BLOCK_ROWS"]),),
        x,
        residual,
        weight,
        y,
        stream,
        rstd,
        rows,
        float(epsilon),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        WIDTH=width,
        BLOCK_WIDTH=shape["width"],
        **config,
    )
    return y, stream, rstd


def rms_norm_backward(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (T, D) and of the weight (D,), from dy (T, D) and, if the sum was used, dstream (T, D)."""
    rows, width = stream.shape
    shape = shape_class(stream)
    config = dict(configuration("rms_norm_backward", stream.device, **shape))
    most = multiprocessors(stream.device) * config.pop("PROGRAMS")
    programs = min(triton.cdiv(rows, config["BLOCK_ROWS"]), most)
    dx = torch.empty((rows, width), dtype=stream.dtype, device=stream.device)
    partial = torch.empty((programs, width), dtype=torch.float32, device=stream.device)
    dweight = torch.empty((width,), dtype=weight.dtype, device=stream.device)
    launch(
        rms_norm_backward_kernel,
        (programs,),
        dy,
        dstream,
        stream,
        weight,
        rstd,
        dx,
        partial,
        rows,
        dy.stride(0),
        0 if dstream is None else dstream.stride(0),
        stream.stride(0),
        WIDTH=width,
        BLOCK_WIDTH=shape["width"],
        STAGES=config["num_stages"],
        **config,
    )
    config = configuration("rms_norm_reduce", stream.device)
    launch(
        rms_norm_reduce_kernel,
        (triton.cdiv(width, config["BLOCK_WIDTH"]),),
        partial,
        dweight,
        programs,
        WIDTH=width,
        **config,
    )
    return dx, dweight

"""Kernels of SwiGLU: elementwise over tiles of gate and up, in fp32; the backward computes the sigmoid again.

dup = dy silu(gate)        dgate = dy up (sigmoid + silu (1 - sigmoid))
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

MIN_BLOCK_WIDTH, MAX_BLOCK_WIDTH = 16, 2048


@triton.jit
def _tile(rows, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Rows (BLOCK_ROWS, 1) int64 and columns (1, BLOCK_WIDTH) of this program, and the mask of its elements.

    Rows are 64-bit because rows times the stride may pass 2^31 elements.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    program = tl.program_id(0)
    row = program // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % blocks * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    mask = (row < rows)[:, None]
    if WIDTH % BLOCK_WIDTH != 0:
        mask = mask & (column < WIDTH)[None, :]
    return row.to(tl.int64)[:, None], column[None, :], mask


@triton.jit(repr=named("swiglu_forward", "WIDTH"), do_not_specialize=["rows"])
def swiglu_forward_kernel(
    gate_up, out, rows, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    row, column, mask = _tile(rows, WIDTH, BLOCK_WIDTH, BLOCK_ROWS)
    at = gate_up + row * stride + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(repr=named("swiglu_backward", "WIDTH"), do_not_specialize=["rows"])
def swiglu_backward_kernel(
    dy,
    gate_up,
    dgate_up,
    rows,
    stride_dy,
    stride,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row, column, mask = _tile(rows, WIDTH, BLOCK_WIDTH, BLOCK_ROWS)
    at = gate_up + row * stride + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dy + row * stride_dy + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = dout * up * (sigmoid + silu * (1.0 - sigmoid))
    to = dgate_up + row * (2 * WIDTH) + column
    tl.store(to, dgate.to(dgate_up.dtype.element_ty), mask=mask)
    tl.store(to + WIDTH, (dout * silu).to(dgate_up.dtype.element_ty), mask=mask)


def shape_class(gate_up: Tensor) -> dict[str, int]:
    """Keys of the tables: columns of a tile, the next power of two up to 2048, and bytes of an element."""
    width = triton.next_power_of_2(gate_up.shape[-1] // 2)
    return {"width": min(max(width, MIN_BLOCK_WIDTH), MAX_BLOCK_WIDTH), "bytes": gate_up.element_size()}


def _grid(rows: int, width: int, config: dict) -> tuple[int]:
    return (triton.cdiv(rows, config["BLOCK_ROWS"]) * triton.cdiv(width, config["BLOCK_WIDTH"]),)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """(T, F) of gate_up (T, 2F)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    config = configuration("swiglu_forward", gate_up.device, **shape_class(gate_up))
    launch(
        swiglu_forward_kernel, _grid(rows, width, config), gate_up, out, rows, gate_up.stride(0), WIDTH=width, **config
    )
    return out


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient (T, 2F) of gate_up, from dy (T, F)."""
    rows, width = dy.shape
    dgate_up = torch.empty((rows, 2 * width), dtype=gate_up.dtype, device=gate_up.device)
    config = configuration("swiglu_backward", gate_up.device, **shape_class(gate_up))
    launch(
        swiglu_backward_kernel,
        _grid(rows, width, config),
        dy,
        gate_up,
        dgate_up,
        rows,
        dy.stride(0),
        gate_up.stride(0),
        WIDTH=width,
        **config,
    )
    return dgate_up

"""Kernels between tokens and the sorted rows of experts: `moe_permute` copies tokens to rows, `moe_combine` sums rows.

One program of either takes BLOCK_ROWS rows and BLOCK_WIDTH columns of its output. `moe_combine` gathers the rows of a
token and adds them in fp32 in the order of its choices; so no program writes where another does, and there are no
atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named


@triton.jit
def _tile(rows, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Rows (BLOCK_ROWS,) and columns (BLOCK_WIDTH,) of this program, and the masks of its rows and elements."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    row = tl.program_id(0) // BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % BLOCKS * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    row_mask = row < rows
    mask = row_mask[:, None]
    if WIDTH % BLOCK_WIDTH != 0:
        mask = mask & (column < WIDTH)[None, :]
    return row, column, row_mask, mask


@triton.jit(repr=named("moe_combine", "WIDTH", "CHOICES"), do_not_specialize=["tokens"])
def moe_combine_kernel(
    rows,
    gates,
    positions,
    out,
    tokens,
    WIDTH: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    token, column, row_mask, mask = _tile(tokens, WIDTH, BLOCK_WIDTH, BLOCK_ROWS)
    pair = token.to(tl.int64) * CHOICES
    acc = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for choice in tl.static_range(CHOICES):
        # 64-bit: rows times the width may pass 2^31 elements.
        position = tl.load(positions + pair + choice, mask=row_mask, other=0).to(tl.int64)
        expert_row = tl.load(rows + position[:, None] * WIDTH + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if gates is None:
            acc += expert_row
        else:
            acc += tl.load(gates + pair + choice, mask=row_mask, other=0.0)[:, None] * expert_row
    tl.store(out + token.to(tl.int64)[:, None] * WIDTH + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(repr=named("moe_permute", "WIDTH"), do_not_specialize=["total"])
def moe_permute_kernel(
    x,
    index,
    out,
    total,
    stride,
    WIDTH: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row, column, row_mask, mask = _tile(total, WIDTH, BLOCK_WIDTH, BLOCK_ROWS)
    token = (tl.load(index + row, mask=row_mask, other=0) // CHOICES).to(tl.int64)
    value = tl.load(x + token[:, None] * stride + column[None, :], mask=mask, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * WIDTH + column[None, :], value, mask=mask)


def _grid(rows: int, width: int, config: dict) -> tuple[int]:
    return (triton.cdiv(rows, config["BLOCK_ROWS"]) * triton.cdiv(width, config["BLOCK_WIDTH"]),)


def moe_combine(rows: Tensor, gates: Tensor | None, positions: Tensor) -> Tensor:
    """(T, D): the sum over a token's choices of its rows (R, D), each times its gate (T, A) unless gates is None."""
    (tokens, choices), width = positions.shape, rows.shape[1]
    config = configuration("moe_combine", rows.device, bytes=rows.element_size())
    out = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)
    launch(
        moe_combine_kernel,
        _grid(tokens, width, config),
        rows,
        gates,
        positions,
        out,
        tokens,
        WIDTH=width,
        CHOICES=choices,
        **config,
    )
    return out


def moe_permute(x: Tensor, index: Tensor, choices: int) -> Tensor:
    """(R, D): x[index // choices]."""
    width, total = x.shape[1], index.numel()
    config = configuration("moe_permute", x.device, bytes=x.element_size())
    out = torch.empty((total, width), dtype=x.dtype, device=x.device)
    launch(
        moe_permute_kernel,
        _grid(total, width, config),
        x,
        index,
        out,
        total,
        x.stride(0),
        WIDTH=width,
        CHOICES=choices,
        **config,
    )
    return out

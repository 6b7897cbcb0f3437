"""Kernels of grouped products (grouped GEMM): each expert's matrix times the rows of its tokens, with fused epilogues.

Rows of expert e are contiguous: offsets[e] to offsets[e + 1]. A tile of the tile table is up to TILE rows of one.
The grid covers the table's fixed number of slots, so the host never needs the counts.

`grouped_matmul`, `grouped_swiglu`, `grouped_dswiglu`: one program computes BLOCK_M rows of a tile and BLOCK_N columns:

1. Read expert, first row and end from the tile table (`_block`); leave if the slot is empty.
2. Product over the depth, fp32 sums (`_products`). With `index`, rows of x are gathered in the load: entry r of it is
   token * CHOICES + choice.
3. Epilogue in registers: none, SwiGLU, or the gradient of SwiGLU with that of the gate.
4. Store the rows and columns that exist.

`grouped_dweight`: one program computes a block of one expert's matrix gradient and walks over the rows of the expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import descriptor, fits_tma, place
from .configuration import configuration
from .expert_tiles import TILE_ROWS
from .launch import launch, named

# Row blocks that run at the same time: their operands stay in L2 while they walk over the columns.
GROUP = 16

_forced_gather: bool | None = None


@triton.jit
def _block(
    tiles,
    offsets,
    slots,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Expert, first row, end of the expert's rows, and first column of this program; row >= end: nothing to do.

    tiles: (2, slots), the expert of each tile and its first row. A tile has PARTS row blocks.
    """
    PARTS: tl.constexpr = TILE // BLOCK_M
    block, column = place(tl.program_id(0), slots * PARTS, (COLUMNS + BLOCK_N - 1) // BLOCK_N, GROUP)
    expert = tl.load(tiles + block // PARTS)
    row = tl.load(tiles + slots + block // PARTS) + block % PARTS * BLOCK_M
    return expert, row, tl.load(offsets + expert + 1), column * BLOCK_N


@triton.jit
def _products(
    x,
    weight,
    index,
    x_tiles,
    weight_tiles,
    expert,
    row,
    end,
    column,
    stride_x,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PAIR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32 products of rows and columns, and where PAIR of columns COLUMNS + column, else 0.

    weight is (E, N, K), or (E, K, N) where TRANSPOSED, N = COLUMNS, or 2 COLUMNS where PAIR. Rows and columns after the
    ends are repeated, or are those of other experts: the caller does not store them.
    """
    ROWS: tl.constexpr = DEPTH if TRANSPOSED else (2 * COLUMNS if PAIR else COLUMNS)
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    depth = tl.arange(0, BLOCK_K)
    # Clamped instead of masked, so that loads need a mask over the depth only.
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
    if index is not None:
        rows = tl.load(index + rows) // CHOICES
    # 64-bit offsets: rows times width, and experts times their matrices, may pass 2^31 elements.
    x_at = x + rows.to(tl.int64)[:, None] * stride_x + depth[None, :]
    columns = tl.minimum(column + tl.arange(0, BLOCK_N), COLUMNS - 1)
    if TRANSPOSED:
        w_at = weight + expert.to(tl.int64) * (DEPTH * COLUMNS) + depth[:, None] * COLUMNS + columns[None, :]
    else:
        w_at = weight + expert.to(tl.int64) * (ROWS * DEPTH) + columns[:, None] * DEPTH + depth[None, :]
    # The descriptor of the weights has experts and rows as one dim, so a tile may reach into the next expert. That is
    # harmless for columns, which are not stored; for the depth of a transposed weight `_config` rules it out.
    for k in tl.range(0, DEPTH, BLOCK_K):
        if TMA and index is None:
            x_MK = x_tiles.load([row, k])
        elif DEPTH % BLOCK_K == 0:
            x_MK = tl.load(x_at + k)
        else:
            x_MK = tl.load(x_at + k, mask=(depth < DEPTH - k)[None, :], other=0.0)
        if TRANSPOSED:
            if TMA:
                w_KN = weight_tiles.load([expert * ROWS + k, column])
            elif DEPTH % BLOCK_K == 0:
                w_KN = tl.load(w_at + k * COLUMNS)
            else:
                w_KN = tl.load(w_at + k * COLUMNS, mask=(depth < DEPTH - k)[:, None], other=0.0)
            first = tl.dot(x_MK, w_KN, first, input_precision=PRECISION)
        else:
            if TMA:
                w_NK = weight_tiles.load([expert * ROWS + column, k])
            elif DEPTH % BLOCK_K == 0:
                w_NK = tl.load(w_at + k)
            else:
                w_NK = tl.load(w_at + k, mask=(depth < DEPTH - k)[None, :], other=0.0)
            first = tl.dot(x_MK, w_NK.T, first, input_precision=PRECISION)
            if PAIR:
                if TMA:
                    v_NK = weight_tiles.load([expert * ROWS + COLUMNS + column, k])
                elif DEPTH % BLOCK_K == 0:
                    v_NK = tl.load(w_at + COLUMNS * DEPTH + k)
                else:
                    v_NK = tl.load(w_at + COLUMNS * DEPTH + k, mask=(depth < DEPTH - k)[None, :], other=0.0)
                second = tl.dot(x_MK, v_NK.T, second, input_precision=PRECISION)
    return first, second


@triton.jit
def _mask(row, end, column, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr):
    """Rows (BLOCK_M, 1) int64, columns (1, BLOCK_N), and a mask of those that exist.

    STEP: columns per program; where it divides COLUMNS, the mask is of rows only.
    """
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    mask = (rows < end)[:, None]
    if COLUMNS % STEP != 0:
        mask = mask & (columns < COLUMNS)[None, :]
    return rows.to(tl.int64)[:, None], columns[None, :], mask


@triton.jit(repr=named("grouped_matmul", "DEPTH", "COLUMNS", "TRANSPOSED"), do_not_specialize=["slots"])
def grouped_matmul_kernel(
    x,
    weight,
    index,
    x_tiles,
    weight_tiles,
    tiles,
    offsets,
    out,
    slots,
    stride_x,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    expert, row, end, column = _block(tiles, offsets, slots, COLUMNS, BLOCK_M, BLOCK_N, TILE, GROUP)
    if row >= end:
        return
    product, _ = _products(
        x,
        weight,
        index,
        x_tiles,
        weight_tiles,
        expert,
        row,
        end,
        column,
        stride_x,
        COLUMNS,
        DEPTH,
        False,
        TRANSPOSED,
        CHOICES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        TMA,
        PRECISION,
    )
    rows, columns, mask = _mask(row, end, column, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_N)
    tl.store(out + rows * COLUMNS + columns, product.to(out.dtype.element_ty), mask=mask)


@triton.jit(repr=named("grouped_swiglu", "DEPTH", "COLUMNS"), do_not_specialize=["slots"])
def grouped_swiglu_kernel(
    x,
    weight,
    index,
    x_tiles,
    weight_tiles,
    tiles,
    offsets,
    gate_up,
    out,
    slots,
    stride_x,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    expert, row, end, column = _block(tiles, offsets, slots, COLUMNS, BLOCK_M, BLOCK_N, TILE, GROUP)
    if row >= end:
        return
    gate, up = _products(
        x,
        weight,
        index,
        x_tiles,
        weight_tiles,
        expert,
        row,
        end,
        column,
        stride_x,
        COLUMNS,
        DEPTH,
        True,
        False,
        CHOICES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        TMA,
        PRECISION,
    )
    rows, columns, mask = _mask(row, end, column, COLUMNS, BLOCK_M, BLOCK_N, BLOCK_N)
    # The activation takes gate and up as they are stored, since the backward starts from the stored numbers.
    gate = gate.to(out.dtype.element_ty)
    up = up.to(out.dtype.element_ty)
    if gate_up is not None:
        tl.store(gate_up + rows * (2 * COLUMNS) + columns, gate, mask=mask)
        tl.store(gate_up + rows * (2 * COLUMNS) + COLUMNS + columns, up, mask=mask)
    gate_fp32 = gate.to(tl.float32)
    hidden = gate_fp32 / (1.0 + tl.exp(-gate_fp32)) * up.to(tl.float32)
    tl.store(out + rows * COLUMNS + columns, hidden.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dswiglu(
    dhidden,
    weight_M,
    gate_up,
    dgate_up,
    gated,
    row,
    end,
    column,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store a tile's dgate, dup and weighted activations; return the tile's part of the gates' gradient, (BLOCK_M,).

    With h = silu(gate) * up and out = sum weight h: dweight = sum_columns dhidden h, and dh = weight dhidden.
    """
    rows, columns, mask = _mask(row, end, column, COLUMNS, BLOCK_M, BLOCK_N, 2 * BLOCK_N)
    at = rows * (2 * COLUMNS) + columns
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + COLUMNS, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    # Elements that do not exist hold products of other experts: they must not enter the row sum.
    dweight_M = tl.sum(tl.where(mask, dhidden * silu * up, 0.0), 1)
    hidden = weight_M[:, None] * silu * up
    tl.store(gated + rows * COLUMNS + columns, hidden.to(gated.dtype.element_ty), mask=mask)
    dhidden = dhidden * weight_M[:, None]
    tl.store(dgate_up + at + COLUMNS, (dhidden * silu).to(dgate_up.dtype.element_ty), mask=mask)
    # silu' = sigmoid + silu (1 - sigmoid).
    dgate = dhidden * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dgate_up + at, dgate.to(dgate_up.dtype.element_ty), mask=mask)
    return dweight_M


@triton.jit(repr=named("grouped_dswiglu", "DEPTH", "COLUMNS"), do_not_specialize=["slots", "total"])
def grouped_dswiglu_kernel(
    x,
    weight,
    index,
    x_tiles,
    weight_tiles,
    tiles,
    offsets,
    pairs,
    gates,
    gate_up,
    dgate_up,
    gated,
    partial,
    slots,
    total,
    stride_x,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    expert, row, end, column = _block(tiles, offsets, slots, COLUMNS, BLOCK_M, BLOCK_N, TILE, GROUP)
    if row >= end:
        return
    dhidden, _ = _products(
        x,
        weight,
        index,
        x_tiles,
        weight_tiles,
        expert,
        row,
        end,
        column,
        stride_x,
        COLUMNS,
        DEPTH,
        False,
        True,
        CHOICES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        TMA,
        PRECISION,
    )
    # Two halves of the columns, one after the other: the tiles of the activation do not fit beside the whole product.
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(dhidden, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    rows = row + tl.arange(0, BLOCK_M)
    pair = tl.load(pairs + rows, mask=rows < end, other=0)
    weight_M = tl.load(gates + pair, mask=rows < end, other=0.0)
    dweight_M = _dswiglu(left, weight_M, gate_up, dgate_up, gated, row, end, column, COLUMNS, BLOCK_M, HALF)
    dweight_M += _dswiglu(right, weight_M, gate_up, dgate_up, gated, row, end, column + HALF, COLUMNS, BLOCK_M, HALF)
    # A partial sum for each block of columns; torch adds them in one order. No atomics.
    tl.store(partial + (column // BLOCK_N).to(tl.int64) * total + rows, dweight_M, mask=rows < end)


@triton.jit
def _rows(x, index, rows, end, stride, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr):
    """(rows, columns) of x, or of the tokens that `index` names; 0 from `end`, the expert's last row, on."""
    mask = rows < end
    if index is not None:
        rows = tl.load(index + rows, mask=mask, other=0) // CHOICES
    mask = mask[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _whole_rows(
    x,
    index,
    x_tiles,
    row,
    column,
    stride,
    columns,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHOICES: tl.constexpr,
    TMA: tl.constexpr,
):
    """As `_rows`, for a block of rows that all exist."""
    if TMA and index is None:
        tile = x_tiles.load([row, column])
    else:
        rows = row + tl.arange(0, BLOCK_R)
        if index is not None:
            rows = tl.load(index + rows) // CHOICES
        at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        if WIDTH % BLOCK == 0:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit(repr=named("grouped_dweight", "ROWS", "COLUMNS"))
def grouped_dweight_kernel(
    left,
    right,
    left_index,
    right_index,
    left_tiles,
    right_tiles,
    offsets,
    out,
    stride_left,
    stride_right,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TAIL: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
):
    # The expert, and the block of its (ROWS, COLUMNS) gradient.
    BLOCKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    ACROSS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (BLOCKS * ACROSS)
    block, column_block = place(tl.program_id(0) % (BLOCKS * ACROSS), BLOCKS, ACROSS, GROUP)
    first = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    whole = first + (end - first) // BLOCK_R * BLOCK_R
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Whole blocks of rows, without masks over rows. Rows after the last of an expert are those of the next one, so the
    # remaining rows take a second loop, masked and TAIL at a time.
    for row in tl.range(first, whole, BLOCK_R):
        left_RM = _whole_rows(
            left, left_index, left_tiles, row, block * BLOCK_M, stride_left, m, ROWS, BLOCK_M, BLOCK_R, CHOICES, TMA
        )
        right_RN = _whole_rows(
            right,
            right_index,
            right_tiles,
            row,
            column_block * BLOCK_N,
            stride_right,
            n,
            COLUMNS,
            BLOCK_N,
            BLOCK_R,
            CHOICES,
            TMA,
        )
        acc = tl.dot(left_RM.T, right_RN, acc, input_precision=PRECISION)
    for row in tl.range(whole, end, TAIL, num_stages=1):
        rows = row + tl.arange(0, TAIL)
        left_RM = _rows(left, left_index, rows, end, stride_left, m, ROWS, BLOCK_M, CHOICES)
        right_RN = _rows(right, right_index, rows, end, stride_right, n, COLUMNS, BLOCK_N, CHOICES)
        acc = tl.dot(left_RM.T, right_RN, acc, input_precision=PRECISION)
    # An expert without rows stores zeros.
    at = out + expert.to(tl.int64) * (ROWS * COLUMNS) + m[:, None] * COLUMNS + n[None, :]
    mask = (m < ROWS)[:, None] & (n < COLUMNS)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Layout:
    """Where the rows of the experts are: the index tensors of a `Routing`."""

    rows: Tensor
    positions: Tensor
    offsets: Tensor
    tiles: Tensor

    @property
    def choices(self) -> int:
        return self.positions.shape[1]


def shape_class(x: Tensor) -> dict[str, int]:
    """Keys of the tables: bytes of an element."""
    return {"bytes": x.element_size()}


def _config(table: str, x: Tensor, *operands: Tensor, depth: int | None = None) -> dict:
    """The table's configuration; without TMA where an operand does not fit or BLOCK_K does not divide `depth`."""
    config = dict(configuration(table, x.device, **shape_class(x)))
    all_fit = all(fits_tma(operand) for operand in operands)
    config["TMA"] = config["TMA"] and all_fit and (depth is None or depth % config["BLOCK_K"] == 0)
    return config


@contextmanager
def use_gather(gather: bool) -> Iterator[None]:
    """Inside the block, gather rows in the load, or permute them beforehand, instead of what the tables say."""
    global _forced_gather
    before, _forced_gather = _forced_gather, gather
    try:
        yield
    finally:
        _forced_gather = before


def _gathered(x: Tensor, layout: Layout, config: dict) -> tuple[Tensor, Tensor | None]:
    """x (T, D) and the index to gather it by in the load, or its rows permuted beforehand and no index."""
    gather = config.pop("GATHER")
    if gather if _forced_gather is None else _forced_gather:
        return x, layout.rows
    from .expert_permute import permute

    return permute(x, layout.rows, layout.choices), None


def _row_product(
    kernel,
    config: dict,
    x: Tensor,
    weight: Tensor,
    index: Tensor | None,
    layout: Layout,
    outs: tuple,
    columns: int,
    *numbers: int,
    transposed: bool,
    **more,
) -> None:
    """Launch a kernel of `_products` over all tiles and blocks of columns."""
    depth = x.shape[1]
    weight_block = ("BLOCK_K", "BLOCK_N") if transposed else ("BLOCK_N", "BLOCK_K")
    x_tiles = descriptor(x, config["BLOCK_M"], config["BLOCK_K"]) if config["TMA"] and index is None else None
    weight_tiles = descriptor(weight, *(config[n] for n in weight_block)) if config["TMA"] else None
    slots = layout.tiles.shape[1]
    programs = slots * (TILE_ROWS // config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
    launch(
        kernel,
        (programs if layout.rows.numel() else 0,),
        x,
        weight,
        index,
        x_tiles,
        weight_tiles,
        layout.tiles,
        layout.offsets,
        *outs,
        slots,
        *numbers,
        x.stride(0),
        COLUMNS=columns,
        DEPTH=depth,
        CHOICES=layout.choices,
        TILE=TILE_ROWS,
        PRECISION="ieee",
        GROUP=GROUP,
        **more,
        **config,
    )


def grouped_matmul(x: Tensor, weight: Tensor, layout: Layout, *, transposed: bool = False) -> Tensor:
    """(R, N): row r of x (R, K) times weight[expert of r]^T, weight (E, N, K); transposed: times weight (E, K, N)."""
    columns = weight.shape[2 if transposed else 1]
    config = _config("grouped_matmul", x, x, weight, depth=x.shape[1] if transposed else None)
    out = torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device)
    _row_product(
        grouped_matmul_kernel,
        config,
        x,
        weight,
        None,
        layout,
        (out,),
        columns,
        transposed=transposed,
        TRANSPOSED=transposed,
    )
    return out


def grouped_swiglu(x: Tensor, weight: Tensor, layout: Layout, keep: bool) -> tuple[Tensor, Tensor | None]:
    """silu(gate) * up (R, F) of the tokens' products with weight (E, 2 F, D), and the products (R, 2 F) if kept."""
    columns, total = weight.shape[1] // 2, layout.rows.numel()
    config = _config("grouped_swiglu", x, x, weight)
    x, index = _gathered(x, layout, config)
    out = torch.empty((total, columns), dtype=x.dtype, device=x.device)
    gate_up = torch.empty((total, 2 * columns), dtype=x.dtype, device=x.device) if keep else None
    _row_product(grouped_swiglu_kernel, config, x, weight, index, layout, (gate_up, out), columns, transposed=False)
    return out, gate_up


def grouped_dswiglu(
    dout: Tensor, down: Tensor, gate_up: Tensor, gates: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate_up (R, 2 F), weighted activations (R, F), and the gradient of each row's gate (R,) fp32.

    dout: (T, D), the gradient of the layer's output.   down: (E, D, F).   gate_up: (R, 2 F), as the forward kept it.
    """
    columns, total = down.shape[2], layout.rows.numel()
    config = _config("grouped_dswiglu", dout, dout, down, depth=dout.shape[1])
    dout, index = _gathered(dout, layout, config)
    dgate_up = torch.empty_like(gate_up)
    gated = torch.empty((total, columns), dtype=dout.dtype, device=dout.device)
    partial = torch.empty((triton.cdiv(columns, config["BLOCK_N"]), total), dtype=torch.float32, device=dout.device)
    outs = (layout.rows, gates, gate_up, dgate_up, gated, partial)
    _row_product(grouped_dswiglu_kernel, config, dout, down, index, layout, outs, columns, total, transposed=True)
    return dgate_up, gated, partial.sum(0)


def grouped_dweight(
    left: Tensor, right: Tensor, layout: Layout, num_experts: int, *, gathered: str | None = None
) -> Tensor:
    """(E, N, K): for each expert left^T right over its rows, left (R, N) and right (R, K), or (T, ..) if `gathered`."""
    config = _config("grouped_dweight", left, left, right)
    gather = dict.fromkeys(("left", "right"))
    operands = {"left": left, "right": right}
    if gathered is None:
        config.pop("GATHER")
    else:
        operands[gathered], gather[gathered] = _gathered(operands[gathered], layout, config)
    (left, right), sizes = operands.values(), (config["BLOCK_M"], config["BLOCK_N"])
    tiles = [
        descriptor(x, config["BLOCK_R"], size) if config["TMA"] and gather[name] is None else None
        for (name, x), size in zip(operands.items(), sizes)
    ]
    out = torch.empty((num_experts, left.shape[1], right.shape[1]), dtype=left.dtype, device=left.device)
    blocks = triton.cdiv(left.shape[1], sizes[0]) * triton.cdiv(right.shape[1], sizes[1])
    launch(
        grouped_dweight_kernel,
        (num_experts * blocks,),
        left,
        right,
        gather["left"],
        gather["right"],
        *tiles,
        layout.offsets,
        out,
        left.stride(0),
        right.stride(0),
        ROWS=left.shape[1],
        COLUMNS=right.shape[1],
        CHOICES=layout.choices,
        TAIL=16,
        PRECISION="ieee",
        GROUP=GROUP,
        **config,
    )
    return out

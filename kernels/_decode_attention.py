"""Kernels of decode attention over a paged cache: split keys (Flash-Decoding), then the sum of the splits.

One program of `decode_attention_kernel` computes one sequence, one key/value head and one split of the keys:

1. Load the queries of the group's heads as one (BLOCK_G, BLOCK_C) tile: one product then serves all of them.
2. Find the key blocks of this split that the window and the length leave.
3. Walk over them with an online softmax. A block is inside one page, so one load of the page table finds it.
4. With one split, store the output. Else store the split's output and its log-sum-exp, fp32.

`decode_attention_sum_kernel`: one program per query row combines the splits in their order.

Splits start at fixed key positions (SHARE keys each). A sequence is therefore summed in the same order, and gives the
same bits, in any batch. Exponentials are base 2: `scale` includes log2(e).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

LOG2E = 1.4426950408889634


@triton.jit(repr=named("decode_attention", "WIDTH", "PAGE"), do_not_specialize=["batch", "columns"])
def decode_attention_kernel(
    q,
    keys,
    values,
    table,
    lengths,
    out,
    shares,
    norms,
    scale,
    batch,
    columns,
    stride_page,
    stride_token,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The queries of this key/value head.
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C)
    is_head, is_column = row < GROUP, column < WIDTH
    head = kv_head * GROUP + row
    q_offset = (sequence.to(tl.int64) * HEADS + head)[:, None] * WIDTH + column[None, :]
    query = tl.load(q + q_offset, mask=is_head[:, None] & is_column[None, :], other=0.0)

    length = tl.load(lengths + sequence)
    # The new token is the last key, so a window of n keys starts at length - n.
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    # 2. Splits are at fixed key positions, so that a sequence's sums do not depend on the batch. A split may be empty.
    start = tl.maximum(first // BLOCK_N, split * (SHARE // BLOCK_N))
    stop = tl.minimum(tl.cdiv(length, BLOCK_N), (split + 1) * (SHARE // BLOCK_N))
    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    kv_column = kv_head * WIDTH + column
    # 3. Online softmax over the blocks.
    for block in tl.range(start, stop):
        key = block * BLOCK_N + tl.arange(0, BLOCK_N)
        page = tl.load(table + sequence.to(tl.int64) * columns + block * BLOCK_N // PAGE).to(tl.int64)
        inside = (block * BLOCK_N) % PAGE + tl.arange(0, BLOCK_N)
        offset = page * stride_page + inside[:, None] * stride_token + kv_column[None, :]
        seen = (key < length) & (key >= first)
        kv_mask = seen[:, None] & is_column[None, :]
        k = tl.load(keys + offset, mask=kv_mask, other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A block may hold no visible key: -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probability = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        v = tl.load(values + offset, mask=kv_mask, other=0.0)
        row_sum = row_sum * rescale + tl.sum(probability, 1)
        acc = acc * rescale[:, None] + tl.dot(probability.to(v.dtype), v, input_precision=PRECISION)
        row_max = new_max
    # 4. An empty split gives 0, with a log-sum-exp of -inf, so that the sum skips it.
    result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if SPLITS == 1:
        tl.store(out + q_offset, result.to(out.dtype.element_ty), mask=is_head[:, None] & is_column[None, :])
    else:
        offset = (split.to(tl.int64) * batch + sequence) * HEADS + head
        lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)))
        tl.store(norms + offset, lse, mask=is_head)
        tl.store(shares + offset[:, None] * WIDTH + column[None, :], result, mask=is_head[:, None] & is_column[None, :])


@triton.jit(repr=named("decode_attention_sum", "WIDTH"), do_not_specialize=["rows", "splits"])
def decode_attention_sum_kernel(shares, norms, out, rows, splits, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    # Online softmax over the splits' log-sum-exps; `shares` are the splits' outputs, `norms` their log-sum-exps.
    row, column = tl.program_id(0), tl.arange(0, BLOCK_C)
    is_column = column < WIDTH
    row_max = tl.full([], float("-inf"), tl.float32)
    row_sum = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_C], tl.float32)
    norms += row
    shares += row.to(tl.int64) * WIDTH + column
    for _ in tl.range(0, splits):
        lse = tl.load(norms)
        new_max = tl.maximum(row_max, lse)
        # Without any key so far, a shift of 0 keeps both factors 0.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        scale, rescale = tl.exp2(lse - shift), tl.exp2(row_max - shift)
        share = tl.load(shares, mask=is_column, other=0.0)
        row_sum = row_sum * rescale + scale
        acc = acc * rescale + scale * share
        row_max = new_max
        norms += rows
        shares += rows * WIDTH
    result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(out + row.to(tl.int64) * WIDTH + column, result.to(out.dtype.element_ty), mask=is_column)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    max_length: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """(B, H, C) fp32, fp16 or bf16, as `kernels.decode_attention`, of checked tensors on a GPU."""
    (batch, heads, width), (_, page, kv_heads, _) = q.shape, keys.shape
    config = dict(configuration("decode_attention", q.device, bytes=q.element_size()))
    block_n, share = min(config.pop("BLOCK_N"), page), config.pop("SHARE")
    splits = max(1, triton.cdiv(max_length, share))
    out = torch.empty_like(q)
    shares, norms = (
        torch.empty(shape if splits > 1 else (0,), dtype=torch.float32, device=q.device)
        for shape in ((splits, batch, heads, width), (splits, batch, heads))
    )
    block_c = triton.next_power_of_2(width)
    launch(
        decode_attention_kernel,
        (batch, kv_heads, splits),
        q,
        keys,
        values,
        table,
        lengths,
        out,
        shares,
        norms,
        scale * LOG2E,
        batch,
        table.shape[1],
        keys.stride(0),
        keys.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        PAGE=page,
        WINDOW=window or 0,
        SPLITS=min(splits, 2),
        SHARE=share,
        BLOCK_N=block_n,
        BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_C=max(16, block_c),
        PRECISION="ieee",
        **config,
    )
    if splits > 1:
        launch(
            decode_attention_sum_kernel,
            (batch * heads,),
            shares,
            norms,
            out,
            batch * heads,
            splits,
            WIDTH=width,
            BLOCK_C=block_c,
            **configuration("decode_attention_sum", q.device),
        )
    return out

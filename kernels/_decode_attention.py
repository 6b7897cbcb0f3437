"""Kernels of attention over a paged cache: a program per sequence, key/value head and share of the keys, and the sum of
the shares."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

LOG2E = 1.4426950408889634


@triton.jit(repr=named("decode_attention", "WIDTH", "PAGE"), do_not_specialize=["batch", "columns"])
def decode_attention_kernel(
    q, keys, values, table, lengths, out, shares, norms, scale, batch, columns, stride_page, stride_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C)
    live, wide = row < GROUP, column < WIDTH
    head = kv_head * GROUP + row
    at = (sequence.to(tl.int64) * HEADS + head)[:, None] * WIDTH + column[None, :]
    query = tl.load(q + at, mask=live[:, None] & wide[None, :], other=0.0)

    length = tl.load(lengths + sequence)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    # Shares stand at fixed places, so that a sequence's sums do not depend on other sequences; one may be empty.
    start = tl.maximum(first // BLOCK_N, split * (SHARE // BLOCK_N))
    stop = tl.minimum(tl.cdiv(length, BLOCK_N), (split + 1) * (SHARE // BLOCK_N))
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    own = kv_head * WIDTH + column
    for block in tl.range(start, stop):
        key = block * BLOCK_N + tl.arange(0, BLOCK_N)
        page = tl.load(table + sequence.to(tl.int64) * columns + block * BLOCK_N // PAGE).to(tl.int64)
        inside = (block * BLOCK_N) % PAGE + tl.arange(0, BLOCK_N)
        place = page * stride_page + inside[:, None] * stride_token + own[None, :]
        seen = (key < length) & (key >= first)
        there = seen[:, None] & wide[None, :]
        k = tl.load(keys + place, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(peak, tl.max(scores, 1))
        # A block may hold no key that is seen.
        finite = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(scores - finite[:, None])
        faded = tl.exp2(peak - finite)
        v = tl.load(values + place, mask=there, other=0.0)
        total = total * faded + tl.sum(weight, 1)
        acc = acc * faded[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        peak = new
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS == 1:
        tl.store(out + at, mean.to(out.dtype.element_ty), mask=live[:, None] & wide[None, :])
    else:
        place = (split.to(tl.int64) * batch + sequence) * HEADS + head
        norm = tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(norms + place, norm, mask=live)
        tl.store(shares + place[:, None] * WIDTH + column[None, :], mean, mask=live[:, None] & wide[None, :])


@triton.jit(repr=named("decode_attention_sum", "WIDTH"), do_not_specialize=["rows", "splits"])
def decode_attention_sum_kernel(shares, norms, out, rows, splits, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK_C)
    wide = column < WIDTH
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_C], tl.float32)
    norms += row
    shares += row.to(tl.int64) * WIDTH + column
    for _ in tl.range(0, splits):
        norm = tl.load(norms)
        new = tl.maximum(peak, norm)
        finite = tl.where(new == float("-inf"), 0.0, new)
        weight, faded = tl.exp2(norm - finite), tl.exp2(peak - finite)
        share = tl.load(shares, mask=wide, other=0.0)
        total = total * faded + weight
        acc = acc * faded + weight * share
        peak = new
        norms += rows
        shares += rows * WIDTH
    mean = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row.to(tl.int64) * WIDTH + column, mean.to(out.dtype.element_ty), mask=wide)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, max_length: int, window: int | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """(B, H, C) of checked tensors."""
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
        decode_attention_kernel, (batch, kv_heads, splits), q, keys, values, table, lengths, out, shares, norms,
        scale * LOG2E, batch, table.shape[1], keys.stride(0), keys.stride(1), HEADS=heads, KV_HEADS=kv_heads,
        WIDTH=width, PAGE=page, WINDOW=window or 0, SPLITS=min(splits, 2), SHARE=share, BLOCK_N=block_n,
        BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_C=max(16, block_c), PRECISION="ieee",
        **config,
    )  # fmt: skip
    if splits > 1:
        launch(
            decode_attention_sum_kernel, (batch * heads,), shares, norms, out, batch * heads, splits, WIDTH=width,
            BLOCK_C=block_c, **configuration("decode_attention_sum", q.device),
        )  # fmt: skip
    return out

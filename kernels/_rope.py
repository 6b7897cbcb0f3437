"""Kernel of rotary embedding: the heads of q and k in one launch, angles kept in registers over the heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

MIN_BLOCK_HALF = 8


@triton.jit
def _turn(
    source, target, start, tokens, cos, sin, first_head, stride, stride_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_HEADS heads of BLOCK_TOKENS tokens from `source` (T, HEADS, 2 HALF), strided, into `target`."""
    token = start + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    row = token.to(tl.int64)[:, None]
    for i in tl.static_range(BLOCK_HEADS):
        head = first_head + i
        limit = tokens
        if HEADS % BLOCK_HEADS != 0:
            limit = tl.where(head < HEADS, tokens, 0)
        kept = (token < limit)[:, None]
        if HALF != BLOCK_HALF:
            kept = kept & (column < HALF)
        at = source + row * stride + head.to(tl.int64) * stride_head + column
        first = tl.load(at, mask=kept, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=kept, other=0.0).to(tl.float32)
        to = target + row * (HEADS * 2 * HALF) + head * (2 * HALF) + column
        tl.store(to, (first * cos - second * sin).to(target.dtype.element_ty), mask=kept)
        tl.store(to + HALF, (second * cos + first * sin).to(target.dtype.element_ty), mask=kept)


@triton.jit(repr=named("rope", "HALF", "HEADS", "KV_HEADS", "INVERSE"), do_not_specialize=["tokens", "table_rows"])
def rope_kernel(
    q, k, cos, sin, positions, turned_q, turned_k, tokens, table_rows, stride_q, stride_qh, stride_k, stride_kh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    # The programs of one token block stand side by side, so that its angles come from L2.
    q_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    blocks: tl.constexpr = q_blocks + (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    start = tl.program_id(0) // blocks * BLOCK_TOKENS
    block = tl.program_id(0) % blocks
    token = start + tl.arange(0, BLOCK_TOKENS)
    position = token
    if positions is not None:
        position = tl.load(positions + token, mask=token < tokens, other=0)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    # A position that the table does not have gives NaN.
    kept = ((token < tokens) & (position >= 0) & (position < table_rows))[:, None]
    if HALF != BLOCK_HALF:
        kept = kept & (column < HALF)
    row = position.to(tl.int64)[:, None]
    cosine = tl.load(cos + row * HALF + column, mask=kept, other=float("nan"))
    sine = tl.load(sin + row * HALF + column, mask=kept, other=float("nan"))
    if INVERSE:
        sine = -sine
    if block < q_blocks:
        _turn(
            q, turned_q, start, tokens, cosine, sine, block * BLOCK_HEADS, stride_q, stride_qh,
            HEADS, HALF, BLOCK_HALF, BLOCK_TOKENS, BLOCK_HEADS,
        )  # fmt: skip
    else:
        _turn(
            k, turned_k, start, tokens, cosine, sine, (block - q_blocks) * BLOCK_HEADS, stride_k, stride_kh,
            KV_HEADS, HALF, BLOCK_HALF, BLOCK_TOKENS, BLOCK_HEADS,
        )  # fmt: skip


def shape_class(q: Tensor) -> dict[str, int]:
    """Keys of the table: padded half of a head, and bytes of an element."""
    half = triton.next_power_of_2(q.shape[-1] // 2)
    return {"half": max(MIN_BLOCK_HALF, half), "bytes": q.element_size()}


def rope_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q (T, H, C) and k (T, K, C) turned by their angles, or by the negative ones where `inverse`."""
    tokens, heads, width = q.shape
    shape = shape_class(q)
    config = configuration("rope", q.device, **shape)
    turned_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    turned_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    blocks = triton.cdiv(heads, config["BLOCK_HEADS"]) + triton.cdiv(k.shape[1], config["BLOCK_HEADS"])
    launch(
        rope_kernel, (triton.cdiv(tokens, config["BLOCK_TOKENS"]) * blocks,), q, k, cos.contiguous(), sin.contiguous(),
        positions, turned_q, turned_k, tokens, cos.shape[0], q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        HEADS=heads, KV_HEADS=k.shape[1], HALF=width // 2, BLOCK_HALF=shape["half"], INVERSE=inverse, **config,
    )  # fmt: skip
    return turned_q, turned_k

"""Kernel of rotary embedding, half-split layout: all heads of q and k in one launch.

One program takes BLOCK_TOKENS tokens and BLOCK_HEADS heads: it loads the tokens' cos and sin once, keeps them in
registers, and rotates its heads one after the other in fp32. The gradient is the rotation by the negative angle
(INVERSE). With `v`, the kernel writes the gradients of q, k and v side by side into one buffer, that of the product
that made them; v is copied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named

MIN_BLOCK_HALF = 8


@triton.jit
def _rotate_heads(
    source,
    target,
    start,
    tokens,
    cos,
    sin,
    first_head,
    stride,
    stride_head,
    HEADS: tl.constexpr,
    TO_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Rotate, or without ROTATE copy, BLOCK_HEADS heads of BLOCK_TOKENS tokens.

    source: (T, HEADS, 2 HALF), strided.   target: the first of these heads in rows of TO_HEADS heads.
    """
    token = start + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    row = token.to(tl.int64)[:, None]
    for i in tl.static_range(BLOCK_HEADS):
        head = first_head + i
        limit = tokens
        if HEADS % BLOCK_HEADS != 0:
            limit = tl.where(head < HEADS, tokens, 0)
        mask = (token < limit)[:, None]
        if HALF != BLOCK_HALF:
            mask = mask & (column < HALF)
        # 64-bit offsets: tokens times the row stride may pass 2^31 elements.
        at = source + row * stride + head.to(tl.int64) * stride_head + column
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        to = target + row * (TO_HEADS * 2 * HALF) + head * (2 * HALF) + column
        out_first = first
        out_second = second
        if ROTATE:
            out_first = first * cos - second * sin
            out_second = second * cos + first * sin
        tl.store(to, out_first.to(target.dtype.element_ty), mask=mask)
        tl.store(to + HALF, out_second.to(target.dtype.element_ty), mask=mask)


@triton.jit(repr=named("rope", "HALF", "HEADS", "KV_HEADS", "INVERSE"), do_not_specialize=["tokens", "table_rows"])
def rope_kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    rotated_q,
    rotated_k,
    tokens,
    table_rows,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Without `v`, into `rotated_q` and `rotated_k`; with it, all three side by side into `rotated_q`."""
    # The programs of one token block have neighbouring numbers, so that its angles come from L2.
    q_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    joined: tl.constexpr = v is not None
    blocks: tl.constexpr = q_blocks + (2 if joined else 1) * kv_blocks
    to_q: tl.constexpr = HEADS + 2 * KV_HEADS if joined else HEADS
    to_k: tl.constexpr = HEADS + 2 * KV_HEADS if joined else KV_HEADS
    start = tl.program_id(0) // blocks * BLOCK_TOKENS
    block = tl.program_id(0) % blocks
    token = start + tl.arange(0, BLOCK_TOKENS)
    position = token
    if positions is not None:
        position = tl.load(positions + token, mask=token < tokens, other=0)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    # A position outside the table gives NaN, not the angle of another one.
    mask = ((token < tokens) & (position >= 0) & (position < table_rows))[:, None]
    if HALF != BLOCK_HALF:
        mask = mask & (column < HALF)
    row = position.to(tl.int64)[:, None]
    cosine = tl.load(cos + row * HALF + column, mask=mask, other=float("nan"))
    sine = tl.load(sin + row * HALF + column, mask=mask, other=float("nan"))
    if INVERSE:
        sine = -sine
    if block < q_blocks:
        _rotate_heads(
            q,
            rotated_q,
            start,
            tokens,
            cosine,
            sine,
            block * BLOCK_HEADS,
            stride_q,
            stride_qh,
            HEADS,
            to_q,
            HALF,
            BLOCK_HALF,
            BLOCK_TOKENS,
            BLOCK_HEADS,
            True,
        )
    elif block < q_blocks + kv_blocks:
        _rotate_heads(
            k,
            rotated_k,
            start,
            tokens,
            cosine,
            sine,
            (block - q_blocks) * BLOCK_HEADS,
            stride_k,
            stride_kh,
            KV_HEADS,
            to_k,
            HALF,
            BLOCK_HALF,
            BLOCK_TOKENS,
            BLOCK_HEADS,
            True,
        )
    elif joined:
        _rotate_heads(
            v,
            rotated_k + KV_HEADS * 2 * HALF,
            start,
            tokens,
            cosine,
            sine,
            (block - q_blocks - kv_blocks) * BLOCK_HEADS,
            stride_v,
            stride_vh,
            KV_HEADS,
            to_k,
            HALF,
            BLOCK_HALF,
            BLOCK_TOKENS,
            BLOCK_HEADS,
            False,
        )


def shape_class(q: Tensor) -> dict[str, int]:
    """Keys of the table: padded half of a head, and bytes of an element."""
    half = triton.next_power_of_2(q.shape[-1] // 2)
    return {"half": max(MIN_BLOCK_HALF, half), "bytes": q.element_size()}


def rope_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q (T, H, C) and k (T, K, C) rotated by their angles, or by the negative ones where `inverse`."""
    rotated_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rotated_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _launch(q, k, None, cos, sin, positions, rotated_q, rotated_k, inverse)
    return rotated_q, rotated_k


def rope_joined(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, H + 2 K, C): q and k rotated by the negative angles, and v as it is, in one buffer."""
    tokens, heads, width = q.shape
    joined = torch.empty((tokens, heads + 2 * k.shape[1], width), dtype=q.dtype, device=q.device)
    _launch(q, k, v, cos, sin, None, joined, joined[:, heads:], True)
    return joined


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    to_q: Tensor,
    to_k: Tensor,
    inverse: bool,
) -> None:
    tokens, heads, width = q.shape
    shape = shape_class(q)
    config = configuration("rope", q.device, **shape)
    per_token = [x.shape[1] for x in (q, k, v) if x is not None]
    blocks = sum(triton.cdiv(count, config["BLOCK_HEADS"]) for count in per_token)
    strides = (0, 0) if v is None else v.stride()[:2]
    launch(
        rope_kernel,
        (triton.cdiv(tokens, config["BLOCK_TOKENS"]) * blocks,),
        q,
        k,
        v,
        cos.contiguous(),
        sin.contiguous(),
        positions,
        to_q,
        to_k,
        tokens,
        cos.shape[0],
        *q.stride()[:2],
        *k.stride()[:2],
        *strides,
        HEADS=heads,
        KV_HEADS=k.shape[1],
        HALF=width // 2,
        BLOCK_HALF=shape["half"],
        INVERSE=inverse,
        **config,
    )

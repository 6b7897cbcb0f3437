"""Kernel of a decode step's cache write: rotate q and k, and store k and v in their pages, in one launch.

One program takes BLOCK_TOKENS tokens and BLOCK_HEADS heads of q, of k, or of v: it loads the angles (not for v),
rotates in fp32, and stores to the packed queries or to each token's slot of the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rope import shape_class
from .configuration import configuration
from .launch import launch, named


@triton.jit
def _store_heads(
    source,
    target,
    from_row,
    to_row,
    kept,
    cos,
    sin,
    first_head,
    stride_head,
    ROTATED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Rotate, or without ROTATED copy, BLOCK_HEADS heads of a block of tokens.

    from_row, to_row: (BLOCK_TOKENS, 1) offsets of the tokens in `source` and `target`. In `target` the HEADS heads of a
    token are contiguous.
    """
    column = tl.arange(0, BLOCK_HALF)[None, :]
    for i in tl.static_range(BLOCK_HEADS):
        head = first_head + i
        mask = kept
        if HEADS % BLOCK_HEADS != 0:
            mask = mask & (column * 0 + head < HEADS)
        at = source + from_row + head.to(tl.int64) * stride_head + column
        first = tl.load(at, mask=mask, other=0.0)
        second = tl.load(at + HALF, mask=mask, other=0.0)
        to = target + to_row + head * (2 * HALF) + column
        if ROTATED:
            first, second = first.to(tl.float32), second.to(tl.float32)
            tl.store(to, (first * cos - second * sin).to(target.dtype.element_ty), mask=mask)
            tl.store(to + HALF, (second * cos + first * sin).to(target.dtype.element_ty), mask=mask)
        else:
            tl.store(to, first, mask=mask)
            tl.store(to + HALF, second, mask=mask)


@triton.jit(
    repr=named("write_pages", "HALF", "HEADS", "KV_HEADS"), do_not_specialize=["tokens", "table_rows", "num_slots"]
)
def write_pages_kernel(
    qkv,
    cos,
    sin,
    positions,
    slots,
    q,
    keys,
    values,
    tokens,
    table_rows,
    num_slots,
    stride,
    stride_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    # The programs of one token block have neighbouring numbers, so that its angles come from L2.
    q_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    block = tl.program_id(0) % (q_blocks + 2 * kv_blocks)
    token = tl.program_id(0) // (q_blocks + 2 * kv_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_range = token < tokens
    position = token
    if positions is not None:
        position = tl.load(positions + token, mask=in_range, other=0)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    is_column = column < HALF
    # A position outside the table gives NaN, not the angle of another one.
    angle_mask = (in_range & (position >= 0) & (position < table_rows))[:, None] & is_column
    angle = position.to(tl.int64)[:, None] * HALF + column
    row = token.to(tl.int64)[:, None]
    if block < q_blocks:
        cosine = tl.load(cos + angle, mask=angle_mask, other=float("nan"))
        sine = tl.load(sin + angle, mask=angle_mask, other=float("nan"))
        _store_heads(
            qkv,
            q,
            row * stride,
            row * (HEADS * 2 * HALF),
            in_range[:, None] & is_column,
            cosine,
            sine,
            block * BLOCK_HEADS,
            stride_head,
            True,
            HEADS,
            HALF,
            BLOCK_HALF,
            BLOCK_HEADS,
        )
    else:
        slot = tl.load(slots + token, mask=in_range, other=-1)
        # A slot outside the cache is not written: padding and wrong indices cannot damage other sequences.
        kept = ((slot >= 0) & (slot < num_slots))[:, None] & is_column
        to_row = slot.to(tl.int64)[:, None] * (KV_HEADS * 2 * HALF)
        if block < q_blocks + kv_blocks:
            cosine = tl.load(cos + angle, mask=angle_mask, other=float("nan"))
            sine = tl.load(sin + angle, mask=angle_mask, other=float("nan"))
            _store_heads(
                qkv + HEADS * stride_head,
                keys,
                row * stride,
                to_row,
                kept,
                cosine,
                sine,
                (block - q_blocks) * BLOCK_HEADS,
                stride_head,
                True,
                KV_HEADS,
                HALF,
                BLOCK_HALF,
                BLOCK_HEADS,
            )
        else:
            _store_heads(
                qkv + (HEADS + KV_HEADS) * stride_head,
                values,
                row * stride,
                to_row,
                kept,
                0.0,
                0.0,
                (block - q_blocks - kv_blocks) * BLOCK_HEADS,
                stride_head,
                False,
                KV_HEADS,
                HALF,
                BLOCK_HALF,
                BLOCK_HEADS,
            )


def write_pages(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor | None
) -> Tensor:
    """(T, H, C) rotated queries of qkv (T, H + 2 K, C); stores rotated keys, and values, in their slots."""
    (tokens, heads, width), kv_heads = qkv.shape, keys.shape[2]
    shape = shape_class(qkv)
    config = configuration("write_pages", qkv.device, **shape)
    q = torch.empty((tokens, heads - 2 * kv_heads, width), dtype=qkv.dtype, device=qkv.device)
    blocks = triton.cdiv(q.shape[1], config["BLOCK_HEADS"]) + 2 * triton.cdiv(kv_heads, config["BLOCK_HEADS"])
    launch(
        write_pages_kernel,
        (triton.cdiv(tokens, config["BLOCK_TOKENS"]) * blocks,),
        qkv,
        cos.contiguous(),
        sin.contiguous(),
        positions,
        slots,
        q,
        keys,
        values,
        tokens,
        cos.shape[0],
        keys.shape[0] * keys.shape[1],
        qkv.stride(0),
        qkv.stride(1),
        HEADS=q.shape[1],
        KV_HEADS=kv_heads,
        HALF=width // 2,
        BLOCK_HALF=shape["half"],
        **config,
    )
    return q

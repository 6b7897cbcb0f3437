"""Forward kernel of attention: online softmax over key blocks (FlashAttention-2), with two forms of the main loop.

One program computes BLOCK_M queries of one head of one sequence:

1. Find the tile: heads, sequence, first query (`query_tile`, `find_tile`); leave if the slot is empty.
2. Find the keys it visits, and where masks are needed (`key_range`).
3. Load the queries. Start row_max = -inf, row_sum = 0, acc = 0.
4. Walk over whole key blocks: S = Q K^T, online softmax, acc = rescale acc + P V.
5. Walk over the last keys, TAIL at a time, through pointers with masks.
6. Store out = acc / row_sum, and the log-sum-exp for the backward.

Scores, softmax and sums are fp32; P is rounded to the dtype of V for the product. Exponentials are base 2: `scale`
includes log2(e), so one multiply-add and one exp2 make a probability.

In step 4, `plain` computes the scores of a block, its softmax and its product with V in turn. `rotated` issues the
product of the previous block with V right after the scores of the next, so that the tensor cores work while the
exponentials are computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_tiles import (
    ALIGNMENT,
    LOG2_E,
    aligned_length,
    aligned_start,
    apply_mask,
    find_tile,
    key_range,
    load_rows,
    query_tile,
    span,
    store_rows,
)
from .configuration import configuration
from .launch import launch, named

HEAD_WIDTHS = (16, 32, 64, 96, 128, 256)
# Keys per step after the last whole block: the fewest that a product takes.
TAIL = 16


@triton.jit
def _online_softmax(scores, row_max, row_sum, scale, MASKED: tl.constexpr):
    """Unnormalised probabilities of a block, the factor for earlier sums, and the new row_max and row_sum.

    `scale` includes log2(e). `row_max` is the largest score so far before scaling, so that the scaling is part of the
    multiply-add of the exponent. `MASKED`: some row may have seen no key yet.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = new_max * scale
    if MASKED:
        # -inf - -inf is NaN. With a shift of 0 a row without keys gets probabilities of exp2(-inf) = 0.
        shift = tl.where(new_max == float("-inf"), 0.0, shift)
    probability = tl.math.exp2(scores * scale - shift[:, None])
    rescale = tl.math.exp2(row_max * scale - shift)
    return probability, rescale, new_max, row_sum * rescale + tl.sum(probability, 1)


@triton.jit(
    repr=named("attention_forward", "WIDTH", "CAUSAL", "WINDOWED", "BLOCK_M", "BLOCK_N", "VARIANT"),
    do_not_specialize=["num_sequences", "tokens_q", "tokens_k", "window", "slots"],
)
def attention_forward_kernel(
    q,
    k,
    v,
    q_tiles,
    k_tiles,
    v_tiles,
    out,
    lse,
    cu_q,
    cu_k,
    num_sequences,
    tokens_q,
    tokens_k,
    window,
    scale,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    stride_lse,
    slots,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    VARIANT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TAIL: tl.constexpr,
):
    # 1. The tile.
    kv_head, head, slot = query_tile(tl.program_id(0), slots, GROUP)
    sequence, block, start, num_queries = find_tile(cu_q, num_sequences, tokens_q, slot, BLOCK_M)
    row = block * BLOCK_M
    if row >= num_queries:
        return
    rows = row + tl.arange(0, BLOCK_M)
    start_k, num_keys = span(cu_k, sequence, num_sequences, tokens_k)
    offset = num_keys - num_queries

    # 2. The keys. A descriptor cannot stop at the end of a sequence: it reads whole blocks, and step 5 takes the rest.
    first, whole, last, left, right = key_range(
        row, num_queries, num_keys, offset, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED
    )

    # 3. The queries. After the last one, a descriptor reads rows of the next sequence: computed, but not stored.
    q_MC = load_rows(q, q_tiles, start, row, num_queries, head, stride_q, stride_qh, BLOCK_M, WIDTH, BLOCK_WIDTH, TMA)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_WIDTH], tl.float32)
    # 4. Whole key blocks.
    if VARIANT == "rotated":
        if first < whole:
            # Scores and softmax of the first block; its product with V comes in the first iteration of the loop.
            k_NC = load_rows(
                k, k_tiles, start_k, first, num_keys, kv_head, stride_k, stride_kh, BLOCK_N, WIDTH, BLOCK_WIDTH, TMA
            )
            scores = tl.dot(q_MC, k_NC.T, input_precision=PRECISION)
            scores = apply_mask(scores, rows, first, num_keys, offset, window, BLOCK_N, CAUSAL, WINDOWED)
            p_MN, rescale, row_max, row_sum = _online_softmax(scores, row_max, row_sum, scale, True)
            for column in tl.range(first + BLOCK_N, whole, BLOCK_N):
                k_NC = load_rows(
                    k,
                    k_tiles,
                    start_k,
                    column,
                    num_keys,
                    kv_head,
                    stride_k,
                    stride_kh,
                    BLOCK_N,
                    WIDTH,
                    BLOCK_WIDTH,
                    TMA,
                )
                scores = tl.dot(q_MC, k_NC.T, input_precision=PRECISION)
                # Product of the previous block, issued before the softmax of this one.
                v_NC = load_rows(
                    v,
                    v_tiles,
                    start_k,
                    column - BLOCK_N,
                    num_keys,
                    kv_head,
                    stride_v,
                    stride_vh,
                    BLOCK_N,
                    WIDTH,
                    BLOCK_WIDTH,
                    TMA,
                )
                acc = acc * rescale[:, None]
                acc = tl.dot(p_MN.to(v_NC.dtype), v_NC, acc, input_precision=PRECISION)
                if CAUSAL or WINDOWED:
                    if (column < left) | (column >= right):
                        scores = apply_mask(scores, rows, column, num_keys, offset, window, BLOCK_N, CAUSAL, WINDOWED)
                p_MN, rescale, row_max, row_sum = _online_softmax(scores, row_max, row_sum, scale, CAUSAL or WINDOWED)
            # Product of the last block.
            v_NC = load_rows(
                v,
                v_tiles,
                start_k,
                whole - BLOCK_N,
                num_keys,
                kv_head,
                stride_v,
                stride_vh,
                BLOCK_N,
                WIDTH,
                BLOCK_WIDTH,
                TMA,
            )
            acc = acc * rescale[:, None]
            acc = tl.dot(p_MN.to(v_NC.dtype), v_NC, acc, input_precision=PRECISION)
    else:
        for part in tl.static_range(0, 3):
            # Three loops: with mask at the window's edge, without mask, with mask at the diagonal. A branch inside one
            # loop would make every product wait for the one before.
            if part == 1 or (part == 0 and WINDOWED) or (part == 2 and CAUSAL):
                begin = first if part == 0 else (left if part == 1 else right)
                end = left if part == 0 else (right if part == 1 else whole)
                for column in tl.range(begin, end, BLOCK_N):
                    k_NC = load_rows(
                        k,
                        k_tiles,
                        start_k,
                        column,
                        num_keys,
                        kv_head,
                        stride_k,
                        stride_kh,
                        BLOCK_N,
                        WIDTH,
                        BLOCK_WIDTH,
                        TMA,
                    )
                    scores = tl.dot(q_MC, k_NC.T, input_precision=PRECISION)
                    v_NC = load_rows(
                        v,
                        v_tiles,
                        start_k,
                        column,
                        num_keys,
                        kv_head,
                        stride_v,
                        stride_vh,
                        BLOCK_N,
                        WIDTH,
                        BLOCK_WIDTH,
                        TMA,
                    )
                    if part != 1:
                        scores = apply_mask(scores, rows, column, num_keys, offset, window, BLOCK_N, CAUSAL, WINDOWED)
                    p_MN, rescale, row_max, row_sum = _online_softmax(scores, row_max, row_sum, scale, part != 1)
                    acc = acc * rescale[:, None]
                    acc = tl.dot(p_MN.to(v_NC.dtype), v_NC, acc, input_precision=PRECISION)
    # 5. The last keys, not pipelined: at most BLOCK_N / TAIL steps.
    for column in tl.range(whole, last, TAIL, num_stages=1):
        k_NC = load_rows(
            k, k_tiles, start_k, column, num_keys, kv_head, stride_k, stride_kh, TAIL, WIDTH, BLOCK_WIDTH, False
        )
        v_NC = load_rows(
            v, v_tiles, start_k, column, num_keys, kv_head, stride_v, stride_vh, TAIL, WIDTH, BLOCK_WIDTH, False
        )
        scores = tl.dot(q_MC, k_NC.T, input_precision=PRECISION)
        scores = apply_mask(scores, rows, column, num_keys, offset, window, TAIL, CAUSAL, WINDOWED)
        p_MN, rescale, row_max, row_sum = _online_softmax(scores, row_max, row_sum, scale, True)
        acc = acc * rescale[:, None]
        acc = tl.dot(p_MN.to(v_NC.dtype), v_NC, acc, input_precision=PRECISION)

    # 6. A row without keys gives 0. Its log-sum-exp of +inf makes all its probabilities in the backward 0.
    is_empty = row_sum == 0.0
    divisor = tl.where(is_empty, 1.0, row_sum)
    acc = acc / divisor[:, None]
    store_rows(out, acc, start, row, num_queries, head, HEADS * WIDTH, WIDTH, BLOCK_M, WIDTH, BLOCK_WIDTH)
    # In units of log2, for exp2 in the backward. No mask: each sequence has whole aligned blocks in this buffer.
    lse_M = tl.where(is_empty, float("inf"), row_max * scale + tl.math.log2(divisor))
    lse_rows = lse + head.to(tl.int64) * stride_lse + aligned_start(start, sequence, ALIGNMENT)
    tl.store(lse_rows + rows, lse_M)


def block_width(width: int) -> int:
    """Columns of a tile for heads of this width: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def shape_class(q: Tensor) -> dict:
    """Keys of the attention tables: head width, rounded up to one that the tables know, and bytes of an element."""
    return {"width": next(width for width in HEAD_WIDTHS if width >= q.shape[-1]), "bytes": q.element_size()}


def row_tiles(x: Tensor, block: int):
    """A TMA descriptor of tiles of `block` rows of one head of x (T, heads, C).

    Two dims where C is a power of two: a tile then goes from shared memory into a product without a reshape. Else three
    dims, so that the hardware fills the columns from C on with 0.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    tokens, heads, width = x.shape
    if block_width(width) == width:
        return TensorDescriptor(x, [tokens, heads * width], [x.stride(0), 1], [block, width])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block, 1, block_width(width)])


def fits_tma(*tensors: Tensor) -> bool:
    """True where every tensor can be read through a descriptor: some rows, heads side by side, 16-byte alignment."""
    return all(
        x.shape[0] > 0
        and x.stride(1) == x.shape[2]
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out (T, H, C), and the log-sum-exp of every row, (H, aligned_length) fp32, see `aligned_start`.

    The log-sum-exp is in units of log2, and +inf for rows without a key.
    """
    tokens, heads, width = q.shape
    config = dict(configuration("attention_forward", q.device, **shape_class(q)))
    config["TMA"] = config["TMA"] and fits_tma(q, k, v)
    blocks = [config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_N"]]
    tiles = [row_tiles(x, n) if config["TMA"] else None for x, n in zip((q, k, v), blocks)]
    out = torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device)
    lse_shape = (heads, aligned_length(tokens, cu_q.numel() - 1))
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    assert ALIGNMENT % config["BLOCK_M"] == 0, "a tile writes its rows' log-sum-exp as a whole"
    if lse.numel() >= 2**31:
        raise ValueError(f"q: expected less than 2^31 rows of all heads, got {heads} heads of {tokens} tokens")
    slots = tokens // config["BLOCK_M"] + cu_q.numel()
    launch(
        attention_forward_kernel,
        (slots * heads if tokens else 0,),
        q,
        k,
        v,
        *tiles,
        out,
        lse,
        cu_q,
        cu_k,
        cu_q.numel() - 1,
        tokens,
        k.shape[0],
        window or 0,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        lse.stride(0),
        slots,
        HEADS=heads,
        GROUP=heads // k.shape[1],
        WIDTH=width,
        BLOCK_WIDTH=block_width(width),
        CAUSAL=causal,
        WINDOWED=window is not None,
        PRECISION="ieee",
        ALIGNMENT=ALIGNMENT,
        TAIL=TAIL,
        **config,
    )
    return out, lse

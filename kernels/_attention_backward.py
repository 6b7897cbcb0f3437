"""Backward kernels of attention (FlashAttention-2) without atomics: delta, then dK and dV, then dQ.

    P = exp2(scale_log2 Q K^T - lse)        delta = row sums of out * dout        dP = dout V^T
    dS = P * (dP - delta)        dV = P^T dout        dK = scale dS^T Q        dQ = scale dS K

`attention_delta_kernel`: one tile of queries of one head.
`attention_backward_kv_kernel`: one program has one key block of one key head and walks over the queries that see it,
for each query head of the group. It keeps dK and dV in registers: the sum over queries and heads has one fixed order.
`attention_backward_q_kernel`: one program has one query tile of one head and walks over the keys that it sees, as the
forward does. Scores are computed twice, once in each kernel; in return no sum crosses programs.

The kv kernel computes S^T = K Q^T, so that P^T and dS^T come out of their products in the layout that the next products
take, and no register tile is transposed. Sums are fp32; P and dS are rounded to the input dtype for the products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_forward import TAIL, block_width, fits_tma, row_tiles, shape_class
from ._attention_tiles import (
    ALIGNMENT,
    LOG2_E,
    aligned_length,
    aligned_start,
    find_tile,
    is_seen,
    key_range,
    load_rows,
    query_tile,
    round_down,
    span,
    store_rows,
)
from .configuration import configuration
from .launch import launch, named


@triton.jit(repr=named("attention_delta", "WIDTH", "BLOCK_M"), do_not_specialize=["num_sequences", "tokens"])
def attention_delta_kernel(
    out,
    dout,
    delta,
    cu_q,
    num_sequences,
    tokens,
    stride_out,
    stride_outh,
    stride_do,
    stride_doh,
    stride_delta,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """delta of a row: the sum of out * dout over the head's width, fp32; stored where its log-sum-exp is."""
    head = tl.program_id(1)
    sequence, block, start, length = find_tile(cu_q, num_sequences, tokens, tl.program_id(0), BLOCK_M)
    row = block * BLOCK_M
    if row >= length:
        return
    o_MC = load_rows(out, None, start, row, length, head, stride_out, stride_outh, BLOCK_M, WIDTH, BLOCK_WIDTH, False)
    do_MC = load_rows(dout, None, start, row, length, head, stride_do, stride_doh, BLOCK_M, WIDTH, BLOCK_WIDTH, False)
    delta_M = tl.sum(o_MC.to(tl.float32) * do_MC.to(tl.float32), 1)
    base = delta + head.to(tl.int64) * stride_delta + aligned_start(start, sequence, ALIGNMENT)
    tl.store(base + row + tl.arange(0, BLOCK_M), delta_M)


@triton.jit(
    repr=named("attention_backward_kv", "WIDTH", "CAUSAL", "WINDOWED", "BLOCK_M", "BLOCK_N"),
    do_not_specialize=["num_sequences", "tokens_q", "tokens_k", "window", "slots"],
)
def attention_backward_kv_kernel(
    q,
    k,
    v,
    dout,
    q_tiles,
    k_tiles,
    v_tiles,
    do_tiles,
    lse,
    delta,
    dk,
    dv,
    cu_q,
    cu_k,
    num_sequences,
    tokens_q,
    tokens_k,
    window,
    scale,
    scale_log2,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    stride_do,
    stride_doh,
    stride_lse,
    slots,
    TAIL: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """dK and dV of one block of keys: a walk over the queries that see it, for each query head of the group."""
    # The tile: key head, sequence, first key.
    program = tl.program_id(0)
    kv_head = program // slots
    sequence, block, start_k, num_keys = find_tile(cu_k, num_sequences, tokens_k, program % slots, BLOCK_N)
    column = block * BLOCK_N
    if column >= num_keys:
        return
    columns = column + tl.arange(0, BLOCK_N)
    start, num_queries = span(cu_q, sequence, num_sequences, tokens_q)
    offset = num_keys - num_queries

    # The queries, as `key_range` does for keys: those of [first, last) see some key of the block. A block of queries
    # inside [left, right) sees all its keys and needs no mask.
    first = 0
    last = num_queries
    left = 0
    right = num_queries
    if CAUSAL:
        first = tl.minimum(tl.maximum(column - offset, 0), num_queries)
        left = tl.maximum(column + BLOCK_N - 1 - offset, 0)
    if WINDOWED:
        last = tl.maximum(tl.minimum(last, tl.minimum(column + BLOCK_N, num_keys) - 1 + window - offset), 0)
        right = tl.maximum(tl.minimum(right, column + window - offset), 0)
    first = round_down(first, BLOCK_M)
    # A descriptor reads whole blocks of queries only. The rows after the last one come through pointers, with zeros,
    # few at a time: beside the tiles of the main loop, pointers for a whole block would not fit into registers.
    whole = tl.minimum(round_down(num_queries, BLOCK_M), tl.cdiv(last, BLOCK_M) * BLOCK_M)
    blocks = tl.maximum(whole - first, 0) // BLOCK_M
    tail = tl.maximum(whole, first)

    k_NC = load_rows(
        k, k_tiles, start_k, column, num_keys, kv_head, stride_k, stride_kh, BLOCK_N, WIDTH, BLOCK_WIDTH, TMA
    )
    v_NC = load_rows(
        v, v_tiles, start_k, column, num_keys, kv_head, stride_v, stride_vh, BLOCK_N, WIDTH, BLOCK_WIDTH, TMA
    )
    dk_NC = tl.zeros([BLOCK_N, BLOCK_WIDTH], tl.float32)
    dv_NC = tl.zeros([BLOCK_N, BLOCK_WIDTH], tl.float32)
    lse_rows = lse + aligned_start(start, sequence, ALIGNMENT)
    delta_rows = delta + aligned_start(start, sequence, ALIGNMENT)
    # Whole query blocks, one loop over heads and blocks. Each load is as late as possible: registers are scarce.
    for index in tl.range(0, GROUP * blocks):
        head = kv_head * GROUP + index // blocks
        row = tl.multiple_of(first + index % blocks * BLOCK_M, BLOCK_M)
        rows = row + tl.arange(0, BLOCK_M)
        q_MC = load_rows(
            q, q_tiles, start, row, num_queries, head, stride_q, stride_qh, BLOCK_M, WIDTH, BLOCK_WIDTH, TMA
        )
        do_MC = load_rows(
            dout, do_tiles, start, row, num_queries, head, stride_do, stride_doh, BLOCK_M, WIDTH, BLOCK_WIDTH, TMA
        )
        scores_NM = tl.dot(k_NC, q_MC.T, input_precision=PRECISION)
        lse_M = tl.load(lse_rows + head * stride_lse + rows)
        p_NM = tl.math.exp2(scores_NM * scale_log2 - lse_M[None, :])
        if CAUSAL or WINDOWED:
            if (row < left) | (row + BLOCK_M > right):
                seen = is_seen(rows[None, :], columns[:, None], num_keys, offset, window, CAUSAL, WINDOWED)
                p_NM = tl.where(seen, p_NM, 0.0)
        dv_NC = tl.dot(p_NM.to(do_MC.dtype), do_MC, dv_NC, input_precision=PRECISION)
        # delta has the strides of lse.
        dp_NM = tl.dot(v_NC, do_MC.T, input_precision=PRECISION)
        delta_M = tl.load(delta_rows + head * stride_lse + rows)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_NC = tl.dot(ds_NM.to(q_MC.dtype), q_MC, dk_NC, input_precision=PRECISION)
    # The last queries, TAIL at a time. lse = +inf after the end makes P 0 there.
    for index in tl.range(0, GROUP * tl.cdiv(last - tail, TAIL), num_stages=1):
        head = kv_head * GROUP + index % GROUP
        row = tail + index // GROUP * TAIL
        rows = row + tl.arange(0, TAIL)
        q_MC = load_rows(
            q, q_tiles, start, row, num_queries, head, stride_q, stride_qh, TAIL, WIDTH, BLOCK_WIDTH, False
        )
        do_MC = load_rows(
            dout, do_tiles, start, row, num_queries, head, stride_do, stride_doh, TAIL, WIDTH, BLOCK_WIDTH, False
        )
        scores_NM = tl.dot(k_NC, q_MC.T, input_precision=PRECISION)
        lse_M = tl.load(lse_rows + head * stride_lse + rows, mask=rows < num_queries, other=float("inf"))
        p_NM = tl.math.exp2(scores_NM * scale_log2 - lse_M[None, :])
        seen = is_seen(rows[None, :], columns[:, None], num_keys, offset, window, CAUSAL, WINDOWED)
        p_NM = tl.where(seen, p_NM, 0.0)
        dv_NC = tl.dot(p_NM.to(do_MC.dtype), do_MC, dv_NC, input_precision=PRECISION)
        dp_NM = tl.dot(v_NC, do_MC.T, input_precision=PRECISION)
        delta_M = tl.load(delta_rows + head * stride_lse + rows, mask=rows < num_queries, other=0.0)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_NC = tl.dot(ds_NM.to(q_MC.dtype), q_MC, dk_NC, input_precision=PRECISION)
    # Scores were scaled inside the exponent, so dK takes the scale once, here.
    store_rows(
        dk, dk_NC * scale, start_k, column, num_keys, kv_head, KV_HEADS * WIDTH, WIDTH, BLOCK_N, WIDTH, BLOCK_WIDTH
    )
    store_rows(dv, dv_NC, start_k, column, num_keys, kv_head, KV_HEADS * WIDTH, WIDTH, BLOCK_N, WIDTH, BLOCK_WIDTH)


@triton.jit(
    repr=named("attention_backward_q", "WIDTH", "CAUSAL", "WINDOWED", "BLOCK_M", "BLOCK_N"),
    do_not_specialize=["num_sequences", "tokens_q", "tokens_k", "window", "slots"],
)
def attention_backward_q_kernel(
    q,
    k,
    v,
    dout,
    q_tiles,
    k_tiles,
    v_tiles,
    do_tiles,
    lse,
    delta,
    dq,
    cu_q,
    cu_k,
    num_sequences,
    tokens_q,
    tokens_k,
    window,
    scale,
    scale_log2,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    stride_do,
    stride_doh,
    stride_lse,
    slots,
    TAIL: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """dQ of one block of queries: a walk over the keys that it sees, in the three parts of the forward."""
    kv_head, head, slot = query_tile(tl.program_id(0), slots, GROUP)
    sequence, block, start, num_queries = find_tile(cu_q, num_sequences, tokens_q, slot, BLOCK_M)
    row = block * BLOCK_M
    if row >= num_queries:
        return
    rows = row + tl.arange(0, BLOCK_M)
    start_k, num_keys = span(cu_k, sequence, num_sequences, tokens_k)
    offset = num_keys - num_queries

    first, whole, last, left, right = key_range(
        row, num_queries, num_keys, offset, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED
    )

    q_MC = load_rows(q, q_tiles, start, row, num_queries, head, stride_q, stride_qh, BLOCK_M, WIDTH, BLOCK_WIDTH, TMA)
    do_MC = load_rows(
        dout, do_tiles, start, row, num_queries, head, stride_do, stride_doh, BLOCK_M, WIDTH, BLOCK_WIDTH, TMA
    )
    # lse = +inf for rows after the end: their P is 0, so they take no part.
    row_numbers = head * stride_lse + aligned_start(start, sequence, ALIGNMENT) + rows
    lse_M = tl.load(lse + row_numbers, mask=rows < num_queries, other=float("inf"))
    delta_M = tl.load(delta + row_numbers, mask=rows < num_queries, other=0.0)
    dq_MC = tl.zeros([BLOCK_M, BLOCK_WIDTH], tl.float32)
    for part in tl.static_range(0, 3):
        # With mask at the window's edge, without mask, with mask at the diagonal, as in the forward.
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
                scores_MN = tl.dot(q_MC, k_NC.T, input_precision=PRECISION)
                p_MN = tl.math.exp2(scores_MN * scale_log2 - lse_M[:, None])
                if part != 1:
                    keys = column + tl.arange(0, BLOCK_N)
                    seen = is_seen(rows[:, None], keys[None, :], num_keys, offset, window, CAUSAL, WINDOWED)
                    p_MN = tl.where(seen, p_MN, 0.0)
                dp_MN = tl.dot(do_MC, v_NC.T, input_precision=PRECISION)
                ds_MN = p_MN * (dp_MN - delta_M[:, None])
                dq_MC = tl.dot(ds_MN.to(k_NC.dtype), k_NC, dq_MC, input_precision=PRECISION)
    # The last keys, TAIL at a time.
    for column in tl.range(whole, last, TAIL, num_stages=1):
        keys = column + tl.arange(0, TAIL)
        k_NC = load_rows(
            k, k_tiles, start_k, column, num_keys, kv_head, stride_k, stride_kh, TAIL, WIDTH, BLOCK_WIDTH, False
        )
        v_NC = load_rows(
            v, v_tiles, start_k, column, num_keys, kv_head, stride_v, stride_vh, TAIL, WIDTH, BLOCK_WIDTH, False
        )
        scores_MN = tl.dot(q_MC, k_NC.T, input_precision=PRECISION)
        p_MN = tl.math.exp2(scores_MN * scale_log2 - lse_M[:, None])
        seen = is_seen(rows[:, None], keys[None, :], num_keys, offset, window, CAUSAL, WINDOWED)
        p_MN = tl.where(seen, p_MN, 0.0)
        dp_MN = tl.dot(do_MC, v_NC.T, input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MC = tl.dot(ds_MN.to(k_NC.dtype), k_NC, dq_MC, input_precision=PRECISION)
    store_rows(dq, dq_MC * scale, start, row, num_queries, head, HEADS * WIDTH, WIDTH, BLOCK_M, WIDTH, BLOCK_WIDTH)


def _delta(out: Tensor, dout: Tensor, cu_q: Tensor) -> Tensor:
    """Sums of out * dout over the width, both (T, H, C): (H, aligned_length) fp32."""
    tokens, heads, width = out.shape
    config = configuration("attention_delta", out.device, width=shape_class(out)["width"])
    delta_shape = (heads, aligned_length(tokens, cu_q.numel() - 1))
    delta = torch.empty(delta_shape, dtype=torch.float32, device=out.device)
    assert ALIGNMENT % config["BLOCK_M"] == 0, "a tile writes its rows as a whole"
    slots = tokens // config["BLOCK_M"] + cu_q.numel()
    launch(
        attention_delta_kernel,
        (slots if tokens else 0, heads),
        out,
        dout,
        delta,
        cu_q,
        cu_q.numel() - 1,
        tokens,
        out.stride(0),
        out.stride(1),
        dout.stride(0),
        dout.stride(1),
        delta.stride(0),
        WIDTH=width,
        BLOCK_WIDTH=block_width(width),
        ALIGNMENT=ALIGNMENT,
        **config,
    )
    return delta


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attention_forward`, contiguous, bit-equal between runs."""
    (tokens, heads, width), (tokens_k, kv_heads, _) = q.shape, k.shape
    delta = _delta(out, dout, cu_q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sequences, padded = cu_q.numel() - 1, block_width(width)
    shared = {
        "GROUP": heads // kv_heads,
        "WIDTH": width,
        "BLOCK_WIDTH": padded,
        "CAUSAL": causal,
        "WINDOWED": window is not None,
        "PRECISION": "ieee",
        "ALIGNMENT": ALIGNMENT,
    }
    numbers = (sequences, tokens, tokens_k, window or 0, scale, scale * LOG2_E)
    strides = tuple(stride for x in (q, k, v, dout) for stride in x.stride()[:2]) + (lse.stride(0),)

    config, tiles = _rows_and_tiles("attention_backward_kv", q, k, v, dout)
    slots = tokens_k // config["BLOCK_N"] + cu_k.numel()
    launch(
        attention_backward_kv_kernel,
        (slots * kv_heads if tokens_k else 0,),
        q,
        k,
        v,
        dout,
        *tiles,
        lse,
        delta,
        dk,
        dv,
        cu_q,
        cu_k,
        *numbers,
        *strides,
        slots,
        KV_HEADS=kv_heads,
        TAIL=TAIL,
        **shared,
        **config,
    )

    config, tiles = _rows_and_tiles("attention_backward_q", q, k, v, dout)
    slots = tokens // config["BLOCK_M"] + cu_q.numel()
    launch(
        attention_backward_q_kernel,
        (slots * heads if tokens else 0,),
        q,
        k,
        v,
        dout,
        *tiles,
        lse,
        delta,
        dq,
        cu_q,
        cu_k,
        *numbers,
        *strides,
        slots,
        HEADS=heads,
        TAIL=TAIL,
        **shared,
        **config,
    )
    return dq, dk, dv


def _rows_and_tiles(kernel: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[dict, list]:
    """Configuration of a backward kernel, and the descriptors of q, k, v and dout, or None where it takes pointers."""
    config = dict(configuration(kernel, q.device, **shape_class(q)))
    config["TMA"] = config["TMA"] and fits_tma(q, k, v, dout)
    blocks = [config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_N"], config["BLOCK_M"]]
    return config, [row_tiles(x, n) if config["TMA"] else None for x, n in zip((q, k, v, dout), blocks)]

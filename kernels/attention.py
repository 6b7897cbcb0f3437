"""Softmax attention over packed sequences: q_THC, k_TKC, v_TKC -> out_THC."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import contiguous_rows, runs_triton, same_device, same_dtype
from .packed import check_cu_seqlens, num_packed

# Largest number of attention probabilities that the CPU path for short sequences keeps for the backward.
SHORT_PROBABILITIES = 8 * 2**20
# Sequences are padded together as long as padding makes their products at most this many times larger.
PADDED = 1.6
MAX_HEAD_WIDTH = 256


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention by padding every sequence to the longest one: plain PyTorch, any device and float dtype.

    Padding comes after the real keys of a sequence. Where queries and keys are the same tokens, a causal mask alone
    therefore excludes it.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    same_tokens = cu_seqlens_k is None
    cu_seqlens_k, max_seqlen_k = _keys(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    no_keys = mask = None
    if same_tokens:
        mask = _mask(cu_seqlens.diff(), max_seqlen, causal, window, q.device)
    else:
        max_seqlen_k = max(max_seqlen_k, 1)
        mask, no_keys = _aligned_mask(cu_seqlens.diff(), cu_seqlens_k.diff(), max_seqlen, max_seqlen_k, causal, window)
    q_SHMC, k_SHMC, v_SHMC = (
        _padded(x, cu, longest)
        for x, cu, longest in (
            (q, cu_seqlens, max_seqlen),
            (k, cu_seqlens_k, max_seqlen_k),
            (v, cu_seqlens_k, max_seqlen_k),
        )
    )
    if kv_heads != heads:
        k_SHMC = k_SHMC.repeat_interleave(heads // kv_heads, dim=1)
        v_SHMC = v_SHMC.repeat_interleave(heads // kv_heads, dim=1)
    out_SHMC = F.scaled_dot_product_attention(
        q_SHMC, k_SHMC, v_SHMC, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    if no_keys is not None:
        out_SHMC = out_SHMC.masked_fill(no_keys, 0.0)
    flat = out_SHMC.transpose(1, 2).reshape(-1, heads, v.shape[-1])
    return flat.index_select(0, _padded_slots(cu_seqlens, max_seqlen, q.shape[0]))


def _keys(cu_seqlens: Tensor, max_seqlen: int, cu_k: Tensor | None, max_k: int | None) -> tuple[Tensor, int]:
    """cu_seqlens and the longest sequence of the keys; by default those of the queries."""
    return (cu_seqlens, max_seqlen) if cu_k is None else (cu_k, max_k)


def _padded(x_TNC: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """(T, N, C) packed -> (S, N, M, C) padded with zeros."""
    num_sequences = cu_seqlens.numel() - 1
    empty = x_TNC.new_zeros(num_sequences * longest, *x_TNC.shape[1:])
    slots_T = _padded_slots(cu_seqlens, longest, x_TNC.shape[0])
    return empty.index_copy(0, slots_T, x_TNC).view(num_sequences, longest, *x_TNC.shape[1:]).transpose(1, 2)


def _aligned_mask(
    rows_S: Tensor, keys_S: Tensor, max_rows: int, max_keys: int, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """(S, 1, M, N) mask of the keys that queries see, the last query aligned with the last key, and the (S, 1, M, 1)
    queries that see none; those see key 0 in the mask, so that no softmax is taken over nothing.
    """
    query = torch.arange(max_rows, device=rows_S.device)[:, None] + (keys_S - rows_S)[:, None, None]
    key = torch.arange(max_keys, device=rows_S.device)[None, :]
    seen = (key < keys_S[:, None, None]).expand(-1, max_rows, -1)
    if causal:
        seen = seen & (key <= query)
    if window is not None:
        seen = seen & (key > query - window)
    no_keys = ~seen.any(-1, keepdim=True)
    return (seen | (no_keys & (key == 0)))[:, None], no_keys[:, None]


class _ShortAttention(torch.autograd.Function):
    """Attention through explicit (S H, M, M) probabilities. For short sequences on a CPU it is faster than the general
    path, because every product is one batched matrix product over contiguous rows.
    """

    @staticmethod
    def forward(ctx, q, k, v, slots, bias, rows, scale, slots_k, rows_k):
        q_NMC = _heads_first(q, slots, rows)
        k_NMC, v_NMC = (_heads_first(x, slots if slots_k is None else slots_k, rows_k) for x in (k, v))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k_NMC, v_NMC = k_NMC.repeat_interleave(groups, dim=0), v_NMC.repeat_interleave(groups, dim=0)
        probability = torch.baddbmm(bias, q_NMC, k_NMC.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(q_NMC, k_NMC, v_NMC, probability, slots, slots_k)
        ctx.scale, ctx.rows, ctx.rows_k, ctx.groups = scale, rows, rows_k, groups
        return _packed(probability @ v_NMC, slots, rows)

    @staticmethod
    def backward(ctx, dout):
        q_NMC, k_NMC, v_NMC, probability, slots, slots_k = ctx.saved_tensors
        dout_NMC = _heads_first(dout, slots, ctx.rows)
        dprobability = dout_NMC @ v_NMC.transpose(1, 2)
        dlogits = torch._softmax_backward_data(dprobability, probability, -1, probability.dtype).mul_(ctx.scale)
        dk_NMC, dv_NMC = dlogits.transpose(1, 2) @ q_NMC, probability.transpose(1, 2) @ dout_NMC
        if ctx.groups > 1:
            dk_NMC, dv_NMC = (x.unflatten(0, (x.shape[0] // ctx.groups, ctx.groups)).sum(1) for x in (dk_NMC, dv_NMC))
        dq = _packed(dlogits @ k_NMC, slots, ctx.rows)
        slots_k = slots if slots_k is None else slots_k
        return dq, *(_packed(x, slots_k, ctx.rows_k) for x in (dk_NMC, dv_NMC)), *(None,) * 6


def _heads_first(x_TNC: Tensor, slots_T: Tensor, rows: tuple[int, int]) -> Tensor:
    """(T, N, C) packed -> (S N, M, C) padded with zeros, contiguous; rows = (S, M)."""
    empty = x_TNC.new_zeros(rows[0] * rows[1], *x_TNC.shape[1:])
    padded = empty.index_copy_(0, slots_T, x_TNC).view(*rows, *x_TNC.shape[1:])
    return padded.transpose(1, 2).reshape(rows[0] * x_TNC.shape[1], rows[1], x_TNC.shape[2])


def _packed(x_NMC: Tensor, slots_T: Tensor, rows: tuple[int, int]) -> Tensor:
    """The inverse of `_heads_first`."""
    heads, width = x_NMC.shape[0] // rows[0], x_NMC.shape[2]
    padded = x_NMC.view(rows[0], heads, rows[1], width).transpose(1, 2)
    return padded.reshape(rows[0] * rows[1], heads, width).index_select(0, slots_T)


def _short_attention(q, k, v, cu_seqlens, max_seqlen, causal, window, scale) -> Tensor:
    num_sequences = cu_seqlens.numel() - 1
    seen = _mask(cu_seqlens[1:] - cu_seqlens[:-1], max_seqlen, causal, window or max_seqlen, q.device, always=True)
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
    bias = bias.expand(num_sequences, q.shape[1], -1, -1).reshape(-1, max_seqlen, max_seqlen) if not causal else bias[0]
    slots_T = _padded_slots(cu_seqlens, max_seqlen, q.shape[0])
    rows = (num_sequences, max_seqlen)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _ShortAttention.apply(q, k, v, slots_T, bias, rows, scale, None, rows)


def _short_aligned(q, k, v, cu_q, max_q, cu_k, max_k, causal, window, scale) -> Tensor:
    """`_short_attention` for keys that are other tokens than the queries, one run of similar sequences at a time."""
    queries, keys = cu_q.tolist(), cu_k.tolist()
    runs = _similar([b - a for a, b in pairwise(queries)], [b - a for a, b in pairwise(keys)])
    if len(runs) == 1:
        return _aligned(q, k, v, cu_q, max_q, cu_k, max_k, causal, window, scale)
    outputs = []
    for first, last, longest_q, longest_k in runs:
        run_q, run_k = (slice(bounds[first], bounds[last]) for bounds in (queries, keys))
        run_cu_q, run_cu_k = (cu[first : last + 1] - cu[first] for cu in (cu_q, cu_k))
        outputs.append(
            _aligned(q[run_q], k[run_k], v[run_k], run_cu_q, longest_q, run_cu_k, longest_k, causal, window, scale)
        )
    return torch.cat(outputs)


def _similar(queries: list[int], keys: list[int]) -> list[tuple[int, int, int, int]]:
    """Runs [first, last) of sequences, with their longest queries and keys, that padding makes at most PADDED times
    larger."""
    runs: list[tuple[int, int, int, int]] = []
    first, longest_q, longest_k, pairs = 0, 1, 1, 0
    for index, (m, n) in enumerate(zip(queries, keys)):
        new_q, new_k = max(longest_q, m), max(longest_k, n)
        if index > first and (index + 1 - first) * new_q * new_k > PADDED * (pairs + m * n):
            runs.append((first, index, longest_q, longest_k))
            first, new_q, new_k, pairs = index, max(1, m), max(1, n), 0
        longest_q, longest_k, pairs = new_q, new_k, pairs + m * n
    return [*runs, (first, len(queries), longest_q, longest_k)]


def _aligned(q, k, v, cu_q, max_q, cu_k, max_k, causal, window, scale) -> Tensor:
    """Attention of sequences of similar sizes by padding them to the longest."""
    seen, no_keys = _aligned_mask(cu_q.diff(), cu_k.diff(), max_q, max_k, causal, window)
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
    rows, rows_k = (cu_q.numel() - 1, max_q), (cu_k.numel() - 1, max_k)
    bias = bias.expand(-1, q.shape[1], -1, -1).reshape(-1, max_q, max_k)
    slots_T, slots_N = _padded_slots(cu_q, max_q, q.shape[0]), _padded_slots(cu_k, max_k, k.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out_THC = _ShortAttention.apply(q, k, v, slots_T, bias, rows, scale, slots_N, rows_k)
    if not bool(no_keys.any()):
        return out_THC
    return out_THC.masked_fill(no_keys[:, 0, :, 0].reshape(-1)[slots_T][:, None, None], 0.0)


def _padded_slots(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Tensor:
    """(T,) int64: index of each packed token in the (S * max_seqlen) padded rows."""
    lengths_S = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts_S = torch.arange(lengths_S.numel(), device=cu_seqlens.device) * max_seqlen - cu_seqlens[:-1]
    shift_T = torch.repeat_interleave(starts_S, lengths_S, output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) + shift_T


def _mask(
    rows_S: Tensor, max_seqlen: int, causal: bool, window: int | None, device: torch.device, *, always: bool = False
) -> Tensor | None:
    """None where a plain causal mask suffices; else a (1 or S, 1, M, M) boolean mask of the keys that queries see."""
    if causal and (window is None or window >= max_seqlen) and not always:
        return None
    query = torch.arange(max_seqlen, device=device)[:, None]
    key = torch.arange(max_seqlen, device=device)[None, :]
    seen = torch.ones(1, max_seqlen, max_seqlen, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (key <= query)
    else:
        seen = seen & (key < rows_S[:, None, None])
    if window is not None:
        seen = seen & (key > query - window)
    return (seen | (key == query))[:, None]


@torch.library.custom_op("wizard_engine::attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    from ._attention_forward import attention_forward

    return attention_forward(q, k, v, cu_q, cu_k, causal, window, scale)


@_forward.register_fake
def _(q, k, v, cu_q, cu_k, causal, window, scale):
    from ._attention_tiles import aligned_length

    lse_shape = (q.shape[1], aligned_length(q.shape[0], cu_q.shape[0] - 1))
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op("wizard_engine::attention_backward", mutates_args=())
def _backward(
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
    from ._attention_backward import attention_backward

    return attention_backward(dout, q, k, v, out, lse, cu_q, cu_k, causal, window, scale)


@_backward.register_fake
def _(dout, q, k, v, out, lse, cu_q, cu_k, causal, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, ctx.causal, ctx.window, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    # No zeros for a gradient that lse does not have.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _differentiate(ctx, dout, _):
    if dout is None:
        return (None,) * 8
    q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    grads = _backward(dout, q, k, v, out, lse, cu_q, cu_k, ctx.causal, ctx.window, ctx.scale)
    return *grads, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention output of packed sequences that never see each other.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j over the keys j of the same sequence. With n keys and m queries the
    last of each are aligned: query i stands at p = i + n - m. It sees the keys j <= p where causal, and
    p - window < j where a window is given: the window counts the query's own position, as Mistral does.

        m = 3, n = 5, causal    window = 2
        1 1 1 0 0               0 1 1 0 0
        1 1 1 1 0               0 0 1 1 0
        1 1 1 1 1               0 0 0 1 1

    A query that sees no key gives 0. Rows from cu_seqlens[-1] on give 0 and no gradient.

    Args:
        q: (T, H, C), fp32, fp16 or bf16 (CPU: fp64 too), last dim contiguous.   k, v: (N, K, C); K divides H (grouped
            queries). N = T unless cu_seqlens_k is given.
        cu_seqlens: (S + 1,) int32, where sequences start: first 0, not decreasing, last at most T.
        max_seqlen: longest sequence, tokens.
        cu_seqlens_k, max_seqlen_k: the same of the keys, where they are other tokens than the queries.
        window: keys seen per query, tokens, or None.
        scale: logit factor, > 0, default 1 / sqrt(C).
    Returns:
        (T, H, C), dtype of q. Differentiable in q, k and v; bit-equal between runs on one device.
    Raises:
        ValueError: ranks, shapes, dtypes, devices or strides do not fit, C > 256 on CUDA, window < 1, scale <= 0, or
            cu_seqlens do not fit (their values are checked on CPU, and on CUDA inside kernels.check_values()).
    Source: Vaswani et al. 2017; Dao 2023, arXiv:2307.08691; sliding window as in Mistral 7B (arXiv:2310.06825).
    """
    _check(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, window, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if runs_triton(q, "q"):
        if q.shape[-1] > MAX_HEAD_WIDTH:
            raise ValueError(f"q: expected heads of at most {MAX_HEAD_WIDTH} elements, got {q.shape[-1]}")
        cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        return _forward(q, k, v, cu_seqlens, cu_k, causal, window, float(scale))[0]
    return _on_torch(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, causal, window, scale)


def _on_torch(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, causal, window, scale) -> Tensor:
    """`attention` in PyTorch: explicit probabilities for short sequences on a CPU, else the reference."""
    used, used_k = num_packed(cu_seqlens, q.shape[0]), num_packed(cu_seqlens_k, k.shape[0])
    if cu_seqlens_k is None:
        used_k = used
    rows, keys, values = q[:used], k[:used_k], v[:used_k]
    probabilities = (cu_seqlens.numel() - 1) * q.shape[1] * max_seqlen * (max_seqlen_k or max_seqlen)
    if q.device.type == "cpu" and cu_seqlens_k is None and probabilities <= SHORT_PROBABILITIES:
        out = _short_attention(rows, keys, values, cu_seqlens, max_seqlen, causal, window, scale)
    elif q.device.type == "cpu" and cu_seqlens_k is not None and used and probabilities <= SHORT_PROBABILITIES:
        out = _short_aligned(
            rows, keys, values, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, causal, window, scale
        )
    else:
        out = attention_reference(
            rows,
            keys,
            values,
            cu_seqlens,
            max_seqlen,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_k=max_seqlen_k,
            causal=causal,
            window=window,
            scale=scale,
        )
    return out if used == q.shape[0] else F.pad(out, (0, 0, 0, 0, 0, q.shape[0] - used))


def _check(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, window, scale) -> None:
    has_separate_keys = cu_seqlens_k is not None
    fits = q.dim() == 3 and k.dim() == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    if not fits or (q.shape[0] != k.shape[0] and not has_separate_keys):
        expected = "(T, H, C), (N, K, C), (N, K, C)" if has_separate_keys else "(T, H, C), (T, K, C), (T, K, C)"
        raise ValueError(f"q, k, v: expected {expected}, got {[tuple(x.shape) for x in (q, k, v)]}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: the number of key heads must divide the query heads: got {k.shape[1]} and {q.shape[1]}")
    if has_separate_keys and max_seqlen_k is None:
        raise ValueError("max_seqlen_k: expected the longest key sequence beside cu_seqlens_k, got None")
    if has_separate_keys and cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(f"cu_seqlens_k: expected {tuple(cu_seqlens.shape)}, got {tuple(cu_seqlens_k.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 or None, got {window}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected > 0, got {scale}")
    same_dtype(q=q, k=k, v=v)
    same_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    contiguous_rows(q=q, k=k, v=v)
    check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0], max_seqlen)
    if has_separate_keys:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)

"""Softmax attention over packed sequences: q_THC, k_TKC, v_TKC -> out_THC."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest number of attention probabilities that the CPU path for short sequences keeps for the backward.
SHORT_PROBABILITIES = 8 * 2**20


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention by padding every sequence to the longest one: plain PyTorch, any device and float dtype.

    Padding stands behind the real keys of a sequence, so a causal mask alone keeps it out.
    """
    rows_S = cu_seqlens[1:] - cu_seqlens[:-1]
    num_sequences, heads, kv_heads = rows_S.numel(), q.shape[1], k.shape[1]
    slots_T = _padded_slots(cu_seqlens, max_seqlen, q.shape[0])
    mask = _mask(rows_S, max_seqlen, causal, window, q.device)

    def padded(x_TNC: Tensor) -> Tensor:
        empty = x_TNC.new_zeros(num_sequences * max_seqlen, *x_TNC.shape[1:])
        return empty.index_copy(0, slots_T, x_TNC).view(num_sequences, max_seqlen, *x_TNC.shape[1:]).transpose(1, 2)

    k_SHMC, v_SHMC = padded(k), padded(v)
    if kv_heads != heads:
        k_SHMC = k_SHMC.repeat_interleave(heads // kv_heads, dim=1)
        v_SHMC = v_SHMC.repeat_interleave(heads // kv_heads, dim=1)
    out_SHMC = F.scaled_dot_product_attention(
        padded(q), k_SHMC, v_SHMC, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    flat = out_SHMC.transpose(1, 2).reshape(num_sequences * max_seqlen, heads, v.shape[-1])
    return flat.index_select(0, slots_T)


class _ShortAttention(torch.autograd.Function):
    """The same through explicit (S H, M, M) probabilities: several times faster than the general path on a CPU where
    sequences are short, because every product is one batched matrix product over contiguous rows.
    """

    @staticmethod
    def forward(ctx, q, k, v, slots, bias, rows, scale):
        q_NMC, k_NMC, v_NMC = (_heads_first(x, slots, rows) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k_NMC, v_NMC = k_NMC.repeat_interleave(groups, dim=0), v_NMC.repeat_interleave(groups, dim=0)
        probability = torch.baddbmm(bias, q_NMC, k_NMC.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(q_NMC, k_NMC, v_NMC, probability, slots)
        ctx.scale, ctx.rows, ctx.groups = scale, rows, groups
        return _packed(probability @ v_NMC, slots, rows)

    @staticmethod
    def backward(ctx, dout):
        q_NMC, k_NMC, v_NMC, probability, slots = ctx.saved_tensors
        dout_NMC = _heads_first(dout, slots, ctx.rows)
        dprobability = dout_NMC @ v_NMC.transpose(1, 2)
        dlogits = torch._softmax_backward_data(dprobability, probability, -1, probability.dtype).mul_(ctx.scale)
        dk_NMC, dv_NMC = dlogits.transpose(1, 2) @ q_NMC, probability.transpose(1, 2) @ dout_NMC
        if ctx.groups > 1:
            dk_NMC, dv_NMC = (x.unflatten(0, (x.shape[0] // ctx.groups, ctx.groups)).sum(1) for x in (dk_NMC, dv_NMC))
        return *(_packed(x, slots, ctx.rows) for x in (dlogits @ k_NMC, dk_NMC, dv_NMC)), None, None, None, None


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
    return _ShortAttention.apply(q, k, v, slots_T, bias, rows, q.shape[-1] ** -0.5 if scale is None else scale)


def _padded_slots(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Tensor:
    """(T,) int64: where each packed token stands in the (S * max_seqlen) padded rows."""
    lengths_S = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts_S = torch.arange(lengths_S.numel(), device=cu_seqlens.device) * max_seqlen - cu_seqlens[:-1]
    shift_T = torch.repeat_interleave(starts_S, lengths_S, output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) + shift_T


def _mask(
    rows_S: Tensor, max_seqlen: int, causal: bool, window: int | None, device: torch.device, *, always: bool = False
) -> Tensor | None:
    """None where a plain causal mask does; otherwise a (1 or S, 1, M, M) boolean mask of the keys that are seen."""
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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention output of packed sequences that never see each other.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j over the keys j of the same sequence (j <= i where causal,
    i - window < j where a window is given: the window counts the query's own position, as Mistral does).

    Args:
        q: (T, H, C).   k, v: (T, K, C); K divides H (grouped queries).
        cu_seqlens: (S + 1,) int32, sequence starts, first 0, last T.
        max_seqlen: longest sequence, tokens.
        window: keys seen per query, tokens, or None.
        scale: logit factor, default 1 / sqrt(C).
    Returns:
        (T, H, C), dtype of q.
    Raises:
        ValueError: ranks, head counts or cu_seqlens do not fit.
    Source: Vaswani et al. 2017; sliding window as in Mistral 7B (arXiv:2310.06825).
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q, k, v: expected (T, H, C), (T, K, C), (T, K, C), got {[tuple(x.shape) for x in (q, k, v)]}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k: the number of key heads must divide the query heads: got {k.shape[1]} and {q.shape[1]}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: expected (S + 1,), got {tuple(cu_seqlens.shape)}")
    probabilities = (cu_seqlens.numel() - 1) * q.shape[1] * max_seqlen**2
    if q.device.type == "cpu" and probabilities <= SHORT_PROBABILITIES:
        return _short_attention(q, k, v, cu_seqlens, max_seqlen, causal, window, scale)
    return attention_reference(q, k, v, cu_seqlens, max_seqlen, causal=causal, window=window, scale=scale)

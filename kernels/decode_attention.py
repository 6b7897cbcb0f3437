"""Decode attention: one new token per sequence over keys and values in pages."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import runs_csrc, runs_triton, same_device, same_dtype, values_are_checked
from .paged_rows import attend_rows

PAGE_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_WIDTH = 256


def decode_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    max_length: int,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`decode_attention` by copying every sequence's keys and values together, padded to the longest."""
    batch, heads, width = q.shape
    page, kv_heads = keys.shape[1:3]
    count = max(1, -(-max_length // page))
    position = torch.arange(count * page, device=q.device)
    # Table entries after a sequence's last page are undefined.
    used = position[::page] < lengths[:, None]
    pages = page_table[:, :count].long().masked_fill(~used, 0)
    k, v = (x[pages].view(batch, count * page, kv_heads, width).transpose(1, 2) for x in (keys, values))
    seen = position < lengths[:, None]
    if window is not None:
        seen = seen & (position >= lengths[:, None] - window)
    no_keys = ~seen.any(-1)
    mask = (seen | (no_keys[:, None] & (position == 0)))[:, None, None, :]
    grouped = q.view(batch, kv_heads, heads // kv_heads, width)
    # Keys and values after a sequence's last one are undefined, perhaps NaN: 0 * NaN must not enter the sum.
    v = v.masked_fill(~seen[:, None, :, None], 0.0)
    out = F.scaled_dot_product_attention(
        grouped, k.masked_fill(~seen[:, None, :, None], 0.0), v, attn_mask=mask, scale=scale
    )
    return out.masked_fill(no_keys[:, None, None, None], 0.0).reshape(batch, heads, width)


@torch.library.custom_op("wizard_engine::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    max_length: int,
    window: int,
    scale: float,
) -> Tensor:
    keys_seen = window or None
    if runs_triton(q, "q"):
        from ._decode_attention import decode_attention as kernels

        return kernels(q, keys, values, page_table, lengths, max_length, keys_seen, scale)
    if runs_csrc(q):
        return attend_rows(q, keys, values, page_table, None, lengths, keys_seen, scale)
    out = decode_attention_reference(q, keys, values, page_table, lengths, max_length, window=keys_seen, scale=scale)
    return out.clone()


@_decode_attention.register_fake
def _(q, keys, values, page_table, lengths, max_length, window, scale):
    return torch.empty_like(q)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    max_length: int,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the last token of every sequence over its keys in pages; no gradient.

    out_bh = sum_j softmax_j(scale q_bh . k_bj) v_bj,   j from max(0, n_b - window) to n_b - 1,   n_b = lengths_b

    The query heads of a key/value head are one tile of a product. Keys are split at fixed positions, a program for each
    split, and the splits are summed in order: a sequence gets the same bits in any batch.

    Args:
        q: (B, H, C) fp32, fp16 or bf16 (CPU: fp64 too), contiguous; each the token at position lengths - 1.
        keys, values: (P, page, K, C) of q's dtype, contiguous, page one of 16 to 256; K divides H.
        page_table: (B, N) int32, the page of positions [i page, (i + 1) page) of each sequence; entries after its last
            page are not read.
        lengths: (B,) int32 keys of each sequence, its last token's included; 0 gives zeros.
        max_length: an upper bound of the lengths, at most N page, known to the host: nothing waits for the device.
        window: keys that a token sees, its own included; None: all.   scale: of the scores; None: 1 / sqrt(C).
    Returns:
        (B, H, C), dtype of q.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit; or, where values are checked, a length is above
            `max_length` or a page does not exist.
    Source: split keys as in Dao et al. 2023, "Flash-Decoding"; pages as in Kwon et al. 2023, arXiv:2309.06180.
    """
    _check(q, keys, values, page_table, lengths, max_length, window)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _decode_attention(q, keys, values, page_table, lengths, max_length, window or 0, scale)


def _check(q, keys, values, page_table, lengths, max_length, window) -> None:
    if q.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] != q.shape[2]:
        raise ValueError(
            f"q, keys, values: expected (B, H, C), (P, page, K, C) twice, got {tuple(q.shape)}, {tuple(keys.shape)}, "
            f"{tuple(values.shape)}"
        )
    (batch, heads, width), (pages, page, kv_heads, _) = q.shape, keys.shape
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"keys: expected key/value heads that divide {heads} heads, got {kv_heads}")
    if page not in PAGE_SIZES:
        raise ValueError(f"keys: expected pages of {', '.join(map(str, PAGE_SIZES))} tokens, got {page}")
    if not 1 <= width <= MAX_HEAD_WIDTH:
        raise ValueError(f"q: expected a head width of 1 to {MAX_HEAD_WIDTH}, got {width}")
    if not q.is_floating_point():
        raise ValueError(f"q: expected a float dtype, got {str(q.dtype).removeprefix('torch.')}")
    for name, tensor, shape in (("page_table", page_table, (batch, None)), ("lengths", lengths, (batch,))):
        fits = tensor.dim() == len(shape) and tensor.shape[0] == batch and tensor.dtype == torch.int32
        if not fits:
            raise ValueError(
                f"{name}: expected {'(B, N)' if len(shape) == 2 else '(B,)'} int32 with B = {batch}, got "
                f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            )
    if not 0 <= max_length <= page_table.shape[1] * page:
        raise ValueError(f"max_length: expected 0 to {page_table.shape[1] * page} (N page), got {max_length}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 or None, got {window}")
    same_dtype(q=q, keys=keys, values=values)
    same_device(q=q, keys=keys, values=values, page_table=page_table, lengths=lengths)
    for name, tensor in (
        ("q", q),
        ("keys", keys),
        ("values", values),
        ("page_table", page_table),
        ("lengths", lengths),
    ):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(tensor.stride())}")
    if values_are_checked(lengths) and batch:
        if int(lengths.min()) < 0 or int(lengths.max()) > max_length:
            wrong = ((lengths < 0) | (lengths > max_length)).nonzero()[0, 0]
            got = int(lengths[wrong])
            raise ValueError(f"lengths: expected 0 to {max_length}, got {got} of sequence {int(wrong)}")
        used = torch.arange(page_table.shape[1], device=q.device) < ((lengths + page - 1) // page)[:, None]
        wrong = (used & ((page_table < 0) | (page_table >= pages))).nonzero()
        if wrong.numel():
            row, column = wrong[0].tolist()
            raise ValueError(
                f"page_table: expected pages of 0 to {pages - 1}, got {int(page_table[row, column])} of sequence {row}"
            )

"""Attention of generation: new tokens of many sequences (decode steps and prefill chunks) over keys in pages."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .backend import runs_csrc, runs_triton, same_device, same_dtype, values_are_checked
from .decode_attention import decode_attention
from .paged_rows import attend_rows, write_rows
from .rope import MAX_HEAD_WIDTH, rope


@dataclass
class PagedBatch:
    """New tokens of a batch, packed end to end, and the keys that they see.

    Sequence s has `counts[s]` new tokens, the last of its `lengths[s]`; the first `decodes` sequences have one each.
    Rows of q after those of the last sequence are padding, and give zeros.

    Attributes:
        page_table: (S, N) int32, the pages of each sequence.   lengths: (S,) int32.   counts: tokens, on the host.
        max_length: the longest, on the host.   decodes: see above.   page: tokens of a page.
        checked: whether the values have been checked.
    """

    page_table: Tensor
    lengths: Tensor
    counts: list[int]
    max_length: int
    decodes: int
    page: int
    checked: bool = False
    _rows: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _prefill_chunks: tuple | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """New tokens in all."""
        return sum(self.counts)

    def rows(self, padded: int) -> tuple[Tensor, Tensor]:
        """(T,) int32 each: the sequence of every token, and the number of keys that it sees; 0 for padding."""
        if self._rows is None or self._rows[0].shape[0] != padded:
            counts = torch.tensor(self.counts)
            sequences = torch.repeat_interleave(torch.arange(len(self.counts)), counts)
            end = counts.cumsum(0)[sequences]
            num_keys = self.lengths.cpu()[sequences] - end + torch.arange(1, len(sequences) + 1)
            room = (0, padded - len(sequences))
            self._rows = F.pad(sequences.int(), room), F.pad(num_keys.int(), room)
        return self._rows

    def prefill_chunks(self) -> tuple[Tensor, int, Tensor, int, Tensor]:
        """Of the sequences after the first `decodes`: cu_seqlens of their tokens and the longest; cu_seqlens of their
        keys and the longest; and (N,) int64 rows of these keys in keys.view(-1, K, C)."""
        if self._prefill_chunks is None:
            device, counts = self.page_table.device, self.counts[self.decodes :]
            lengths = self.lengths[self.decodes :].long()
            cu_q = F.pad(torch.tensor(counts).cumsum(0), (1, 0)).int().to(device)
            cu_k = F.pad(lengths.cumsum(0), (1, 0))
            sequence = torch.repeat_interleave(torch.arange(len(counts), device=device), lengths)
            position = torch.arange(sequence.shape[0], device=device) - cu_k[sequence]
            pages = self.page_table[self.decodes :][sequence, position // self.page].long()
            slots = pages * self.page + position % self.page
            self._prefill_chunks = cu_q, max(counts), cu_k.int(), self.max_length, slots
        return self._prefill_chunks


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: PagedBatch,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of new tokens over the keys of their sequences in pages; no gradient.

    out_th = sum_j softmax_j(scale q_th . k_j) v_j over the keys j of t's sequence up to its own, at most `window`

    On a CPU every token is computed alone, in the order of its keys: the same bits in any batch and for any division
    into prefill chunks. On a GPU decode steps go through `decode_attention`, prefill chunks through `attention` over a
    copy of their keys.

    Args:
        q: (T, H, C) contiguous, rows of `batch`, then padding; T at least its tokens.
        keys, values: (P, page, K, C) of q's dtype, contiguous; those of the new tokens are already in them.
        window: keys that a token sees, its own included; None: all.   scale: of the scores; None: 1 / sqrt(C).
    Returns:
        (T, H, C), dtype of q.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a length or page is out of range.
    Source: pages as in Kwon et al. 2023, arXiv:2309.06180.
    """
    _check(q, keys, values, batch, window)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if runs_csrc(q):
        sequences, num_keys = batch.rows(q.shape[0])
        return attend_rows(q, keys, values, batch.page_table, sequences, num_keys, window, scale)
    n, tokens = batch.decodes, batch.tokens
    options = {"window": window, "scale": scale}
    if n == len(batch.counts) == q.shape[0]:
        return decode_attention(q, keys, values, batch.page_table, batch.lengths, batch.max_length, **options)
    out = torch.zeros_like(q) if tokens < q.shape[0] else torch.empty_like(q)
    if n:
        out[:n] = decode_attention(
            q[:n], keys, values, batch.page_table[:n], batch.lengths[:n], batch.max_length, **options
        )
    if n < len(batch.counts):
        cu_q, max_q, cu_k, max_k, slots = batch.prefill_chunks()
        k, v = (x.view(-1, *x.shape[2:]).index_select(0, slots) for x in (keys, values))
        out[n:tokens] = attention(q[n:tokens], k, v, cu_q, max_q, cu_seqlens_k=cu_k, max_seqlen_k=max_k, **options)
    return out


def _check(q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, window: int | None) -> None:
    if q.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] != q.shape[2]:
        raise ValueError(
            f"q, keys, values: expected (T, H, C), (P, page, K, C) twice, got {tuple(q.shape)}, {tuple(keys.shape)}, "
            f"{tuple(values.shape)}"
        )
    if keys.shape[1] != batch.page or keys.shape[1] % 16:
        raise ValueError(f"keys: expected pages of {batch.page} tokens, a multiple of 16, got {keys.shape[1]}")
    if not keys.shape[2] or q.shape[1] % keys.shape[2]:
        raise ValueError(f"keys: expected key/value heads that divide {q.shape[1]} heads, got {keys.shape[2]}")
    if q.shape[0] < batch.tokens:
        raise ValueError(f"q: expected at least {batch.tokens} rows, got {q.shape[0]}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 or None, got {window}")
    same_dtype(q=q, keys=keys, values=values)
    same_device(q=q, keys=keys, values=values, page_table=batch.page_table, lengths=batch.lengths)
    for name, tensor in (("q", q), ("keys", keys), ("values", values), ("page_table", batch.page_table)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(tensor.stride())}")
    if values_are_checked(q) and batch.counts and not batch.checked:
        _check_batch(batch, keys.shape[0])
        batch.checked = True


def _check_batch(batch: PagedBatch, pages: int) -> None:
    """ValueError unless counts, lengths and pages of a batch are in range."""
    lengths = batch.lengths.tolist()
    for number, (length, count) in enumerate(zip(lengths, batch.counts, strict=True)):
        if not 1 <= count <= length <= batch.max_length:
            raise ValueError(
                f"batch: expected 1 to {min(length, batch.max_length)} new tokens of {length} in sequence {number}, "
                f"got {count}"
            )
    used = torch.arange(batch.page_table.shape[1]) * batch.page < batch.lengths.cpu()[:, None]
    table = batch.page_table.cpu()
    wrong = (used & ((table < 0) | (table >= pages))).nonzero()
    if wrong.numel() or batch.max_length > table.shape[1] * batch.page:
        raise ValueError(f"batch: expected pages of 0 to {pages - 1} for every key, got {table.tolist()}")


def write_pages_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """`write_pages` by rotating q and k, and two copies."""
    kv_heads = keys.shape[2]
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    q, k = rope(q, k, cos, sin, positions)
    for cache, new in ((keys, k), (values, v)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)
    return q.contiguous()


@torch.library.custom_op("wizard_engine::write_pages", mutates_args=("keys", "values"))
def _write_pages(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor | None
) -> Tensor:
    from ._write_pages import write_pages as kernel

    return kernel(qkv, cos, sin, keys, values, slots, positions)


@_write_pages.register_fake
def _(qkv, cos, sin, keys, values, slots, positions):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * keys.shape[2], qkv.shape[2])


def write_pages(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """Queries rotated by their positions' angles; stores rotated keys, and values, in the pages. No gradient.

    One launch on CUDA.

    Args:
        qkv: (T, H + 2 K, C): heads of q, then of k, then of v; last dim contiguous.
        cos, sin: (P, C/2) fp32, see `rope_tables`.
        keys, values: (pages, page, K, C) of the same dtype, contiguous, written in place.
        slots: (T,) int64, page * page size + place in the page, for each token; padding tokens may share a slot.
        positions: (T,) int32 or int64, the row of the tables that each token takes; None: token t takes row t, P = T.
    Returns:
        (T, H, C) contiguous.
    Raises:
        ValueError: shapes or dtypes do not fit, or (where values are checked) a slot or position is out of range.
            Elsewhere a slot out of range is not written, and a token with a position out of range becomes NaN.
    """
    _check_write(qkv, cos, sin, keys, values, slots, positions)
    is_native = runs_csrc(qkv) and qkv.stride(1) == qkv.shape[2] and positions is None
    if values_are_checked(slots) and slots.numel() and not is_native:
        _check_range("slots", slots, keys.shape[0] * keys.shape[1])
        if positions is not None:
            _check_range("positions", positions, cos.shape[0])
    if is_native:
        return write_rows(qkv, cos, sin, keys, values, slots)
    if runs_triton(qkv, "qkv"):
        if qkv.shape[2] > MAX_HEAD_WIDTH:
            raise ValueError(f"qkv: expected heads of at most {MAX_HEAD_WIDTH} elements, got {qkv.shape[2]}")
        return _write_pages(qkv, cos, sin, keys, values, slots, positions)
    return write_pages_reference(qkv, cos, sin, keys, values, slots, positions)


def _check_range(name: str, values: Tensor, limit: int) -> None:
    low, high = (int(x) for x in values.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: expected 0 to {limit - 1}, got {low} to {high}")


def _check_write(qkv, cos, sin, keys, values, slots, positions) -> None:
    (tokens, heads, width), kv_heads = qkv.shape, keys.shape[2]
    if heads <= 2 * kv_heads or width != keys.shape[3] or keys.shape != values.shape or qkv.stride(2) != 1:
        raise ValueError(
            f"qkv: expected (T, H + 2 K, C) with K, C = {kv_heads}, {keys.shape[3]}, got {tuple(qkv.shape)}"
        )
    rows = tokens if positions is None else cos.shape[0]
    if slots.shape != (tokens,) or slots.dtype != torch.int64 or not cos.shape == sin.shape == (rows, width // 2):
        raise ValueError(
            f"slots, cos: expected ({tokens},) int64 and ({rows}, {width // 2}), got {tuple(slots.shape)} "
            f"{slots.dtype} and {tuple(cos.shape)}"
        )
    if positions is not None and (positions.shape != (tokens,) or positions.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"positions: expected ({tokens},) int32 or int64, got {tuple(positions.shape)} {positions.dtype}"
        )
    same_dtype(qkv=qkv, keys=keys, values=values)
    same_device(qkv=qkv, cos=cos, sin=sin, keys=keys, values=values, slots=slots, positions=positions)
    for name, tensor in (("keys", keys), ("values", values)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(tensor.stride())}")

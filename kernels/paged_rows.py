"""Attention over pages on the CPU, token by token, and writes of keys and values into pages (csrc)."""

import torch
from torch import Tensor

import csrc

LEVELS = ("plain", "avx2", "avx512")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    owners: Tensor | None,
    seen: Tensor,
    window: int | None,
    scale: float,
    *,
    level: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """(T, H, C): attention of token t over the first seen_t keys of sequence owners_t; arguments are checked.

    A token's sums run over its keys in order, so its numbers do not depend on other tokens. The code for plain x86-64,
    AVX2 and AVX-512 gives the same bits.

    Args:
        q: (T, H, C) fp32, bf16 or fp64 on the CPU.   keys, values: (P, page, K, C).   page_table: (S, N) int32.
        owners: (T,) int32 rows of the table; None: t itself.   seen: (T,) int32; 0 gives zeros.
        window: keys that a token sees, its own included.   level: of LEVELS, default the widest of this processor.
    Raises:
        ValueError: the processor lacks the level, or a page does not exist.
        MemoryError: no room for a token's scores.
    """
    (tokens, heads, width), (_, page, kv_heads, _) = q.shape, keys.shape
    out = torch.empty_like(q)
    status = csrc.library().wizard_paged_attention(
        _TYPES[q.dtype],
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        page_table.data_ptr(),
        None if owners is None else owners.data_ptr(),
        seen.data_ptr(),
        out.data_ptr(),
        tokens,
        heads,
        kv_heads,
        width,
        page,
        page_table.shape[1],
        window or 0,
        scale,
        keys.shape[0],
        page_table.shape[0],
        -1 if level is None else LEVELS.index(level),
        threads or torch.get_num_threads(),
    )
    _check(csrc.check(status, "paged attention"), level, f"lengths, page_table: expected pages below {keys.shape[0]}")
    return out


def write_rows(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *, level: str | None = None
) -> Tensor:
    """(T, H, C) rotated queries of qkv (T, H + 2 K, C), contiguous heads; stores rotated keys, and values, in slots."""
    (tokens, heads, width), kv_heads = qkv.shape, keys.shape[2]
    q = qkv.new_empty(tokens, heads - 2 * kv_heads, width)
    status = csrc.library().wizard_write_pages(
        _TYPES[q.dtype],
        qkv.data_ptr(),
        qkv.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        tokens,
        q.shape[1],
        kv_heads,
        width,
        keys.shape[0] * keys.shape[1],
        -1 if level is None else LEVELS.index(level),
    )
    _check(status, level, f"slots: expected 0 to {keys.shape[0] * keys.shape[1] - 1}")
    return q


def _check(status: int, level: str | None, expected: str) -> None:
    if status == -2:
        raise ValueError(f"level: expected one that this processor has, got {level}")
    if status < 0:
        raise ValueError(f"{expected} for every token, got others")

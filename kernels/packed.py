"""Boundaries of packed sequences: the checks that every operation on them shares."""

from itertools import pairwise

import torch
from torch import Tensor

from .backend import values_are_checked


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int, longest: int) -> None:
    """ValueError unless `cu_seqlens` is (S + 1,) int32, starts at 0, does not decrease, ends at most at `tokens`, and
    no sequence is longer than `longest`.

    Values are checked where that needs no wait for a device; see `kernels.check_values`.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name}: expected (S + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name}: expected int32, got {str(cu_seqlens.dtype).removeprefix('torch.')}; use .int()")
    if not values_are_checked(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name}: expected 0 first, got {bounds[0]}")
    lengths = [end - start for start, end in pairwise(bounds)]
    if min(lengths) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"{name}: expected marks that do not decrease, got {bounds[at]}, {bounds[at + 1]} at {at}")
    if bounds[-1] > tokens:
        raise ValueError(f"{name}: expected at most {tokens} (the tokens) last, got {bounds[-1]}")
    if max(lengths) > longest:
        raise ValueError(f"{name}: expected sequences of at most {longest} (max_seqlen), got one of {max(lengths)}")


def num_packed(cu_seqlens: Tensor | None, tokens: int) -> int:
    """Tokens before the padding at the end of the row; in a trace, which allows no padding, all of them."""
    return tokens if cu_seqlens is None or torch.compiler.is_compiling() else int(cu_seqlens[-1])


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) int64, the sequence of each token; S for padding at the end of the row."""
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:], right=True)

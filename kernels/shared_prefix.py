"""Attention of packed sequences of which several begin with the same tokens, which are there once."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .attention import attention
from .backend import to_device


@dataclass(frozen=True)
class Prefixes:
    """A packed row of P tokens of prefixes, then the continuations; takes the place of cu_seqlens.

    cu_prefixes: (G + 1,) int32, where prefixes start, then P.   max_prefix: the longest.
    cu_tails: (S + 1,) int32, where continuations start behind the first P tokens, then their number.   max_tail.
    cu_keys: (S + 1,) int32, where the keys of each continuation start, its prefix's and its own.   max_keys.
    keys: (N,) int64 rows of those keys.   previous: (T,) int64, the row of the token before each, its own at a
    beginning.   prefix_tokens: P.   tokens: of the row; both on the host.
    """

    cu_prefixes: Tensor
    max_prefix: int
    cu_tails: Tensor
    max_tail: int
    cu_keys: Tensor
    max_keys: int
    keys: Tensor
    previous: Tensor
    prefix_tokens: int
    tokens: int

    def to(self, device: torch.device | str) -> "Prefixes":
        """The same with its tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: to_device(x, device) for name, x in tensors.items()})


class _Pick(torch.autograd.Function):
    """Rows of x, some of them several times; gradients of a row are added in one order."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy):
        (rows,) = ctx.saved_tensors
        dx = dy.new_zeros(ctx.shape)
        # On a GPU `index_put_` sorts where `index_add_` would race.
        return (dx.index_put_((rows,), dy, accumulate=True) if dy.is_cuda else dx.index_add_(0, rows, dy)), None


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """(N, ...) rows of x (T, ...), any of them as often as it is named; bit-equal gradients between runs.

    Args:
        rows: (N,) int64, 0 to T - 1.
    """
    return _Pick.apply(x, rows)


def shared_attention(
    q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention in which every continuation sees its prefix and itself; rows behind the last give 0.

    The same numbers as `attention` of whole sequences, with each prefix computed once.

    Args:
        q: (T, H, C), prefixes first, then continuations, then padding.   k, v: (T, K, C).
        window: keys seen per query, the own included, as in `attention`.   scale: of the scores.
    Returns:
        (T, H, C). Differentiable in q, k and v.
    Raises:
        ValueError: as `attention`, or fewer rows than `prefixes` has.
    """
    first, tokens = prefixes.prefix_tokens, prefixes.tokens
    if q.shape[0] < tokens:
        raise ValueError(f"q: expected at least {tokens} rows, got {q.shape[0]}")
    options = {"window": window, "scale": scale}
    before = attention(q[:first], k[:first], v[:first], prefixes.cu_prefixes, prefixes.max_prefix, **options)
    behind = attention(
        q[first:], pick(k, prefixes.keys), pick(v, prefixes.keys), prefixes.cu_tails, prefixes.max_tail,
        cu_seqlens_k=prefixes.cu_keys, max_seqlen_k=prefixes.max_keys, **options,
    )  # fmt: skip
    return torch.cat((before, behind))

"""Attention of packed sequences with shared prefixes, each of which is in the row once."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .attention import attention
from .backend import to_device


@dataclass(frozen=True)
class Prefixes:
    """A packed row of P tokens of prefixes, then their continuations; takes the place of cu_seqlens.

    cu_prefixes: (G + 1,) int32, where prefixes start, then P.   max_prefix: the longest.
    cu_tails: (S + 1,) int32, where continuations start, counted from token P, then their number of tokens.   max_tail:
    the longest.
    cu_keys: (S + 1,) int32, where the keys of each continuation start: those of its prefix, then its own.   max_keys:
    the most.   keys: (N,) int64 rows of those keys.
    previous: (T,) int64, the row of the token before each; for the first token of a prefix, the token itself.
    prefix_tokens: P.   tokens: tokens of the row; both on the host.
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
    """Rows of x, some of them repeated; the gradients of a row are added in one order."""

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
    """(N, ...) rows of x (T, ...), with repeats; gradients are bit-equal between runs.

    Args:
        rows: (N,) int64, 0 to T - 1.
    """
    return _Pick.apply(x, rows)


def shared_attention(
    q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention in which every continuation sees its prefix and itself; padding rows at the end give 0.

    The result is that of `attention` over whole sequences, with each prefix computed once.

    Args:
        q: (T, H, C), prefixes first, then continuations, then padding.   k, v: (T, K, C).
        window: keys that a query sees, its own included, as in `attention`.   scale: of the scores.
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
        q[first:],
        pick(k, prefixes.keys),
        pick(v, prefixes.keys),
        prefixes.cu_tails,
        prefixes.max_tail,
        cu_seqlens_k=prefixes.cu_keys,
        max_seqlen_k=prefixes.max_keys,
        **options,
    )
    return torch.cat((before, behind))

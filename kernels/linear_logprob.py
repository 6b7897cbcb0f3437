"""Log-probabilities of target tokens straight from hidden states: never a whole (T, V) matrix of logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _linear_logprob_chunks as chunks
from .backend import contiguous_rows, runs_triton, same_device, same_dtype, values_are_checked


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature) at the targets, and the entropy, with full logits."""
    logprob_TV = (chunks.wide(hidden) @ chunks.wide(weight).T / temperature).log_softmax(-1)
    chosen_T = logprob_TV.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    finite_TV = logprob_TV.clamp(min=torch.finfo(logprob_TV.dtype).min)
    entropy_T = -(logprob_TV.exp() * finite_TV).sum(-1)
    ignored_T = targets < 0
    return chosen_T.masked_fill(ignored_T, 0.0), entropy_T.masked_fill(ignored_T, 0.0)


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's shard of the vocabulary, and of the tokens where they are sharded too.

    start: the first vocabulary entry of the shard.   vocab_size: entries of the whole vocabulary.
    gather: from this rank's (4, T) statistics to those of all shards, (n, 4, T).
    take_local: where tokens are sharded, from per-token values (T,) and a value for padding to those of this rank's
    hidden states, (t,).   gather_tokens: the inverse for statistics, from (4, t) and T to (4, T).
    """

    start: int
    vocab_size: int
    gather: Callable[[Tensor], Tensor]
    take_local: Callable[[Tensor, int], Tensor] | None = None
    gather_tokens: Callable[[Tensor, int], Tensor] | None = None

    def local_values(self, values_T: Tensor, fill: int = 0) -> Tensor:
        """Per-token values of this rank's hidden states."""
        return values_T if self.take_local is None else self.take_local(values_T, fill)

    def all_tokens(self, statistics: Tensor, tokens: int) -> Tensor:
        """(4, T) statistics of all tokens from those of this rank's."""
        return statistics if self.gather_tokens is None else self.gather_tokens(statistics, tokens)


@torch.library.custom_op("wizard_engine::linear_logprob_statistics", mutates_args=())
def statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, start: int
) -> Tensor:
    """(4, T) statistics of checked tensors: see `linear_logprob_partial`."""
    if runs_triton(hidden, "hidden"):
        from ._linear_logprob import linear_logprob_statistics

        return linear_logprob_statistics(hidden, weight, targets, temperature, entropy, start)
    return chunks.statistics(hidden, weight, targets, temperature, entropy, start)


@statistics.register_fake
def _(hidden, weight, targets, temperature, entropy, start):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((4, targets.shape[0]), dtype=dtype)


@torch.library.custom_op("wizard_engine::linear_logprob_gradients", mutates_args=())
def gradients(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    temperature: float,
    start: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> list[Tensor]:
    """dhidden (T, D) and dweight (V, D), empty where they are not needed."""
    arguments = dlogprob, dentropy, hidden, weight, targets, statistics, temperature, start, needs_hidden, needs_weight
    if runs_triton(hidden, "hidden"):
        from ._linear_logprob import linear_logprob_gradients

        grads = linear_logprob_gradients(*arguments)
    else:
        grads = chunks.gradients(*arguments)
    return [x.new_empty(0) if dx is None else dx for x, dx in zip((hidden, weight), grads)]


@gradients.register_fake
def _(dlogprob, dentropy, hidden, weight, targets, statistics, temperature, start, needs_hidden, needs_weight):
    needed = ((hidden, needs_hidden), (weight, needs_weight))
    return [x.new_empty(x.shape if is_needed else (0,)) for x, is_needed in needed]


def gathered(local: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Statistics of the whole vocabulary from this rank's."""
    return local if shard is None else chunks.merge(shard.gather(local))


class _LinearLogprob(torch.autograd.Function):
    """Saves four numbers per token; the backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, shard):
        start, local_targets = (0, targets) if shard is None else (shard.start, shard.local_values(targets, -1))
        row_statistics = gathered(statistics(hidden, weight, local_targets, temperature, entropy, start), shard)
        ctx.save_for_backward(hidden, weight, local_targets, row_statistics)
        ctx.temperature, ctx.entropy, ctx.start, ctx.shard = temperature, entropy, start, shard
        if shard is not None:
            row_statistics = shard.all_tokens(row_statistics, targets.shape[0])
        logprob_T, entropy_T = chunks.finish(row_statistics, targets)
        ctx.mark_non_differentiable(*([] if entropy else [entropy_T]))
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx, dlogprob_T, dentropy_T):
        needed = ctx.needs_input_grad[:2]
        loss_grads = [dlogprob_T, dentropy_T if ctx.entropy else None]
        if ctx.shard is not None:
            loss_grads = [None if x is None else ctx.shard.local_values(x) for x in loss_grads]
        loss_grads = [None if x is None else x.contiguous() for x in loss_grads]
        grads = gradients(*loss_grads, *ctx.saved_tensors, ctx.temperature, ctx.start, *needed)
        dhidden, dweight = (dx if is_needed else None for dx, is_needed in zip(grads, needed))
        return dhidden, dweight, None, None, None, None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target token and entropy of its distribution.

    logprob_i = log softmax(weight hidden_i / temperature)[targets_i],   entropy_i = -sum_v p_iv log p_iv

    Logits have at least fp32 and are never stored as a whole: the forward keeps four numbers per token, and the
    backward computes the logits again, in at most 256 MiB besides the fp32 sums of the two gradients. A loss of these
    numbers is cheaper as one autograd node: see `linear_loss`.

    Args:
        hidden: (T, D) fp32, fp16 or bf16 (CPU: fp64 too).   weight: (V, D), dtype of hidden; last dims contiguous.
        targets: (T,) int64, 0 to V - 1; -1 is ignored: it gives 0 and no gradient, for any hidden state. (On CUDA the
            hidden state must be finite where the weight needs a gradient: the products take all rows.)
        temperature: divides the logits, > 0.   entropy: whether to compute the entropy.
        shard: for a vocabulary that is sharded over ranks: `weight` is then this rank's shard (v, D), targets count in
            the whole vocabulary, results are those of the whole, and the gradient of `hidden` is this rank's part, to
            be summed over ranks. Where tokens are sharded too, `hidden` (t, D) is this rank's; targets and results are
            those of all tokens, the same on every rank.
    Returns:
        logprob: (T,) fp32 (fp64 for fp64 input), nats.   entropy: the same, or None. Both differentiable in hidden and
        weight. Infinite or NaN logits give a NaN.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, temperature is not positive and finite, or a target
            is out of range (values are checked on CPU, and on CUDA inside kernels.check_values(); elsewhere such a
            target gives -inf).
    Source: online log-sum-exp, Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    check(hidden, weight, targets, temperature, shard)
    logprob_T, entropy_T = _LinearLogprob.apply(hidden, weight, targets, float(temperature), entropy, shard)
    return logprob_T, entropy_T if entropy else None


def linear_logprob_partial(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(4, T) statistics of a shard of the vocabulary, without gradients.

    For each token, over the shard's logits z: m = max z, sum exp(z - m), the target's z (-inf where another shard has
    it), sum (z - m) exp(z - m). `merge_partials` combines those of all shards.

    Args:
        hidden: (T, D).   weight: (v, D), entries `start` to `start + v` of `vocab_size` (default: start + v).
        targets: (T,) int64, in the whole vocabulary; -1 is ignored.   temperature: divides the logits, > 0.
    Raises:
        ValueError: as `linear_logprob`.
    """
    shard = VocabularyShard(
        start, start + weight.shape[0] if vocab_size is None else vocab_size, lambda local: local[None]
    )
    check(hidden, weight, targets, temperature, shard)
    with torch.no_grad():
        return statistics(hidden, weight, targets, float(temperature), True, start)


def merge_partials(parts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy, (T,) each, from the (n, 4, T) statistics of all shards, in any order.

    Raises:
        ValueError: another shape.
    """
    if parts.dim() != 3 or parts.shape[1:] != (4, targets.numel()) or not parts.shape[0]:
        raise ValueError(f"parts: expected (n, 4, {targets.numel()}), got {tuple(parts.shape)}")
    return chunks.finish(chunks.merge(parts), targets)


def check(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, shard: VocabularyShard | None = None
) -> None:
    """ValueError unless the arguments of `linear_logprob` fit."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"hidden, weight: expected (T, D), (V, D) with V >= 1, got {tuple(hidden.shape)}, {tuple(weight.shape)}"
        )
    tokens = targets.shape if shard is None else shard.local_values(targets, -1).shape
    if tokens != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: expected ({hidden.shape[0]},) int64, got {tuple(targets.shape)} "
            f"{str(targets.dtype).removeprefix('torch.')}"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: expected a float dtype, got {str(hidden.dtype).removeprefix('torch.')}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected > 0 and finite, got {temperature}")
    same_dtype(hidden=hidden, weight=weight)
    same_device(hidden=hidden, weight=weight, targets=targets)
    contiguous_rows(hidden=hidden, weight=weight)
    _check_values(targets, weight.shape[0] if shard is None else shard.vocab_size)


def _check_values(targets: Tensor, vocab_size: int) -> None:
    if not values_are_checked(targets) or not targets.numel():
        return
    low, high = torch.aminmax(targets)
    if int(low) < -1 or int(high) >= vocab_size:
        wrong = ((targets < -1) | (targets >= vocab_size)).nonzero()[0, 0]
        raise ValueError(
            f"targets: expected -1 (ignored) to {vocab_size - 1}, got {int(targets[wrong])} at token {int(wrong)}"
        )

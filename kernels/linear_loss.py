"""Losses of log-probabilities as one autograd node, from hidden states to the loss: never a (T, V) matrix of logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _linear_logprob_chunks as chunks
from .backend import runs_triton
from .linear_logprob import VocabularyShard, check, gathered, gradients, statistics

Metrics = dict[str, Tensor]


class LossOutput(NamedTuple):
    """Loss, metrics and log-probabilities of a step on this rank.

    loss: () fp32, this rank's part; the sum over ranks is the loss.   metrics: sums over this rank's tokens or pairs,
    detached.   logprob: (T,) fp32, detached, 0 where a target is ignored; where the loss is not finite, it shows which
    token is the cause.
    """

    loss: Tensor
    metrics: Metrics
    logprob: Tensor


class TokenLoss:
    """A loss of per-token log-probabilities, and entropies where `uses_entropy`.

    is_separable: whether a token's gradient depends on that token alone. Then, on CPU, the gradients of a chunk are
    computed together with its logits, and no logit is computed twice.
    """

    is_separable = True
    uses_entropy = False

    def value(self, logprob: Tensor, entropy: Tensor | None, rows: Tensor | slice) -> tuple[Tensor, Metrics]:
        """The loss of tokens `rows`, and its metrics, in plain PyTorch: the reference.

        Args:
            logprob, entropy: (N,) of these tokens; 0 where a target is ignored, which must not count.
        """
        raise NotImplementedError

    def grads(
        self, logprob: Tensor, entropy: Tensor | None, rows: Tensor | slice
    ) -> tuple[Tensor, Metrics, Tensor, Tensor | None]:
        """Loss, metrics, and the loss's gradients in `logprob` and `entropy`."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (logprob, entropy) if x is not None]
            loss, metrics = self.value(*leaves, *([] if entropy is not None else [None]), rows)
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return loss.detach(), metrics, grads[0], grads[1] if entropy is not None else None


class _LinearLoss(torch.autograd.Function):
    """Computes its gradients in the forward where a chunk suffices for them; else in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, formula, shard, metrics):
        ctx.gradients, ctx.dtypes = None, (hidden.dtype, weight.dtype)
        work = _in_one_pass if _is_one_pass(ctx, hidden, weight, targets, formula, shard) else _in_two_passes
        loss, row_statistics = work(ctx, hidden, weight, targets, temperature, formula, shard, metrics)
        logprob_T, _ = chunks.finish(row_statistics, targets)
        ctx.mark_non_differentiable(logprob_T)
        return loss, logprob_T

    @staticmethod
    def backward(ctx, dloss, _):
        needed = ctx.needs_input_grad[:2]
        if ctx.saved_tensors:
            *tensors, dlogprob_T, dentropy_T = ctx.saved_tensors
            dlogprob_T, dentropy_T = (None if x is None else x * dloss for x in (dlogprob_T, dentropy_T))
            grads = gradients(dlogprob_T, dentropy_T, *tensors, ctx.temperature, ctx.start, *needed)
        else:
            if ctx.gradients is None:
                raise RuntimeError("loss: expected one backward; its gradients were given away by the first")
            grads, ctx.gradients = ctx.gradients, None
            grads = [_scaled(gradient, dloss, dtype) for gradient, dtype in zip(grads, ctx.dtypes)]
        return *(dx if is_needed else None for dx, is_needed in zip(grads, needed)), *[None] * 5


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient times a number, in place, then rounded."""
    if gradient is None:
        return None
    return (gradient if factor == 1 else gradient.mul_(factor)).to(dtype)


def _is_one_pass(ctx, hidden, weight, targets, formula, shard) -> bool:
    if shard is not None or not any(ctx.needs_input_grad[:2]) or runs_triton(hidden, "hidden"):
        return False
    kept = int((targets >= 0).sum())
    return kept > 0 and (formula.is_separable or chunks.fits_one_chunk(kept, weight.shape[0]))


def _in_one_pass(ctx, hidden, weight, targets, temperature, formula, shard, metrics) -> tuple[Tensor, Tensor]:
    losses = []

    def loss_grads(logprob_N, entropy_N, rows):
        loss, chunk_metrics, *grads = formula.grads(logprob_N, entropy_N, rows)
        losses.append(loss)
        for name, value in chunk_metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
        return grads

    row_statistics, *ctx.gradients = chunks.one_pass(
        hidden, weight, targets, temperature, formula.uses_entropy, loss_grads, *ctx.needs_input_grad[:2]
    )
    return sum(losses[1:], start=losses[0]), row_statistics


def _in_two_passes(ctx, hidden, weight, targets, temperature, formula, shard, metrics) -> tuple[Tensor, Tensor]:
    start, local_targets = (0, targets) if shard is None else (shard.start, shard.local_values(targets, -1))
    local_statistics = gathered(
        statistics(hidden, weight, local_targets, temperature, formula.uses_entropy, start), shard
    )
    row_statistics = local_statistics if shard is None else shard.all_tokens(local_statistics, targets.shape[0])
    logprob_T, entropy_T = chunks.finish(row_statistics, targets)
    loss, values, *loss_grads = formula.grads(logprob_T, entropy_T if formula.uses_entropy else None, slice(None))
    metrics |= values
    if shard is not None:
        loss_grads = [None if x is None else shard.local_values(x).contiguous() for x in loss_grads]
    ctx.save_for_backward(hidden, weight, local_targets, local_statistics, *loss_grads)
    ctx.temperature, ctx.start = temperature, start
    return loss, row_statistics


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    formula: TokenLoss,
    *,
    temperature: float = 1.0,
    shard: VocabularyShard | None = None,
) -> LossOutput:
    """A loss of the targets' log-probabilities, with its gradients in the hidden states and the head.

    On CPU a separable loss, or one whose tokens fit one chunk of logits, computes its gradients in the forward, in one
    pass over the logits; the first backward hands them out and frees them. Otherwise the backward computes the logits
    again.

    Args:
        hidden, weight, targets, temperature, shard: as in `linear_logprob`.   formula: the loss per token.
    Returns:
        LossOutput; `loss` is differentiable in hidden and weight, once.
    Raises:
        ValueError: as in `linear_logprob`.
    """
    check(hidden, weight, targets, temperature, shard)
    metrics: Metrics = {}
    loss, logprob_T = _LinearLoss.apply(hidden, weight, targets, float(temperature), formula, shard, metrics)
    return LossOutput(loss, metrics, logprob_T)


def check_per_token(targets: Tensor, **tensors: Tensor | None) -> None:
    """ValueError unless every tensor that is not None has the shape and device of `targets`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != targets.shape:
            raise ValueError(f"{name}: expected {tuple(targets.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != targets.device:
            raise ValueError(f"{name}: expected the device of targets, {targets.device}, got {tensor.device}")


def check_positive(**numbers: float) -> None:
    """ValueError unless every number is above 0 and finite."""
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"{name}: expected > 0 and finite, got {number}")

"""Weighted cross-entropy of target tokens, from hidden states to the loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_logprob import VocabularyShard
from .linear_loss import LossOutput, Metrics, TokenLoss, check_per_token, check_positive, linear_loss


def cross_entropy_reference(logprob: Tensor, weights: Tensor, *, num_tokens: float) -> Tensor:
    """-sum_i weights_i logprob_i / num_tokens."""
    return -(weights * logprob).sum() / num_tokens


@dataclass
class _CrossEntropy(TokenLoss):
    weights: Tensor
    num_tokens: float

    def value(self, logprob: Tensor, entropy: Tensor | None, rows: Tensor | slice) -> tuple[Tensor, Metrics]:
        return cross_entropy_reference(logprob, self.weights[rows], num_tokens=self.num_tokens), {}

    def grads(self, logprob, entropy, rows):
        loss, metrics = self.value(logprob, entropy, rows)
        return loss, metrics, self.weights[rows] * (-1.0 / self.num_tokens), None


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    num_tokens: float,
    shard: VocabularyShard | None = None,
) -> LossOutput:
    """Weighted negative log-likelihood of this rank's targets.

    loss = -sum_i weights_i log softmax(weight hidden_i)[targets_i] / num_tokens

    Args:
        hidden: (T, D).   weight: (V, D).   targets: (T,) int64; -1 is ignored.
        weights: (T,) fp32; tokens of weight 0 take no part and cost no products on CPU.
        num_tokens: supervised tokens of the step over all ranks and micro-batches, > 0.
        shard: see `linear_logprob`.
    Returns:
        LossOutput without metrics; 0 with zero gradients where no token has a weight.
    Raises:
        ValueError: shapes or devices do not fit, a target is out of range, or num_tokens is not positive.
    """
    check_per_token(targets, weights=weights)
    check_positive(num_tokens=num_tokens)
    weighted_targets = torch.where(weights != 0, targets, -1)
    return linear_loss(hidden, weight, weighted_targets, _CrossEntropy(weights, float(num_tokens)), shard=shard)

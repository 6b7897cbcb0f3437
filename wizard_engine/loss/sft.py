"""Supervised loss."""

from torch import Tensor


def sft_loss(logprob: Tensor, weights: Tensor, *, num_tokens: float) -> Tensor:
    """Weighted negative log-likelihood of this rank's targets.

    loss = -sum_i weights_i logprob_i / num_tokens

    Args:
        logprob, weights: (T,).   num_tokens: supervised tokens of the step over all ranks and micro-batches.
    Returns:
        () fp32.
    """
    return -(weights * logprob).sum() / num_tokens

"""Clipped policy and value losses of proximal policy optimisation, and KL estimators."""

import torch
from torch import Tensor


def policy_loss(
    logprob: Tensor, behaviour: Tensor, advantages: Tensor, *, clip: float, num_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss over the answer tokens of this rank.

    ratio = exp(logprob - behaviour);  loss = sum_i max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)) / num_tokens

    Args:
        logprob, behaviour, advantages: (N,) fp32 of the answer tokens alone; behaviour as recorded when sampling.
        clip: half width of the trust interval, > 0.   num_tokens: answer tokens of the step over all ranks.
    Returns:
        loss: () fp32.   metrics: sums over tokens (clip_fraction, approx_kl by k3, ratio).
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    if clip <= 0:
        raise ValueError(f"clip: expected > 0, got {clip}")
    difference = logprob - behaviour
    ratio = difference.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        metrics = {
            "clip_fraction": (clipped > plain).float().sum(),
            "approx_kl": (ratio - 1 - difference).sum(),
            "ratio": ratio.sum(),
        }
    return torch.maximum(plain, clipped).sum() / num_tokens, metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float, num_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped squared error of the critic.

    loss = sum_i max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / (2 num_tokens)

    Args:
        values, old_values, returns: (N,) fp32.   clip: largest move of a value that still pays, > 0.
    Returns:
        loss: () fp32.   metrics: sums over tokens (value_clip_fraction, value_error).
    """
    moved = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (moved - returns).square()
    with torch.no_grad():
        metrics = {"value_clip_fraction": (clipped > plain).float().sum(), "value_error": plain.sum()}
    return 0.5 * torch.maximum(plain, clipped).sum() / num_tokens, metrics


def kl_estimates(logprob: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Per-token estimators of KL(policy, reference) from sampled tokens: k1 (unbiased) and k3 (never negative).

    k1 = log p - log r;  k3 = r / p - 1 - log(r / p)

    Source: Schulman 2020, "Approximating KL divergence".
    """
    difference = reference - logprob
    return {"k1": -difference, "k3": difference.exp() - 1 - difference}

"""Generalised advantage estimation over packed answers."""

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, lengths: list[int], *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed answers.

    delta_t = r_t + gamma V_{t+1} - V_t (V after the last token is 0);  A_t = delta_t + gamma lam A_{t+1}

    Args:
        rewards, values: (N,) fp32, the answers' tokens end to end.
        lengths: tokens of each answer; they sum to N.
    Returns:
        advantages, returns = advantages + values: (N,) fp32 each.
    Raises:
        ValueError: the lengths do not sum to N.
    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    if sum(lengths) != rewards.numel() or rewards.shape != values.shape:
        raise ValueError(f"lengths: expected a sum of {rewards.numel()}, got {sum(lengths)}")
    width = max(lengths, default=0)
    steps = torch.tensor(lengths)
    inside = torch.arange(width)[None, :] < steps[:, None]
    rewards_SM, values_SM = (_pad(x, inside) for x in (rewards, values))
    advantages_SM, carry = torch.zeros_like(rewards_SM), rewards.new_zeros(len(lengths))
    following = torch.cat((values_SM[:, 1:], values_SM.new_zeros(len(lengths), 1)), dim=1) if width else values_SM
    for t in reversed(range(width)):
        delta = rewards_SM[:, t] + gamma * following[:, t] - values_SM[:, t]
        carry = (delta + gamma * lam * carry) * inside[:, t]
        advantages_SM[:, t] = carry
    advantages = advantages_SM[inside]
    return advantages, advantages + values


def _pad(x: Tensor, inside: Tensor) -> Tensor:
    out = x.new_zeros(inside.shape)
    out[inside] = x
    return out


def whiten(x: Tensor, mean: float, variance: float) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), with moments over all ranks given by the caller."""
    return (x - mean) * (variance + 1e-8) ** -0.5

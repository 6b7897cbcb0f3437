"""Generalised advantage estimation over packed sequences, and masked whitening."""

from collections.abc import Callable

import torch
from torch import Tensor

from .backend import contiguous_rows, runs_triton, same_device, same_dtype
from .packed import check_cu_seqlens


def gae_reference(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """The recursion from the last token of every sequence to the first, all sequences side by side."""
    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    width = int(lengths.max())
    inside_SM = torch.arange(width, device=rewards.device)[None, :] < lengths[:, None]
    place_SM = (starts[:, None] + torch.arange(width, device=rewards.device)).clamp(max=max(rewards.numel() - 1, 0))
    rewards_SM, values_SM = (torch.where(inside_SM, x[place_SM], 0.0) for x in (rewards, values))
    following_SM = torch.cat((values_SM[:, 1:], values_SM.new_zeros(len(lengths), 1)), dim=1) if width else values_SM
    advantages_SM, carry_S = torch.zeros_like(rewards_SM), rewards.new_zeros(len(lengths))
    for t in reversed(range(width)):
        delta_S = rewards_SM[:, t] + gamma * following_SM[:, t] - values_SM[:, t]
        carry_S = (delta_S + gamma * lam * carry_S) * inside_SM[:, t]
        advantages_SM[:, t] = carry_S
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    advantages[place_SM[inside_SM]] = advantages_SM[inside_SM]
    returns[place_SM[inside_SM]] = (advantages_SM + values_SM)[inside_SM]
    return advantages, returns


@torch.library.custom_op("wizard_engine::gae", mutates_args=())
def _scan(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    from ._gae import gae_scan

    return gae_scan(rewards, values, cu_seqlens, gamma, lam)


@_scan.register_fake
def _(rewards, values, cu_seqlens, gamma, lam):
    return torch.empty_like(rewards), torch.empty_like(rewards)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the tokens of packed answers.

    delta_t = r_t + gamma V_{t+1} - V_t (V after a sequence's last token is 0),   A_t = delta_t + gamma lam A_{t+1}

    Args:
        rewards, values: (N,) fp32 (CPU: fp64 too), one dtype, contiguous, the answers' tokens end to end.
        cu_seqlens: (S + 1,) int32, where each answer starts, then where the last one ends.
        gamma: discount, and lam: decay of the trace, each in [0, 1].
    Returns:
        advantages and returns = advantages + values, (N,) each; 0 after the last answer, for any input there. Not
        differentiable. Bit-equal between runs.
    Raises:
        ValueError: shapes, dtypes, devices, boundaries or a number do not fit.
    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    _check(rewards, values, cu_seqlens, gamma, lam)
    if runs_triton(rewards, "rewards"):
        return _scan(rewards, values, cu_seqlens, float(gamma), float(lam))
    return gae_reference(rewards, values, cu_seqlens, gamma=gamma, lam=lam)


def _check(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> None:
    if rewards.dim() != 1 or rewards.shape != values.shape:
        raise ValueError(f"rewards, values: expected (N,) each, got {tuple(rewards.shape)}, {tuple(values.shape)}")
    if rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rewards: expected float32 or float64, got {str(rewards.dtype).removeprefix('torch.')}")
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: expected 0 to 1, got {number}")
    check_cu_seqlens("cu_seqlens", cu_seqlens, rewards.numel(), rewards.numel())
    same_dtype(rewards=rewards, values=values)
    same_device(rewards=rewards, values=values, cu_seqlens=cu_seqlens)
    contiguous_rows(rewards=rewards, values=values)


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    moments: Callable[[float, float, float], tuple[float, float, float]] | None = None,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
) -> Tensor:
    """Numbers of mean 0 and variance 1: (x - mean) / (std + epsilon), 0 where the mask is 0, even for NaN.

    Args:
        x: (N,).   mask: (N,) bool, what takes part; default: all.
        moments: function of (sum, sum of squares, count) on this rank that gives the totals over ranks.
        shift_mean: False adds the mean back, so that only the scale changes.
        epsilon: added to the deviation, >= 0.
    Raises:
        ValueError: the mask has another shape, nothing takes part, or epsilon < 0.
    """
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"mask: expected {tuple(x.shape)}, got {tuple(mask.shape)}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon: expected >= 0, got {epsilon}")
    kept = x if mask is None else torch.where(mask.bool(), x, 0.0)
    wide = kept.double()
    numbers = float(wide.sum()), float(wide.square().sum()), float(x.numel() if mask is None else mask.bool().sum())
    total, squares, count = numbers if moments is None else moments(*numbers)
    if count < 1:
        raise ValueError("mask: expected at least one number that takes part, got none")
    mean = total / count
    std = max(squares / count - mean**2, 0.0) ** 0.5
    whitened = (kept - mean) / (std + epsilon)
    whitened = whitened if shift_mean else whitened + mean
    return whitened if mask is None else torch.where(mask.bool(), whitened, 0.0)

"""Root-mean-square normalisation."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, statistics in at least fp32."""
    wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd).to(x.dtype) * weight


class _RmsNorm(torch.autograd.Function):
    """The same in three passes over x, saving x and rstd instead of every intermediate."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        wide = x if x.dtype == torch.float64 else x.float()
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normed = wide * rstd
        ctx.save_for_backward(normed, weight, rstd)
        return normed.to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy):
        normed, weight, rstd = ctx.saved_tensors
        wide = dy.to(normed.dtype)
        dweight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = wide * weight.to(normed.dtype)
        dot = torch.linalg.vecdot(scaled, normed).unsqueeze_(-1).div_(normed.shape[-1])
        return scaled.addcmul_(normed, dot, value=-1).mul_(rstd).to(dy.dtype), dweight, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    """RMS-normalised rows.

    y = x / sqrt(mean(x^2) + epsilon) * weight

    Args:
        x: (..., D).   weight: (D,).   epsilon: added to the mean square.
    Returns:
        (..., D), dtype of x; statistics in fp32 (fp64 for fp64 input).
    Raises:
        ValueError: weight is not (D,).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467; cast order as in Llama.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    return _RmsNorm.apply(x, weight, epsilon)

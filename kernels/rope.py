"""Rotary position embedding of queries and keys, half-split layout."""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, each (T, 1, C/2) fp32, angle = position * base^(-2i/C)."""
    exponent = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angles = positions[:, None].float() * (1.0 / base**exponent)[None, :]
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + C/2}) turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Rope(torch.autograd.Function):
    """Rotation; its gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rope_reference(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return rope_reference(dy, cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated heads.

    Args:
        x: (T, H, C), C even.   cos, sin: (T, 1, C/2) from `rope_tables`.
    Returns:
        (T, H, C), dtype of x.
    Raises:
        ValueError: C is odd or the tables have another length.
    Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of Llama checkpoints.
    """
    if x.shape[-1] % 2 or cos.shape[0] != x.shape[0]:
        raise ValueError(f"x: expected (T, H, even C) with T = {cos.shape[0]}, got {tuple(x.shape)}")
    return _Rope.apply(x, cos, sin)

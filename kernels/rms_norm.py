"""Root-mean-square normalisation, alone or after the sum with a residual."""

import torch
from torch import Tensor

from .backend import contiguous_rows, runs_triton, same_device, same_dtype

MAX_WIDTH = 16384


def rms_norm_reference(
    x: Tensor, weight: Tensor, epsilon: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * weight, statistics in at least fp32; with `residual`, of the sum, and the sum."""
    stream = x if residual is None else x + residual
    wide = stream if x.dtype == torch.float64 else stream.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    y = (wide * rstd).to(x.dtype) * weight
    return y if residual is None else (y, stream)


def _normed(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon), and what x was multiplied with."""
    wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return wide * rstd, rstd


class _RmsNorm(torch.autograd.Function):
    """The same in three passes over x, saving x and rstd instead of every intermediate."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        normed, rstd = _normed(x, epsilon)
        ctx.save_for_backward(x, weight, rstd)
        return normed.to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd
        wide = dy.to(normed.dtype)
        dweight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = wide * weight.to(normed.dtype)
        dot = torch.linalg.vecdot(scaled, normed).unsqueeze_(-1).div_(normed.shape[-1])
        return scaled.addcmul_(normed, dot, value=-1).mul_(rstd).to(dy.dtype), dweight, None


@torch.library.custom_op("wizard_engine::rms_norm_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from ._rms_norm import rms_norm_forward

    return rms_norm_forward(x, weight, epsilon, residual)


@_forward.register_fake
def _(x, weight, epsilon, residual):
    stream = x.new_empty((0 if residual is None else x.shape[0], x.shape[1]))
    return x.new_empty(x.shape), stream, x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("wizard_engine::rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    from ._rms_norm import rms_norm_backward

    return rms_norm_backward(dy, dstream, stream, weight, rstd)


@_backward.register_fake
def _(dy, dstream, stream, weight, rstd):
    return stream.new_empty(stream.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, stream, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(*((rstd,) if ctx.has_residual else (stream, rstd)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(stream if ctx.has_residual else x, weight, rstd)


def _differentiate(ctx, dy, dstream, _):
    stream, weight, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(stream)
    dy, dstream = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (dy, dstream))
    dx, dweight = _backward(dy, dstream, stream, weight, rstd)
    return dx, dweight, None, dx if ctx.has_residual else None


_forward.register_autograd(_differentiate, setup_context=_save)


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS-normalised rows; with `residual`, those of the sum of both, and the sum, in one pass.

    y = s / sqrt(mean(s^2) + epsilon) * weight,   s = x + residual, rounded to the dtype of x

    Args:
        x: (..., D), fp32, fp16 or bf16 (CPU: fp64 too), last dim contiguous, D >= 1, at most 16384 on CUDA.
        weight: (D,), dtype of x.   epsilon: added to the mean square, >= 0.   residual: shape and dtype of x.
    Returns:
        y (..., D), dtype of x, or (y, s); statistics in fp32 (fp64 for fp64 input). Differentiable in all tensors;
        bit-equal between runs on one device.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, D out of range, or epsilon < 0.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467; cast order as in Llama.
    """
    _check(x, weight, epsilon, residual)
    if runs_triton(x, "x"):
        if x.shape[-1] > MAX_WIDTH:
            raise ValueError(f"x: expected rows of at most {MAX_WIDTH} elements, got {x.shape[-1]}")
        rows, added = (None if t is None else t.reshape(-1, x.shape[-1]) for t in (x, residual))
        y, stream, _ = _forward(rows, weight, epsilon, added)
        return y.view(x.shape) if residual is None else (y.view(x.shape), stream.view(x.shape))
    stream = x if residual is None else x + residual
    if torch.is_grad_enabled():
        y = _RmsNorm.apply(stream, weight, epsilon)
    else:
        y = _normed(stream, epsilon)[0].to(x.dtype) * weight
    return y if residual is None else (y, stream)


def _check(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> None:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected (..., D) with D >= 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a float dtype, got {str(x.dtype).removeprefix('torch.')}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected {tuple(x.shape)}, got {tuple(residual.shape)}")
    if epsilon < 0:
        raise ValueError(f"epsilon: expected >= 0, got {epsilon}")
    same_dtype(x=x, weight=weight, residual=residual)
    same_device(x=x, weight=weight, residual=residual)
    contiguous_rows(x=x, weight=weight, residual=residual)

"""Kernel of AdamW: one pass over flat buffers."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named


@triton.jit
def _update(
    master, exp_avg, exp_avg_sq, gradient, copy, at, mask, factor, blend, keep_sq, blend_sq, decay, step_size,
    correction, epsilon,
):  # fmt: skip
    grad = tl.load(gradient + at, mask=mask).to(tl.float32) * factor
    mean = tl.load(exp_avg + at, mask=mask)
    mean += (grad - mean) * blend
    square = tl.load(exp_avg_sq + at, mask=mask) * keep_sq + grad * grad * blend_sq
    value = tl.load(master + at, mask=mask)
    # One rounding: decay and step are added before they meet the larger value.
    value -= decay * value + step_size * tl.div_rn(mean, tl.sqrt_rn(square) * correction + epsilon)
    tl.store(exp_avg + at, mean, mask=mask)
    tl.store(exp_avg_sq + at, square, mask=mask)
    tl.store(master + at, value, mask=mask)
    if copy is not None:
        tl.store(copy + at, value.to(copy.dtype.element_ty), mask=mask)


@triton.jit(repr=named("adamw", "BLOCK"), do_not_specialize=["count"])
def adamw_kernel(
    master, exp_avg, exp_avg_sq, gradient, scale, copy, count, blend, keep_sq, blend_sq, decay, step_size, correction,
    epsilon, BLOCK: tl.constexpr,
):  # fmt: skip
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale)
        if (factor != factor) | (tl.abs(factor) == float("inf")):
            return
    # Only the last block is masked, so that any length is read and written 128 bits at a time.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        _update(
            master, exp_avg, exp_avg_sq, gradient, copy, at, None, factor, blend, keep_sq, blend_sq, decay, step_size,
            correction, epsilon,
        )  # fmt: skip
    else:
        _update(
            master, exp_avg, exp_avg_sq, gradient, copy, at, at < count, factor, blend, keep_sq, blend_sq, decay,
            step_size, correction, epsilon,
        )  # fmt: skip


def adamw_step(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, lr: float, beta: float, beta_sq: float,
    epsilon: float, weight_decay: float, step: int, scale: Tensor | None, copy: Tensor | None,
) -> None:  # fmt: skip
    """Update (P,) buffers in place; the numbers of a step are computed in float64 here."""
    config = configuration("adamw", master.device, bytes=gradient.element_size())
    count = master.numel()
    launch(
        adamw_kernel, (triton.cdiv(count, config["BLOCK"]),), master, exp_avg, exp_avg_sq, gradient, scale, copy, count,
        1.0 - beta, float(beta_sq), 1.0 - beta_sq, float(lr * weight_decay), lr / (1.0 - beta**step),
        1.0 / math.sqrt(1.0 - beta_sq**step), float(epsilon), **config,
    )  # fmt: skip

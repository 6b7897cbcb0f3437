"""Kernel of AdamW: one pass over flat buffers. One program updates BLOCK elements.

It reads gradient, moments and master weights once, computes in fp32, and writes moments, master weights and the rounded
copy, if there is one. The clip factor is read on the device: if it is not finite, no buffer changes, and the host never
waits for it.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .configuration import configuration
from .launch import launch, named


@triton.jit
def _update(
    master,
    exp_avg,
    exp_avg_sq,
    gradient,
    copy,
    at,
    mask,
    factor,
    blend,
    keep_sq,
    blend_sq,
    decay,
    step_size,
    correction,
    epsilon,
):
    # `_rn`: correctly rounded, where Triton's default fp32 division and square root are approximations.
    grad = tl.load(gradient + at, mask=mask).to(tl.float32) * factor
    mean = tl.load(exp_avg + at, mask=mask)
    mean += (grad - mean) * blend
    square = tl.load(exp_avg_sq + at, mask=mask) * keep_sq + grad * grad * blend_sq
    value = tl.load(master + at, mask=mask)
    # Decay and step are added first, so that the larger weight is rounded once.
    value -= decay * value + step_size * tl.div_rn(mean, tl.sqrt_rn(square) * correction + epsilon)
    tl.store(exp_avg + at, mean, mask=mask)
    tl.store(exp_avg_sq + at, square, mask=mask)
    tl.store(master + at, value, mask=mask)
    if copy is not None:
        tl.store(copy + at, value.to(copy.dtype.element_ty), mask=mask)


@triton.jit(repr=named("adamw", "BLOCK"), do_not_specialize=["count"])
def adamw_kernel(
    master,
    exp_avg,
    exp_avg_sq,
    gradient,
    scale,
    copy,
    count,
    blend,
    keep_sq,
    blend_sq,
    decay,
    step_size,
    correction,
    epsilon,
    BLOCK: tl.constexpr,
):
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale)
        if (factor != factor) | (tl.abs(factor) == float("inf")):
            return
    # Only the last block is masked: loads and stores stay 128 bits wide for any length.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        _update(
            master,
            exp_avg,
            exp_avg_sq,
            gradient,
            copy,
            at,
            None,
            factor,
            blend,
            keep_sq,
            blend_sq,
            decay,
            step_size,
            correction,
            epsilon,
        )
    else:
        _update(
            master,
            exp_avg,
            exp_avg_sq,
            gradient,
            copy,
            at,
            at < count,
            factor,
            blend,
            keep_sq,
            blend_sq,
            decay,
            step_size,
            correction,
            epsilon,
        )


def adamw_step(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    lr: float,
    beta: float,
    beta_sq: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    scale: Tensor | None,
    copy: Tensor | None,
) -> None:
    """Update (P,) buffers in place. The step's coefficients are computed here in float64 and passed as fp32."""
    config = configuration("adamw", master.device, bytes=gradient.element_size())
    count = master.numel()
    launch(
        adamw_kernel,
        (triton.cdiv(count, config["BLOCK"]),),
        master,
        exp_avg,
        exp_avg_sq,
        gradient,
        scale,
        copy,
        count,
        1.0 - beta,
        float(beta_sq),
        1.0 - beta_sq,
        float(lr * weight_decay),
        lr / (1.0 - beta**step),
        1.0 / math.sqrt(1.0 - beta_sq**step),
        float(epsilon),
        **config,
    )

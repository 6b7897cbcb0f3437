"""AdamW: the update of flat buffers in one pass."""

import math

import torch
from torch import Tensor

from .backend import contiguous_rows, runs_triton, same_device

COPY_DTYPES, GRADIENT_DTYPES = (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)


def adamw_reference(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    step: int,
    scale: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """The update in plain PyTorch, any device and float dtype."""
    grad = gradient.to(master.dtype) * (1.0 if scale is None else scale)
    mean = betas[0] * exp_avg + (1 - betas[0]) * grad
    square = betas[1] * exp_avg_sq + (1 - betas[1]) * grad.square()
    direction = mean / (1 - betas[0] ** step) / ((square / (1 - betas[1] ** step)).sqrt() + epsilon)
    value = master * (1 - lr * weight_decay) - lr * direction
    keep = None if scale is None else ~scale.isfinite()
    for old, new in ((master, value), (exp_avg, mean), (exp_avg_sq, square), (copy, value)):
        if old is not None:
            old.copy_(new if keep is None else torch.where(keep, old, new.to(old.dtype)))


def _on_cpu(master, exp_avg, exp_avg_sq, gradient, lr, betas, epsilon, weight_decay, step, scale, copy) -> None:
    """The same by torch's fused kernel, which torch cannot trace."""
    # Here reading the scale waits for nothing.
    factor = 1.0 if scale is None else float(scale)
    if not math.isfinite(factor):
        return
    grad = gradient.float() if factor == 1.0 else gradient.float() * scale
    count = torch.tensor(float(step))
    torch._fused_adamw_(
        [master],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [count],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=epsilon,
        amsgrad=False,
        maximize=False,
    )
    if copy is not None:
        copy.copy_(master)


@torch.library.custom_op("wizard_engine::adamw", mutates_args=("master", "exp_avg", "exp_avg_sq", "copy"))
def _update(
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
    from ._adamw import adamw_step

    adamw_step(master, exp_avg, exp_avg_sq, gradient, lr, beta, beta_sq, epsilon, weight_decay, step, scale, copy)


@_update.register_fake
def _(master, exp_avg, exp_avg_sq, gradient, lr, beta, beta_sq, epsilon, weight_decay, step, scale, copy):
    return None


@torch.no_grad()
def adamw(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    step: int,
    scale: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """One AdamW update of flat buffers, in place.

    g = scale gradient,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    w = w - lr (weight_decay w + m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + epsilon)),   copy = w rounded

    Where `scale` is not finite, every buffer stays as it was: a clip factor of a gradient that overflowed leaves the
    update out without a wait for the device.

    Args:
        master, exp_avg, exp_avg_sq: (P,) fp32, contiguous: w, m, v.   gradient: (P,) fp32 or bf16, contiguous.
        lr, betas, epsilon, weight_decay: as in the paper; lr, epsilon and decay >= 0, betas in [0, 1).
        step: updates with this one, >= 1.
        scale: () fp32 on the same device, or None for 1.   copy: (P,) bf16 or fp16, contiguous, or None.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or a number is out of its range.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    _check(master, exp_avg, exp_avg_sq, gradient, scale, copy)
    check_numbers(lr, betas, epsilon, weight_decay, step)
    if runs_triton(master, "master"):
        _update(master, exp_avg, exp_avg_sq, gradient, lr, *betas, epsilon, weight_decay, step, scale, copy)
    elif master.device.type == "cpu" and not torch.compiler.is_compiling():
        _on_cpu(master, exp_avg, exp_avg_sq, gradient, lr, betas, epsilon, weight_decay, step, scale, copy)
    else:
        adamw_reference(
            master,
            exp_avg,
            exp_avg_sq,
            gradient,
            lr=lr,
            betas=betas,
            epsilon=epsilon,
            weight_decay=weight_decay,
            step=step,
            scale=scale,
            copy=copy,
        )


def _check(master, exp_avg, exp_avg_sq, gradient, scale, copy) -> None:
    fp32 = (torch.float32,)
    buffers = {
        "master": (master, fp32),
        "exp_avg": (exp_avg, fp32),
        "exp_avg_sq": (exp_avg_sq, fp32),
        "gradient": (gradient, GRADIENT_DTYPES),
        "copy": (copy, COPY_DTYPES),
        "scale": (scale, fp32),
    }
    for name, (tensor, dtypes) in buffers.items():
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}")
        expected = () if name == "scale" else (master.numel(),)
        if tensor.shape != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
    tensors = {name: tensor for name, (tensor, _) in buffers.items()}
    same_device(**tensors)
    contiguous_rows(**{name: tensor for name, tensor in tensors.items() if name != "scale"})


def check_numbers(lr: float, betas: tuple[float, float], epsilon: float, weight_decay: float, step: int) -> None:
    """ValueError unless the numbers of an update are in their ranges."""
    for name, value in (("lr", lr), ("epsilon", epsilon), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected >= 0 and finite, got {value}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
    if step < 1:
        raise ValueError(f"step: expected >= 1, got {step}")

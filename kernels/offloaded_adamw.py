"""AdamW of an optimizer in host memory: gradient accumulation, update and bf16 weights in one pass (csrc)."""

import math

import torch
from torch import Tensor

import csrc

from .adamw import adamw_reference, check_numbers

LEVELS = ("plain", "avx2", "avx512")


def widest_level() -> str:
    """The widest of LEVELS that this processor has."""
    return LEVELS[csrc.library().wizard_adamw_level()]


def offloaded_adamw_reference(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    *,
    scale: float = 1.0,
    accumulated: Tensor | None = None,
    **options,
) -> None:
    """The same in plain PyTorch passes."""
    if not math.isfinite(scale):
        return
    grad = gradient.to(master.dtype)
    if accumulated is not None:
        grad = grad + accumulated
        accumulated.zero_()
    adamw_reference(master, exp_avg, exp_avg_sq, grad * scale, **options)


@torch.no_grad()
def offloaded_adamw(
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
    scale: float = 1.0,
    accumulated: Tensor | None = None,
    copy: Tensor | None = None,
    level: str | None = None,
    threads: int | None = None,
) -> None:
    """One AdamW update of flat buffers in host memory, in place and in one pass over them.

    g = scale (gradient + accumulated), then as `kernels.adamw`; accumulated = 0; copy = w rounded to bf16

    The loop exists for plain x86-64, AVX2 and AVX-512; all of them, and any number of threads, give the same bits.
    Where `scale` is not finite, every buffer stays as it was.

    Args:
        master, exp_avg, exp_avg_sq: (P,) fp32, contiguous, on the CPU.   gradient: (P,) fp32 or bf16: the last
            micro-batch's.   accumulated: (P,) fp32, the sum of those before it, cleared; None: there is none.
        lr, betas, epsilon, weight_decay, step: as `kernels.adamw`.   scale: of the gradient, for clipping.
        copy: (P,) bf16, the weights to compute with, or None.
        level: of LEVELS; None: the widest that the processor has.   threads: at most so many; None: as torch.
    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, a number is out of its range, or the processor lacks
            the level.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    buffers = {
        "master": master,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "gradient": gradient,
        "accumulated": accumulated,
        "copy": copy,
    }
    _check(buffers, master.numel())
    check_numbers(lr, betas, epsilon, weight_decay, step)
    if level is not None and level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level}")
    if not math.isfinite(scale):
        return
    pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in buffers.items()}
    status = csrc.library().wizard_adamw(
        *(pointers[name] for name in ("master", "exp_avg", "exp_avg_sq", "accumulated", "gradient")),
        gradient.dtype == torch.bfloat16,
        pointers["copy"],
        master.numel(),
        lr,
        *betas,
        epsilon,
        weight_decay,
        step,
        scale,
        -1 if level is None else LEVELS.index(level),
        threads or torch.get_num_threads(),
    )
    if status < 0:
        raise ValueError(f"level: expected at most {widest_level()}, what this processor has, got {level}")


def _check(buffers: dict[str, Tensor | None], size: int) -> None:
    dtypes = {"gradient": (torch.float32, torch.bfloat16), "copy": (torch.bfloat16,)}
    for name, tensor in buffers.items():
        if tensor is None:
            continue
        allowed = dtypes.get(name, (torch.float32,))
        if tensor.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(f"{name}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.shape != (size,):
            raise ValueError(f"{name}: expected ({size},), got {tuple(tensor.shape)}")
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor in host memory, got one on {tensor.device}")

"""Which code an operation runs on: Triton kernels for CUDA tensors, plain PyTorch for CPU tensors."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

# Triton reads the variable when a kernel is defined, so what it says later changes nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CSRC_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

_forced: str | None = None
_checks_values = False


@contextmanager
def use_backend(name: Literal["reference", "triton"]) -> Iterator[None]:
    """Run every operation of the block on one backend, wherever its tensors are.

    Triton kernels take CPU tensors only under the interpreter (TRITON_INTERPRET=1 set before the first import).

    Raises:
        ValueError: another name.
    """
    global _forced
    if name not in ("reference", "triton"):
        raise ValueError(f"backend: expected reference or triton, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def check_values() -> Iterator[None]:
    """Check the values of index tensors on CUDA too inside the block, at the price of a wait for the device."""
    global _checks_values
    before, _checks_values = _checks_values, True
    try:
        yield
    finally:
        _checks_values = before


def values_are_checked(tensor: Tensor) -> bool:
    """True where looking at the values costs nothing (CPU, eager) or was asked for."""
    return _checks_values if tensor.is_cuda else not (tensor.is_meta or torch.compiler.is_compiling())


def runs_triton(tensor: Tensor, argument: str) -> bool:
    """True if the operation on `tensor` takes its Triton kernels.

    Raises:
        ValueError: a dtype that no kernel takes, or CPU tensors without the interpreter.
    """
    if not (tensor.is_cuda if _forced is None else _forced == "triton"):
        return False
    if tensor.dtype not in TRITON_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in TRITON_DTYPES)
        raise ValueError(
            f"{argument}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}; "
            'use kernels.use_backend("reference") for others'
        )
    if not (tensor.is_cuda or tensor.is_meta or is_interpreted()):
        raise ValueError(
            f"{argument}: expected a CUDA tensor for the Triton backend, got one on {tensor.device}; "
            "set TRITON_INTERPRET=1 before python starts to run kernels on the CPU"
        )
    return True


def runs_csrc(tensor: Tensor) -> bool:
    """True if an operation on `tensor` that has C++ code for the CPU takes it."""
    return _forced is None and tensor.device.type == "cpu" and tensor.dtype in CSRC_DTYPES


def is_interpreted() -> bool:
    """True if this process runs Triton kernels in the interpreter."""
    return INTERPRETED


def from_host(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N,) numbers of the host on a device, without a wait for it."""
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def same_device(**tensors: Tensor | None) -> None:
    """ValueError unless all tensors are on the device of the first."""
    present = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first, reference = present[0]
    for name, tensor in present[1:]:
        if tensor.device != reference.device:
            raise ValueError(f"{name}: expected the device of {first}, {reference.device}, got {tensor.device}")


def same_dtype(**tensors: Tensor | None) -> None:
    """ValueError unless all tensors have the dtype of the first."""
    present = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first, reference = present[0]
    for name, tensor in present[1:]:
        if tensor.dtype != reference.dtype:
            raise ValueError(f"{name}: expected the dtype of {first}, {reference.dtype}, got {tensor.dtype}")


def contiguous_rows(**tensors: Tensor | None) -> None:
    """ValueError unless the last dim of every tensor has stride 1."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dim, got strides {tuple(tensor.stride())}; call .contiguous()"
            )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; on its way to a GPU it passes pinned memory, so that the host does not wait."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

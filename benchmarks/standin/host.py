"""Host seconds of the launch path, measured without a GPU.

Operations run on real CPU tensors through the real path: argument checks, torch's dispatch of custom operators,
autograd, Triton's just-in-time lookup and launcher, down to a driver library that returns at once. What a real driver
takes for a launch is added.
"""

import ctypes
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch

from kernels import backend, use_backend
from kernels.launch import observe

from .events import Log
from .session import Cuda, driver_library, triton_driver

# Seconds that a driver takes for a launch.
DRIVER_SECONDS = 2.5e-6


def _operations() -> list[Callable[[], None]]:
    """Operations of a block, forward and backward, on tensors so small that the host's work is all there is."""
    from kernels.attention import attention
    from kernels.rms_norm import rms_norm
    from kernels.rope import rope
    from kernels.swiglu import swiglu

    x, weight, gate_up = torch.randn(8, 64), torch.ones(64), torch.randn(8, 64)
    q, k, v = (torch.randn(8, heads, 32) for heads in (2, 1, 1))
    cos = sin = torch.ones(8, 16)
    marks = torch.tensor([0, 8], dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (x, weight, gate_up, q, k, v)]

    def run(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def both() -> None:
            out = call()
            out.backward(out.detach())
            for leaf in leaves:
                leaf.grad = None

        return both

    return [
        run(lambda: rms_norm(x, weight, residual=x)[0]),
        run(lambda: swiglu(gate_up)),
        run(lambda: rope(q, k, cos, sin)[0]),
        run(lambda: attention(q, k, v, marks, 8)),
    ]


def torch_launch_seconds(rounds: int = 2000) -> float:
    """Host seconds of a torch operator that launches one kernel: the fastest of five runs over small tensors."""
    x, out = torch.randn(64), torch.empty(64)
    calls = [lambda: torch.add(x, x, out=out), lambda: torch.mul(x, 2.0, out=out), x.norm, x.sum]
    return min(_seconds(calls, rounds) for _ in range(5)) / len(calls) + DRIVER_SECONDS


def triton_launch_seconds(rounds: int = 200) -> float:
    """Host seconds per launch of the operations of a block: the fastest of five runs.

    Raises:
        ValueError: no triton or no C compiler.
    """
    library = ctypes.CDLL(str(driver_library()), mode=ctypes.RTLD_GLOBAL)
    library.standin_host_memory(1)
    count = 0

    def counted(launch: object) -> None:
        nonlocal count
        count += 1

    try:
        with ExitStack() as stack:
            stack.enter_context(Cuda(Log(), 90, 132, 1, "stand-in").patched())
            stack.enter_context(triton_driver(Log(), compiles=False, checks=False))
            stack.enter_context(mock.patch.object(backend, "INTERPRETED", True))
            stack.enter_context(use_backend("triton"))
            operations = _operations()
            with observe(counted):
                for operation in operations:
                    operation()
            best = min(_seconds(operations, rounds) for _ in range(5))
    finally:
        library.standin_host_memory(0)
    return best / count + DRIVER_SECONDS


def _seconds(operations: list[Callable[[], None]], rounds: int) -> float:
    began = time.thread_time()
    for _ in range(rounds):
        for operation in operations:
            operation()
    return (time.thread_time() - began) / rounds

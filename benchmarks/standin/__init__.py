"""A GPU that is not there: code takes its CUDA path to the launch, and what it would have done is written down.

    with stand_in(arch=90) as log:
        x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda")
        rms_norm(x, weight)
    log.events      launches of Triton kernels and of torch operators, copies, waits of the host, in order

Tensors on "cuda" have shapes, strides and addresses, and no numbers (torch's FakeTensors). Tensors on the CPU are real.
What the device would say about numbers is made up: `item` gives 1, a copy to the host gives zeros. Triton kernels go
through the real just-in-time path (arguments, specialisation, launcher, descriptors) into a driver library that checks
what a real one would refuse; unless asked for, they are not compiled.

A process that has stood in for a GPU is of no use for anything else: run it in one of its own.
"""

from .events import Event, Log
from .session import install, stand_in

__all__ = ["Event", "Log", "install", "stand_in"]

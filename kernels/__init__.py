"""One file per operation: reference, kernels, autograd, public function. Part of wizard-engine.

CUDA tensors take Triton kernels and CPU tensors plain PyTorch; `use_backend` overrides that.
"""

from .backend import check_values, use_backend

__all__ = ["PROJECT", "check_values", "use_backend"]

PROJECT = "wizard-engine"

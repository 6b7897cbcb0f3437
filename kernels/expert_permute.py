"""Expert permutation: tokens copied to the sorted rows of their experts."""

import torch
from torch import Tensor

from .backend import contiguous_rows, runs_triton

VECTOR_BYTES = 16


def permute_reference(x: Tensor, index: Tensor, choices: int) -> Tensor:
    """x[index // choices]."""
    return x[index.long() // choices]


def permute(x: Tensor, index: Tensor, choices: int) -> Tensor:
    """(R, D) rows of x: row r is token index[r] // choices. Exact; no gradient.

    On CUDA by the library of csrc/cuda where nvcc built it and rows are whole 16-byte vectors, else by Triton.

    Args:
        x: (T, D), last dim contiguous.   index: (R,) int32, `Routing.rows`.   choices: experts per token.
    """
    contiguous_rows(x=x)
    if x.is_cuda and fits_vectors(x):
        import csrc.cuda

        library = csrc.cuda.library()
        if library is not None:
            return _permute_cuda(library, x, index, choices)
    if x.is_meta or runs_triton(x, "x"):
        from ._expert_rows import moe_permute

        return moe_permute(x, index, choices)
    return permute_reference(x, index, choices)


def fits_vectors(x: Tensor) -> bool:
    """True if every row of x starts and ends at a multiple of 16 bytes."""
    sizes = (x.shape[1] * x.element_size(), x.stride(0) * x.element_size(), x.data_ptr())
    return all(size % VECTOR_BYTES == 0 for size in sizes)


def _permute_cuda(library, x: Tensor, index: Tensor, choices: int) -> Tensor:
    import csrc.cuda

    out = torch.empty((index.numel(), x.shape[1]), dtype=x.dtype, device=x.device)
    vectors, stride = (n * x.element_size() // VECTOR_BYTES for n in (x.shape[1], x.stride(0)))
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        status = library.wizard_permute_rows(
            x.data_ptr(), index.data_ptr(), out.data_ptr(), index.numel(), vectors, stride, choices, stream
        )
    csrc.cuda.check(status, "wizard_permute_rows")
    return out

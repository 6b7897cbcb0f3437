"""The CUDA part of the engine: plain C functions over raw pointers and the raw stream, built by nvcc if there is one.

`library()` builds libwizard_cuda.so for sm_80, sm_90a and sm_100, with PTX of sm_80 for later ones, and loads it once;
where nvcc is absent there is none, and the Triton kernels do without it.
"""

import ctypes
import functools
import os
import shutil
from pathlib import Path

from csrc import compile_library, is_newer

FOLDER = Path(__file__).parent.resolve()
LIBRARY = FOLDER / "libwizard_cuda.so"
ARCHITECTURES = ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_100,code=sm_100")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-Xcompiler=-fPIC,-Wall,-fvisibility=hidden",
    *(f"-gencode=arch={name}" for name in (*ARCHITECTURES, "compute_80,code=compute_80")),
)

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {"wizard_permute_rows": (_pointer, _pointer, _pointer, _int64, _int64, _int64, _int32, _pointer)}


def sources() -> list[Path]:
    """The CUDA files that the library is built from, in name order."""
    return sorted(FOLDER.glob("*.cu"))


def compiler() -> str | None:
    """nvcc: what NVCC names, or the one on the PATH or below CUDA_HOME; None where there is none."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return shutil.which(os.environ.get("NVCC", "nvcc")) or (str(home) if home.exists() else None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, built first where needed; None where it is not built and there is no nvcc to do so.

    Raises:
        RuntimeError: nvcc fails; with its output.
    """
    if not is_newer(LIBRARY, sources()):
        nvcc = compiler()
        if nvcc is None:
            return None
        compile_library(LIBRARY, sources(), [nvcc, *FLAGS])
    loaded = ctypes.CDLL(str(LIBRARY))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = ctypes.c_int, arguments
    return loaded


def check(status: int, what: str) -> None:
    """RuntimeError unless a function's cudaError_t is 0."""
    if status:
        raise RuntimeError(f"{what}: expected CUDA to return 0, got error {status}")

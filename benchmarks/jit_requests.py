"""What Triton's just-in-time compiler is asked for, taken from the real one without a GPU, and fulfilled ahead of time.

`requests` sends recorded launches down the JIT's own path under a driver that only says which architecture there is:
binding, specialisation, options. The JIT's hook hands over its request before it compiles; `fulfil` compiles one in any
process, into the cache entry that the same launch looks up on a GPU. Tensors may be on the meta device.
"""

import contextlib
import hashlib
import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource
from triton.compiler.compiler import get_cache_key, make_backend
from triton.runtime import build
from triton.runtime.cache import _base32

from benchmarks.kernel_peers import FAILURES
from kernels.launch import Launch

DRIVER = "the driver's C code"


class AheadDriver:
    """A driver of one GPU of an architecture that can compile for it, and nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """The architecture."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A number of its own for every architecture: the JIT keeps what it has compiled by device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


@dataclass(frozen=True)
class Request:
    """A binary to make: a kernel's module and name, Triton's own description of types, constants and options, and the
    name of its folder in the cache."""

    module: str
    name: str
    arch: int
    data: str
    folder: str

    @property
    def is_cached(self) -> bool:
        """Whether the cache holds the binary."""
        return any((Path(knobs.cache.dir) / self.folder).glob("__grp__*.json"))


@contextlib.contextmanager
def ahead(arch: int) -> Iterator[None]:
    """Let the JIT of the block take the driver of an architecture."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(AheadDriver(arch))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


@contextlib.contextmanager
def collected(arch: int, on_request: Callable[[Request], None] | None = None) -> Iterator[list[Request]]:
    """Collect what the JIT is asked for inside the block instead of compiling it, each binary once; tell of each."""
    by_folder: dict[str, Request] = {}
    requested: list[Request] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        folder = _folder(fn.jit_function, compile, GPUTarget("cuda", arch, 32))
        if folder not in by_folder:
            name = fn.name.rpartition(".")[2]
            by_folder[folder] = Request(fn.module, name, arch, compile["specialization_data"], folder)
            requested.append(by_folder[folder])
            if on_request is not None:
                on_request(by_folder[folder])
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
    try:
        yield requested
    finally:
        knobs.runtime.jit_cache_hook = before


def _folder(kernel: Any, asked: dict[str, Any], target: GPUTarget) -> str:
    """Name of the cache folder that `triton.compile` looks a request up in."""
    backend = make_backend(target)
    source = ASTSource(kernel, asked["signature"], asked["constants"], asked["configs"][0])
    options = {name: value for name, value in json.loads(asked["specialization_data"])["options"].items()}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    key = get_cache_key(source, backend, backend.parse_options(options), get_cache_invalidating_env_vars())
    return _base32(hashlib.sha256(key.encode()).hexdigest())


def requests(
    launches: Iterable[Launch], arch: int, on_request: Callable[[Request], None] | None = None
) -> list[Request]:
    """What launches ask the JIT for, each request once, in their order; tells of each as it comes."""
    with ahead(arch), collected(arch, on_request) as by_folder:
        for launch in launches:
            launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
    return by_folder


def driver_request(arch: int) -> Request:
    """Stands for the C code that the driver itself is made of."""
    return Request("", DRIVER, arch, "", "")


def compile_request(request: Request) -> dict[str, Any]:
    """Compile a request into Triton's cache, with the launcher that starts it; `error` where it does not compile."""
    try:
        if request.name == DRIVER:
            _build_driver()
        else:
            fulfil(request)
    except (*FAILURES, subprocess.CalledProcessError) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return {"done": True}


def fulfil(request: Request) -> Any:
    """Triton's compiled kernel of a request, out of its cache or put into it, the launcher likewise."""
    kernel = getattr(importlib.import_module(request.module), request.name)
    with ahead(request.arch):
        compiled = kernel.preload(request.data)
    if has_launchers():
        with unloaded():
            nvidia.CudaLauncher(compiled.src, compiled.metadata)
    return compiled


def has_launchers() -> bool:
    """Whether this Triton compiles C code for every signature: releases up to 3.6 do.

    Later ones have the driver's own code alone, and look it up under the folder of the machine's CUDA driver.
    """
    return hasattr(nvidia, "make_launcher")


def _build_driver() -> None:
    if has_launchers():
        with unloaded():
            nvidia.CudaUtils()


class _Unloaded:
    """In place of a compiled module: it has any name, and nothing behind it."""

    def __getattr__(self, name: str) -> None:
        return None


@contextlib.contextmanager
def unloaded() -> Iterator[None]:
    """Compile modules without loading them, since that takes the CUDA driver; linked against an empty libcuda."""
    before, build._load_module_from_path = build._load_module_from_path, lambda name, path: _Unloaded()
    try:
        with knobs.nvidia.scope():
            knobs.nvidia.libcuda_path = _empty_libcuda()
            yield
    finally:
        build._load_module_from_path = before
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()


@cache
def _empty_libcuda() -> str:
    """Folder of a library with the driver's name and nothing in it: the linker wants one, symbols come at run time."""
    folder = tempfile.TemporaryDirectory(prefix="libcuda")
    _kept.append(folder)
    path = Path(folder.name) / "libcuda.so.1"
    command = [os.environ.get("CC", "gcc"), "-shared", "-x", "c", "/dev/null", "-o", str(path)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
    return folder.name


_kept: list[tempfile.TemporaryDirectory] = []

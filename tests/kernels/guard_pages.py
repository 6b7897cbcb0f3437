"""Launches of interpreted kernels with every tensor flush against unreadable pages.

Inside `guarded()` each launch runs twice on copies of its tensors: once with the last byte of every one in front of an
unreadable page, once with the first byte behind one. What lies between is a tensor's extent, from its first to its last
addressed byte, so that an overrun into the rest of a storage is found, too. Bytes that the kernel changed are copied
back. A launch that reads or writes outside fails its test with kernel, argument and side.

Left alone are gaps inside an extent (rows of a slice) and launches with an argument of more than MOST_BYTES. What a
mask leaves out is not touched by the interpreter, wherever its address points.
"""

import ctypes
import functools
import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

SOURCE = Path(__file__).with_suffix(".cpp")
PAGE = mmap.PAGESIZE
# Unreadable bytes on either side: an overrun of many rows stays among them. Address space only, no memory.
GUARD = 1 << 20
MAX_HITS, PROT_NONE = 64, 0
# A test of indices behind 2^31 elements has more address space than memory.
MOST_BYTES = 1 << 28
KINDS = ("read", "wrote", "touched")
# TMA's rule for addresses, which the interpreter checks.
DESCRIPTOR_ALIGNMENT = 16

# What the report calls the line of kernels that were launched.
LAUNCHED = "launched: "
launched: set[str] = set()


class OutsideArgumentError(AssertionError):
    """A kernel touched memory outside of an argument."""


@functools.cache
def library() -> Any:
    """The handler of faults, built once a process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guard_pages.so"
        command = [os.environ.get("CXX", "g++"), "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", str(SOURCE), "-o"]
        subprocess.run([*command, str(path)], check=True)
        result = ctypes.CDLL(str(path))
    result.guard_watch.argtypes = ctypes.c_size_t, ctypes.c_size_t
    return result


@functools.cache
def system() -> Any:
    """mmap, mprotect and munmap."""
    result = ctypes.CDLL(None, use_errno=True)
    result.mmap.restype = ctypes.c_void_p
    result.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
    result.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    result.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
    return result


def bytes_at(address: int, count: int) -> np.ndarray:
    """Memory as bytes; nothing is touched yet."""
    return np.frombuffer((ctypes.c_char * count).from_address(address), np.uint8)


@dataclass(frozen=True)
class Extent:
    """Where an argument's elements lie: from the first addressed byte to behind the last."""

    name: str
    address: int
    count: int
    alignment: int

    @classmethod
    def of(cls, name: str, value: Tensor | TensorDescriptor) -> "Extent":
        """The extent of a tensor, or of what a tensor descriptor describes."""
        is_tensor = isinstance(value, Tensor)
        base, shape = (value, value.shape) if is_tensor else (value.base, value.shape)
        strides, size = value.stride() if is_tensor else value.strides, base.element_size()
        is_empty = 0 in shape
        count = 0 if is_empty else size * (1 + sum((n - 1) * stride for n, stride in zip(shape, strides)))
        return cls(name, base.data_ptr(), count, size if is_tensor else DESCRIPTOR_ALIGNMENT)


class Copy:
    """An extent's bytes between unreadable pages, flush against the one behind them or the one before."""

    def __init__(self, extent: Extent, at_end: bool) -> None:
        inside = -(-extent.count // PAGE) * PAGE
        self.extent, self.mapped = extent, inside + 2 * GUARD
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.start = system().mmap(None, self.mapped, PROT_NONE, flags, -1, 0)
        assert self.start not in (None, ctypes.c_void_p(-1).value), "no address space for guard pages"
        if inside:
            system().mprotect(self.start + GUARD, inside, mmap.PROT_READ | mmap.PROT_WRITE)
        slack = (inside - extent.count) // extent.alignment * extent.alignment if at_end else 0
        self.address = self.start + GUARD + slack
        ctypes.memmove(self.address, extent.address, extent.count)
        self.before = bytes_at(self.address, extent.count).copy()

    def tensor_like(self, value: Tensor) -> Tensor:
        """A tensor of that shape over the copy."""
        count = max(self.extent.count, value.element_size())
        memory = (ctypes.c_char * count).from_address(self.address)
        return torch.frombuffer(memory, dtype=value.dtype).as_strided(value.shape, value.stride())

    def copy_back(self) -> None:
        """Write what the kernel changed to where it came from."""
        after = bytes_at(self.address, self.extent.count)
        changed = after != self.before
        if changed.any():
            bytes_at(self.extent.address, self.extent.count)[changed] = after[changed]

    def where(self, address: int) -> str:
        """A touched address, from the argument's first byte."""
        place, side = address - self.address, "before its start" if address < self.address else "behind its end"
        return f"at byte {place} of {self.extent.count}, {side}"

    def __del__(self) -> None:
        system().munmap(self.start, self.mapped)


def extents_of(arguments: dict[str, Any]) -> list[Extent]:
    """Extents of the tensors and descriptors that have elements."""
    result = [Extent.of(name, x) for name, x in arguments.items() if isinstance(x, Tensor | TensorDescriptor)]
    return [extent for extent in result if extent.count]


def copies_of(arguments: dict[str, Any], at_end: bool) -> dict[str, Copy]:
    """Guarded copies of the tensors and descriptors that have elements, by argument."""
    return {extent.name: Copy(extent, at_end) for extent in extents_of(arguments)}


def replaced(value: Any, copy: Copy) -> Tensor | TensorDescriptor:
    """The argument over its copy."""
    if isinstance(value, Tensor):
        return copy.tensor_like(value)
    base = torch.frombuffer((ctypes.c_char * copy.extent.count).from_address(copy.address), dtype=value.base.dtype)
    fields = {name: getattr(value, name) for name in value.__dataclass_fields__ if name != "base"}
    return TensorDescriptor(base, **fields)


def violations(copies: dict[str, Copy]) -> list[str]:
    """What the launch that just ended touched outside of its arguments, in words."""
    hits = (ctypes.c_size_t * (2 * MAX_HITS))()
    count = library().guard_end(hits)
    result = []
    for address, kind in zip(hits[: 2 * count : 2], hits[1 : 2 * count : 2]):
        copy = next(c for c in copies.values() if c.start <= address < c.start + c.mapped)
        result.append(f"{KINDS[kind]} argument {copy.extent.name} {copy.where(address)}")
    return result


def run_once(kernel: InterpretedFunction, arguments: dict[str, Any], at_end: bool, run: Any) -> list[Copy]:
    """The guarded copies that one launch ran on; the arguments are as they were.

    Raises:
        OutsideArgumentError: it touched what lies outside of an argument.
    """
    copies = copies_of(arguments, at_end)
    test = os.environ.get("PYTEST_CURRENT_TEST", "no test")
    empty = [name for name, x in arguments.items() if isinstance(x, Tensor) and not x.numel()]
    about = f"{test}: {kernel.__name__}({', '.join(copies)}; empty: {', '.join(empty) or 'none'})"
    library().guard_begin(about.encode())
    for copy in copies.values():
        assert library().guard_watch(copy.start, copy.start + copy.mapped) == 0, "too many arguments to guard"
    try:
        run(**arguments | {name: replaced(arguments[name], copy) for name, copy in copies.items()})
    finally:
        result = violations(copies)
        if result:
            raise OutsideArgumentError(f"{test}: {kernel.__name__} {'; '.join(result)}")
    return list(copies.values())


@contextmanager
def guarded(report: int = 2) -> Iterator[None]:
    """Run every launch of the block between guard pages, on both sides; a fault far outside goes to `report`."""
    plain = InterpretedFunction.run

    def run(self: InterpretedFunction, *values: Any, grid: Any, warmup: bool, **options: Any) -> None:
        arguments = dict(zip(self.arg_names, values)) | options
        launched.add(self.__name__)
        if any(extent.count > MOST_BYTES for extent in extents_of(arguments)):
            return plain(self, *values, grid=grid, warmup=warmup, **options)
        for at_end in (True, False):
            copies = run_once(self, arguments, at_end, functools.partial(plain, self, grid=grid, warmup=warmup))
        for copy in copies:
            copy.copy_back()

    library().guard_install(report)
    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = plain
        library().guard_remove()

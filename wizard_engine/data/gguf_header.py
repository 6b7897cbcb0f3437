"""The header of a GGUF file: its metadata and the places of its tensors, every number checked before it is believed.

A file is the magic, a version, the numbers of tensors and of metadata fields, the fields (name, type, value), the
tensors (name, dims, type, offset), and behind padding the tensors' bytes; all of it little-endian. The reader of the
package `gguf` makes two arrays for every entry of a vocabulary and believes every count, so only its tables of types
are taken.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from wizard_engine.runtime.input_files import shown

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Four times what a vocabulary of 128,000 entries takes; they bound what a refusal costs.
MAX_HEADER_BYTES = 32 << 20
MAX_FIELDS, MAX_TENSORS, MAX_TEXTS = 4096, 1 << 16, 1 << 20
MAX_NAME_BYTES, MAX_DIMS = 255, 4
DEFAULT_ALIGNMENT = 32
# Types of metadata values by their number in the file, as numpy names them.
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, TEXT, ARRAY = 7, 8, 9
# Types of tensors that are read.
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def gguf_package() -> ModuleType:
    """The package `gguf`.

    Raises:
        ValueError: it is not installed; says what to do.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ValueError(
            "gguf: expected the package gguf, got no such package; pip install 'wizard-engine[gguf]'"
        ) from None
    return gguf


class Metadata:
    """Fields of a GGUF file by name; a value of another kind than the one that is asked for is refused by name.

    Values are int, float, bool, str, a list of str, or a numpy array.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self.fields = path, fields

    def error(self, name: str, expected: str) -> ValueError:
        """The refusal of a field's value."""
        value = self.fields.get(name)
        got = "none" if value is None else f"an array of {len(value)}" if _is_array(value) else shown(value)
        return ValueError(f"{self.path}: {shown(name)}: expected {expected}, got {got}")

    def whole(self, name: str, default: int | None = None, *, least: int = 0, most: int = 2**31 - 1) -> int:
        """A whole number from `least` to `most`."""
        value = self.fields.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"a whole number from {least} to {most}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A positive number that fp32 can hold, as short as fp32 tells it from its neighbours."""
        value = self.fields.get(name, default)
        info = np.finfo(np.float32)
        if type(value) not in (int, float) or not info.tiny <= value <= info.max:
            raise self.error(name, "a positive number that fp32 can hold")
        return float(str(np.float32(value)))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str) -> str:
        """A text."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self.error(name, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        value = self.fields.get(name)
        if not isinstance(value, list):
            raise self.error(name, "an array of texts")
        return value

    def numbers(self, name: str, count: int, *, kind: str) -> np.ndarray:
        """(count,) numbers of a kind of numpy: "i" whole, "f" real."""
        value = self.fields.get(name)
        kinds = {"i": "iu", "f": "f"}[kind]
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or len(value) != count:
            raise self.error(name, f"{count} {'whole' if kind == 'i' else 'real'} numbers, one for each token")
        return value


def _is_array(value: Any) -> bool:
    return isinstance(value, list | np.ndarray)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: its type's name, its shape (rows last but one), and where its bytes are."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, GgufTensor]


class HeaderError(Exception):
    """What is wrong with a header; the reader puts the path in front."""


def read_header(content: mmap.mmap, path: Path) -> GgufHeader:
    """The header of a file.

    Args:
        content: the whole file; nothing of it is kept.   path: for messages.
    Raises:
        ValueError: it is cut, made up, or has tensors of a type that is not read; names file and field.
    """
    try:
        cursor = _Cursor(content)
        if cursor.raw(4, "magic") != MAGIC:
            raise HeaderError("magic: expected a GGUF file, got other bytes")
        version = cursor.number("<I", "version")
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0 and version >> 24 in VERSIONS
            got = "a big-endian file" if swapped else version
            raise HeaderError(f"version: expected 2 or 3, got {got}; convert the model again")
        num_tensors = cursor.count("tensor_count", MAX_TENSORS)
        num_fields = cursor.count("kv_count", MAX_FIELDS)
        fields: dict[str, Any] = {}
        for number in range(num_fields):
            name = cursor.name(f"field {number}: name")
            if name in fields:
                raise HeaderError(f"{shown(name)}: expected the field once, got it twice")
            fields[name] = cursor.value(shown(name))
        metadata = Metadata(path, fields)
        tensors = _read_tensors(cursor, num_tensors, _alignment(metadata), len(content))
    except HeaderError as error:
        raise ValueError(f"{path}: {error}") from None
    return GgufHeader(path, metadata, tensors)


class _Cursor:
    """Reads a header from its start to its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.at, self._texts = content, 0, 0
        self._end = min(len(content), MAX_HEADER_BYTES)

    def _advance(self, count: int, what: str) -> int:
        """Step over bytes; returns where they begin."""
        start, end = self.at, self.at + count
        if end > self._end:
            size = len(self._content)
            if end > size:
                raise HeaderError(f"{what}: expected a whole file, got {size} bytes, for it ends at {end}")
            raise HeaderError(f"{what}: expected a header of at most {MAX_HEADER_BYTES} bytes, got a longer one")
        self.at = end
        return start

    def raw(self, count: int, what: str) -> bytes:
        start = self._advance(count, what)
        return self._content[start : self.at]

    def number(self, form: str, what: str) -> int:
        return struct.unpack(form, self.raw(struct.calcsize(form), what))[0]

    def count(self, what: str, most: int) -> int:
        number = self.number("<Q", what)
        if number > most:
            raise HeaderError(f"{what}: expected at most {most}, got {number}")
        return number

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        content = self.raw(self.count(f"{what}: length", most), what)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise HeaderError(f"{what}: expected UTF-8, got the byte {content[error.start]:#x}") from None

    def name(self, what: str) -> str:
        text = self.text(what, MAX_NAME_BYTES)
        if not text:
            raise HeaderError(f"{what}: expected 1 to {MAX_NAME_BYTES} bytes, got none")
        return text

    def value(self, what: str) -> Any:
        """A metadata value, its type in front."""
        kind = self.number("<I", f"{what}: type")
        if kind == TEXT:
            return self.text(what)
        if kind == ARRAY:
            return self._array(what)
        return self._numbers(kind, 1, what)[0].item()

    def _array(self, what: str) -> list[str] | np.ndarray:
        kind = self.number("<I", f"{what}: type of the array")
        count = self.number("<Q", f"{what}: length of the array")
        if kind == ARRAY:
            raise HeaderError(f"{what}: expected numbers or texts, got arrays in an array")
        if kind != TEXT:
            return self._numbers(kind, count, what)
        self._texts += count
        if self._texts > MAX_TEXTS:
            raise HeaderError(f"{what}: expected at most {MAX_TEXTS} texts in all arrays, got {self._texts}")
        return self._many_texts(count, what)

    def _many_texts(self, count: int, what: str) -> list[str]:
        """`count` texts, each read as `text` does, in a fifth of the time."""
        content, length_at, texts = self._content, struct.Struct("<Q").unpack_from, []
        last = self._end - 8
        for _ in range(count):
            at = self.at
            end = at + 8 + length_at(content, at)[0] if at <= last else self._end + 1
            if end > self._end:
                # Says what is missing.
                self.text(what)
            try:
                texts.append(content[at + 8 : end].decode("utf-8"))
            except UnicodeDecodeError:
                self.text(what)
            self.at = end
        return texts

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in SCALARS:
            raise HeaderError(f"{what}: type: expected one of the format's, got {kind}")
        dtype = np.dtype(SCALARS[kind])
        start = self._advance(count * dtype.itemsize, what)
        content = self._content[start : self.at]
        if kind == BOOL and content.strip(b"\0\1"):
            raise HeaderError(f"{what}: expected true or false as 1 or 0, got another byte")
        return np.frombuffer(content, dtype)


def _alignment(metadata: Metadata) -> int:
    value = metadata.whole("general.alignment", DEFAULT_ALIGNMENT, least=1)
    if value & (value - 1):
        raise metadata.error("general.alignment", "a power of two")
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int, size: int) -> dict[str, GgufTensor]:
    gguf = gguf_package()
    kinds = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    tensors: dict[str, GgufTensor] = {}
    for number in range(count):
        name = cursor.name(f"tensor {number}: name")
        if name in tensors:
            raise HeaderError(f"{shown(name)}: expected the tensor once, got it twice")
        tensors[name] = _read_tensor(cursor, shown(name), alignment, kinds)
    data = -(-cursor.at // alignment) * alignment
    placed = {name: GgufTensor(t.kind, t.shape, data + t.start, t.size) for name, t in tensors.items()}
    end, last = data, "the header"
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise HeaderError(f"{shown(name)}: offset: expected bytes behind {last}, got some of them again")
        end, last = tensor.start + tensor.size, shown(name)
        if end > size:
            raise HeaderError(f"{last}: expected a whole file, got {size} bytes, for it ends at {end}")
    return placed


def _read_tensor(cursor: _Cursor, name: str, alignment: int, kinds: Mapping[int, tuple[str, int, int]]) -> GgufTensor:
    """A tensor whose start counts from the first byte of the data.

    Args:
        kinds: number of a type -> its name, the elements of a block, and the bytes of one.
    """
    num_dims = cursor.number("<I", f"{name}: dims")
    if not 1 <= num_dims <= MAX_DIMS:
        raise HeaderError(f"{name}: dims: expected 1 to {MAX_DIMS}, got {num_dims}")
    # The file has the innermost dim first.
    shape = tuple(cursor.number("<Q", f"{name}: dims") for _ in range(num_dims))[::-1]
    number, offset = cursor.number("<I", f"{name}: type"), cursor.number("<Q", f"{name}: offset")
    if not all(1 <= n < 2**63 for n in shape):
        raise HeaderError(f"{name}: dims: expected positive numbers below 2^63, got {shown(list(shape), 100)}")
    kind, block, block_bytes = kinds.get(number, (f"number {number}", 1, 1))
    if kind not in READABLE:
        raise HeaderError(f"{name}: type: expected one of {', '.join(READABLE)}, got {kind}")
    if shape[-1] % block:
        raise HeaderError(f"{name}: dims: expected rows of whole blocks of {block} for {kind}, got {shape[-1]}")
    if offset % alignment:
        raise HeaderError(f"{name}: offset: expected a multiple of {alignment}, got {offset}")
    return GgufTensor(kind, shape, offset, math.prod(shape) // block * block_bytes)

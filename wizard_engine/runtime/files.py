"""Atomic writes of files, and content hashes."""

import dataclasses
import enum
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_BYTES = 1 << 20
LARGE_FILE_BYTES = 64 << 20


def sync_directory(directory: Path) -> None:
    """fsync a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """Binary file that replaces `path` when the block ends, and is deleted if the block raises.

    Parent directories are made. Processes, also of different machines, may write the same path at once: one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{path}: not written ({error.strerror}); the former file is intact") from error
        raise
    sync_directory(path.parent)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file atomically: temporary file, fsync, rename. Parent directories are made."""
    with replacing(Path(path)) as file:
        file.write(content)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """`write_text` of the value as indented JSON; dataclasses, paths and enums are allowed (see `to_plain`)."""
    write_text(path, json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n")


def to_plain(value: Any) -> Any:
    """The value in JSON types only: dataclasses become objects, paths text, enums their value.

    Raises:
        TypeError: a type that JSON cannot hold.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, enum.Enum):
        return to_plain(value.value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"JSON value: expected text, numbers, lists, objects, paths or enums, got {type(value).__name__}")


def content_hash(value: Any) -> str:
    """SHA-256, in hex, of the value as canonical JSON: equal for equal content, whatever the key order."""
    text = json.dumps(to_plain(value), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path | str) -> str:
    """SHA-256, in hex, of a file, or for a directory of its sorted relative names and their files' hashes.

    Raises:
        ValueError: the path does not exist.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        return content_hash([[item.relative_to(path).as_posix(), file_hash(item)] for item in files])
    if not path.is_file():
        raise ValueError(f"{path}: expected a file or directory, got nothing there; check the path")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Identity of an output: its hash, or for a large file its size and modification time."""
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        return content_hash([[item.relative_to(path).as_posix(), file_fingerprint(item)] for item in files])
    status = path.stat()
    if status.st_size > LARGE_FILE_BYTES:
        return f"size {status.st_size} mtime_ns {status.st_mtime_ns}"
    return file_hash(path)


def read_object(path: Path) -> dict | None:
    """JSON object in a file; None if the file is missing or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None

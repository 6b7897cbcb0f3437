"""Atomic writes of files and directories, JSON files with a checksum, and content hashes."""

import ctypes
import dataclasses
import enum
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_BYTES = 1 << 20
LARGE_FILE_BYTES = 64 << 20
# Where a directory waits while another takes its place, on file systems that cannot exchange two names in one step.
REPLACED = ".replaced_"
_CHECKSUM = re.compile(rb',\s*"checksum": "([0-9a-f]{64})"\s*\}\s*\Z')
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def sync_directory(directory: Path) -> None:
    """fsync a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """fsync every file of a directory and of its subdirectories, and the directories themselves."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync_directory(Path(folder) / name)
        sync_directory(Path(folder))


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or directories in one step; False where the system cannot.

    Raises:
        OSError: the system can, and it failed.
    """
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if not rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def replace_directory(new: Path, path: Path) -> None:
    """Give a directory, whose files are on disk, the name `path`; what stood there is removed afterwards.

    A reader finds the former directory or the new one under `path`, at every moment. Where the system cannot exchange
    two names, the former one is moved aside for the time of a rename; after a kill `restore_replaced` moves it back.
    """
    former = new
    if not os.path.lexists(path):
        new.rename(path)
    elif not exchange(new, path):
        former = path.with_name(REPLACED + path.name)
        remove(former)
        path.rename(former)
        try:
            new.rename(path)
        except OSError:
            former.rename(path)
            raise
    sync_directory(path.parent)
    remove(former)


def restore_replaced(folder: Path) -> None:
    """Move back the directories of a folder whose replacement was killed between its two renames."""
    for aside in folder.glob(REPLACED + "*"):
        path = folder / aside.name.removeprefix(REPLACED)
        if not os.path.lexists(path):
            with suppress(FileNotFoundError):
                aside.rename(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def naming(path: Path | str, consequence: str) -> Iterator[None]:
    """An OSError of the block, such as that of a full disk, names the file and what its failure means."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{path}: not written ({error.strerror}); {consequence}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """Binary file that replaces `path` when the block ends, and is deleted if the block raises.

    Parent directories are made. Processes, also of different machines, may write the same path at once: one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    is_ours = False
    try:
        # Exclusive: never through a link that somebody has put there.
        with open(temporary, "xb") as file:
            is_ours = True
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if is_ours:
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


def write_json_lines(path: Path | str, values: Iterable[Any]) -> None:
    """Write a file atomically with one JSON value a line; values are taken one after another."""
    with replacing(Path(path)) as file:
        file.writelines((json.dumps(value, ensure_ascii=False) + "\n").encode() for value in values)


def write_sealed(path: Path | str, value: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write an object with a last field `checksum`, the SHA-256 of all bytes before it, as JSON; see `read_sealed`.

    Raises:
        ValueError: the object is empty.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=to_plain)
    if not value:
        raise ValueError(f"{path}: expected an object with fields, got none")
    body = text.removesuffix("}").rstrip()
    end = "\n}" if indent else "}"
    separator = f",\n{' ' * indent}" if indent else ", "
    digest = hashlib.sha256(body.encode("utf-8")).hexdigest()
    write_text(path, f'{body}{separator}"checksum": "{digest}"{end}\n')


def read_sealed(path: Path, advice: str, *, version: tuple[str, Any]) -> dict[str, Any] | None:
    """The object that `write_sealed` wrote, without its checksum; None where there is no file.

    An object of another version, of an earlier release or of another program, may be without a checksum: its reader
    refuses it by its version.

    Args:
        advice: what the user can do about damage.   version: a field and its value in objects that have a checksum.
    Raises:
        ValueError: the bytes are not those that were written, or no JSON object.
    """
    try:
        content = path.read_bytes() if path.is_file() else None
    except FileNotFoundError:
        content = None
    if content is None:
        if os.path.lexists(path):
            raise ValueError(f"{path}: expected a file, got another kind of entry; {advice}")
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {str(error)[:200]}; it is cut or damaged: {advice}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}; {advice}")
    stated = value.pop("checksum", None)
    if stated is not None or value.get(version[0]) == version[1]:
        match = _CHECKSUM.search(content)
        if match is None or hashlib.sha256(content[: match.start()]).hexdigest() != match[1].decode():
            raise ValueError(f"{path}: corrupt: its content does not fit its checksum; {advice}")
    return value


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


def file_hash(path: Path | str, read: Callable[[int], object] = int) -> str:
    """SHA-256, in hex, of a file, or for a directory of its sorted relative names and their files' hashes.

    Args:
        read: called with the number of bytes that were read, again and again.
    Raises:
        ValueError: the path does not exist, or is a pipe or a device.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        return content_hash([[item.relative_to(path).as_posix(), file_hash(item, read)] for item in files])
    if not path.is_file():
        got = "a pipe or a device" if path.exists() else "nothing there"
        raise ValueError(f"{path}: expected a file or directory, got {got}; check the path")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            read(len(chunk))
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(item.stat().st_size for item in (path.rglob("*") if path.is_dir() else [path]) if item.is_file())


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

"""The C++ part of the engine behind a plain C interface, loaded with ctypes; `csrc.cuda` is the CUDA part.

`library()` builds libwizard.so with g++ when it is missing or older than its sources, and loads it once. Nothing here
needs more than the standard library, so that the package's build can import it too.
"""

import ctypes
import fcntl
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent.resolve()
LIBRARY = FOLDER / "libwizard.so"
# Without contraction, so that code compiled for several instruction sets gives the same bits.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
)
MEMORY = -1

_int32, _int64, _double, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_SIGNATURES = {
    "wizard_pack": (_int64, (_pointer, _int64, _int64, _pointer)),
    "wizard_shingles": (_int64, (ctypes.c_char_p, _pointer, _int64, _int64, _pointer, _pointer)),
    "wizard_signatures": (_int64, (_pointer, _pointer, _int64, _int64, ctypes.c_uint64, _pointer)),
    "wizard_adamw_level": (_int64, ()),
    "wizard_adamw": (
        _int64,
        (_pointer,) * 5 + (_int32, _pointer, _int64) + (_double,) * 5 + (_int64, _double, _int32, _int32),
    ),
    "wizard_paged_attention": (
        _int64,
        (_int32, *(_pointer,) * 7, *(_int64,) * 7, _double, _int64, _int64, _int32, _int32),
    ),
    "wizard_write_pages": (
        _int64,
        (_int32, _pointer, _int64, *(_pointer,) * 6, *(_int64,) * 5, _int32),
    ),
    "wizard_write": (_int64, (_int32, _pointer, _pointer, _int64, _pointer)),
    "wizard_clusters": (_int64, (_pointer,) * 4 + (_int64,) * 3 + (ctypes.c_double, _pointer)),
}


def sources() -> list[Path]:
    """The C++ files that the library is built from, in name order."""
    return sorted(FOLDER.glob("*.cpp"))


def is_current() -> bool:
    """Whether the library is there and no older than its sources."""
    return is_newer(LIBRARY, sources())


def is_newer(library: Path, sources: Sequence[Path]) -> bool:
    """Whether a library is there and no older than its sources and the headers beside it."""
    read = [*sources, *library.parent.glob("*.h")]
    return library.exists() and all(library.stat().st_mtime >= source.stat().st_mtime for source in read)


def build() -> Path:
    """Compiles the sources into libwizard.so unless it is current; processes that call it at once build it once.

    Raises:
        RuntimeError: g++ is missing or the folder cannot be written, or the compiler fails, with its output.
    """
    try:
        compile_library(LIBRARY, sources(), [os.environ.get("CXX", "g++"), *FLAGS])
    except OSError as error:
        raise RuntimeError(
            f"{LIBRARY}: expected to build it with g++, got {error}; install g++ or build it once"
        ) from None
    return LIBRARY


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library with the argument types of every function declared; built first where needed."""
    if not is_current():
        build()
    loaded = ctypes.CDLL(str(LIBRARY))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def check(status: int, what: str) -> int:
    """`status` of a C function; MemoryError when it says that memory ran out."""
    if status == MEMORY:
        raise MemoryError(f"{what}: not enough memory")
    return status


def compile_library(library: Path, sources: Sequence[Path], command: Sequence[str]) -> None:
    """Runs `command SOURCES -o library` unless the library is current, one process at a time.

    It compiles beside the library and renames, so that no process ever loads half a file.

    Raises:
        OSError: the compiler is missing or the folder cannot be written.
        RuntimeError: the compiler fails; with its output.
    """
    with _lock(library.parent):
        if is_newer(library, sources):
            return
        with tempfile.TemporaryDirectory(prefix=".build.", dir=library.parent) as folder:
            output = Path(folder) / library.name
            whole = [*command, *map(str, sources), "-o", str(output)]
            result = subprocess.run(whole, capture_output=True, text=True)
            if result.returncode:
                printed = result.stderr or result.stdout
                raise RuntimeError(f"{' '.join(whole)}: expected a library, got exit {result.returncode}:\n{printed}")
            os.replace(output, library)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on the folder, which is let go when the process ends for whatever reason."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

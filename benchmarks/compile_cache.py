"""Triton's compile cache made ahead on a machine without a GPU, to be carried to one with it.

  python -m benchmarks.compile_cache --out DIR                     what a GPU check launches, for sm_90
  python -m benchmarks.compile_cache --out DIR --source training   some of its sources alone
  python -m benchmarks.compile_cache --out DIR --workers 8

Binaries lie where Triton looks them up, under keys that follow from its own files, the kernels' source, the arguments'
types and the options: make the cache with the python, torch and triton that will use it. What loading does not need is
left out. Beside them lies manifest.json; `use` compares it with the machine, and says why it does not take a cache.

Exit status: 0; 1 where a kernel does not compile, each named; 2 for a wrong command line, a folder that cannot be taken
or a missing compiler.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import Parser
from wizard_engine.runtime.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"
# What loading a kernel reads: the rest of what Triton writes is for people.
KEPT = (".cubin", ".json", ".so")
ARCHS = ("80", "86", "90", "100")


@dataclass(frozen=True)
class Manifest:
    """What a cache was made by and for, and what is in it.

    `toolchain` stands for Triton's own files and its assembler, `source` for the kernels and their tables.
    """

    triton: str
    toolchain: str
    python: str
    torch: str
    arch: int
    source: str
    path: str
    kernels: int = 0
    launchers: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, folder: Path, arch: int) -> "Manifest":
        """The manifest of a cache that this machine would make in a folder.

        Raises:
            RuntimeError: Triton has no assembler for the architecture.
        """
        import triton

        return cls(
            triton.__version__,
            toolchain(arch),
            platform.python_version(),
            torch.__version__,
            arch,
            source_hash(),
            str(folder.resolve()),
        )

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            ValueError: there is none, or it is not one.
        """
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / MANIFEST}: expected the manifest of a compile cache, got {type(error).__name__}"
            ) from None

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")

    def differences(self, other: "Manifest") -> list[str]:
        """Why a cache of `other` is of no use where this one would be made, its path apart."""
        changes = [
            f"made {preposition} {name} {getattr(other, name)}, not {getattr(self, name)}"
            for name, preposition in (("triton", "by"), ("arch", "for"), ("source", "of"), ("toolchain", "by"))
            if getattr(self, name) != getattr(other, name)
        ]
        minor, others = (version.rpartition(".")[0] for version in (self.python, other.python))
        return changes + ([f"made by python {other.python}, not {self.python}"] if minor != others else [])


def toolchain(arch: int) -> str:
    """Hash of what every key of the cache holds beside kernel and options.

    Raises:
        RuntimeError: Triton has no assembler for the architecture.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    try:
        backend = make_backend(GPUTarget("cuda", arch, 32))
        backend.hash()
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"ptxas: expected Triton's assembler for sm_{arch}, got {error}; set TRITON_PTXAS_PATH to one"
        ) from None
    text = f"{triton_key()}-{backend.hash()}-{sorted(get_cache_invalidating_env_vars().items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_hash() -> str:
    """Hash of the kernels and their tables."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels" / "configurations").glob("*.json")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def make(folder: Path, arch: int, workers: int | None = None, sources: Sequence[str] | None = None) -> list[str]:
    """Fill a folder with the kernels that the sources launch; return messages of what failed.

    Raises:
        ValueError: the folder holds something else, or a cache that does not fit this machine.
        RuntimeError: a compiler is missing.
    """
    from benchmarks import launch_sources

    began, folder = time.monotonic(), folder.resolve()
    manifest = Manifest.of(folder, arch)
    _claim(folder, manifest)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    wrong = _compile(tuple(sources or launch_sources.SOURCES), arch, workers)
    prune(folder)
    _count(manifest, folder, time.monotonic() - began).write(folder)
    return wrong


def _claim(folder: Path, manifest: Manifest) -> None:
    """Put an empty manifest where there is none; ValueError for a folder that is not this cache's."""
    if (folder / MANIFEST).is_file():
        stored = Manifest.read(folder)
        wrong = manifest.differences(stored)
        if stored.path != manifest.path:
            wrong.append(f"made for the path {stored.path}")
        if wrong:
            raise ValueError(f"--out: expected a new folder or this machine's cache, {folder} was {'; '.join(wrong)}")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out: expected a new folder or a compile cache, got {folder} with other things in it")
    else:
        manifest.write(folder)


def _compile(names: Sequence[str], arch: int, workers: int | None) -> list[str]:
    """Compile what sources ask for and the driver's C code in parallel; return messages of what failed."""
    from tqdm import tqdm

    from benchmarks.jit_requests import compile_request, driver_request
    from benchmarks.launch_sources import Asked
    from benchmarks.tune_processes import Compilers

    compilers, asked = Compilers(workers, compile_request), Asked(names, arch)
    jobs = [driver_request(arch)]
    waiting = compilers.submit(jobs)
    try:
        for request in tqdm(asked, desc="ask", unit="kernel", disable=None):
            jobs.append(request)
            waiting += compilers.submit([request])
        results = [job.result() for job in tqdm(waiting, desc="compile", unit="kernel", disable=None)]
    finally:
        asked.close()
        compilers.close()
    failed = [f"{job.name}: {result['error']}" for job, result in zip(jobs, results) if "error" in result]
    return [*asked.failed, *failed]


def _count(manifest: Manifest, folder: Path, seconds: float) -> Manifest:
    sizes = {path: path.stat().st_size for path in folder.glob("*/*")}
    kinds = [sum(path.suffix == suffix for path in sizes) for suffix in (".cubin", ".so")]
    return replace(manifest, kernels=kinds[0], launchers=kinds[1], bytes=sum(sizes.values()), seconds=round(seconds, 1))


def prune(folder: Path) -> None:
    """Leave in a cache what loading needs, and write its indices for where it stands: they hold absolute paths."""
    for entry in (path for path in folder.resolve().iterdir() if path.is_dir()):
        kept = [path for path in entry.iterdir() if path.suffix in KEPT]
        for path in set(entry.iterdir()) - set(kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for index in (path for path in kept if path.name.startswith("__grp__")):
            children = {path.name: str(path) for path in sorted(kept) if path != index}
            write_text(index, json.dumps({"child_paths": children}))


def reasons_against(folder: Path, arch: int) -> list[str]:
    """Why a folder is no cache that this machine can use; empty where it is one.

    Raises:
        ValueError: it holds no manifest.
        RuntimeError, ImportError: this machine cannot say what it would make.
    """
    stored = Manifest.read(folder)
    return Manifest.of(folder, arch).differences(stored) + ([] if stored.kernels else ["never finished"])


def use(folder: Path, arch: int = 90) -> str:
    """Let this process and those that it starts look kernels up in a cache made ahead; a line that says what was done.

    A cache of another Triton, python, architecture or source is not used. One that was made for another path gets its
    indices written anew.
    """
    try:
        wrong = reasons_against(folder, arch)
    except (ImportError, ValueError, RuntimeError) as error:
        return f"compile cache: not used, {error}"
    if wrong:
        return f"compile cache: {folder} not used, it was {'; '.join(wrong)}; kernels are compiled anew"
    stored, here = Manifest.read(folder), str(folder.resolve())
    text = f"compile cache: {stored.kernels} kernels and {stored.launchers} launchers, {stored.bytes / 2**20:.1f} MiB"
    if stored.path != here:
        prune(folder)
        replace(stored, path=here).write(folder)
        text += f"; made for the path {stored.path}, indices written anew for {here}"
    os.environ["TRITON_CACHE_DIR"] = here
    return text


def compile_missing(names: Sequence[str], arch: int, deadline: float, workers: int | None = None) -> str:
    """Compile in parallel what sources ask for and the cache does not hold, until a deadline (`time.monotonic`).

    Returns:
        A line that says how many were there, were compiled, failed or missed the deadline.
    """
    from benchmarks.jit_requests import Request, compile_request
    from benchmarks.launch_sources import Asked
    from benchmarks.tune_processes import Compilers

    began, count = time.monotonic(), 0
    missing: list[Request] = []
    waiting: list[Any] = []
    compilers, asked = Compilers(workers, compile_request), Asked(names, arch, deadline)
    try:
        for request in asked:
            count += 1
            if not request.is_cached:
                missing.append(request)
                waiting += compilers.submit([request])
        results = compilers.results(waiting, deadline)
    finally:
        asked.close()
        compilers.close()
    failed = [f"{job.name}: {result['error']}" for job, result in zip(missing, results) if "error" in result]
    late = sum(not result for result in results)
    text = (
        f"{count - len(missing)} of {count} kernels cached, {len(missing) - len(failed) - late} compiled "
        f"ahead in {time.monotonic() - began:.1f} s, {len(failed)} failed, {late} not reached"
    )
    return "; ".join([text, *asked.failed, *failed])


def check_machine() -> None:
    """RuntimeError where this machine cannot make a cache, with what to do."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise RuntimeError("expected triton to be installed, found none; pip install triton") from None
    if re.fullmatch("1|true|on|yes|y", os.environ.get("TRITON_INTERPRET", "").lower()):
        raise RuntimeError("expected the compiler, got TRITON_INTERPRET in the environment; unset it")
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "clang")):
        raise RuntimeError("expected a C compiler for the launchers, found neither gcc nor clang; install one")


def main(args: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status."""
    reader = Parser("python -m benchmarks.compile_cache", __doc__ or "")
    reader.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the cache")
    reader.add_argument("--arch", default="90", metavar="N", help=f"of {', '.join(ARCHS)}; default: %(default)s")
    reader.add_argument("--workers", type=int, metavar="N", help="processes; default: one less than there are cores")
    reader.add_argument("--source", nargs="+", metavar="NAME", help="of benchmarks/launch_sources.py; default: all")
    options = reader.parse_args(args)
    reader.names("--arch", [options.arch], ARCHS)
    if options.workers is not None and options.workers < 1:
        reader.error(f"--workers: expected 1 or more, got {options.workers}")
    try:
        check_machine()
        from benchmarks.launch_sources import SOURCES

        wrong = make(options.out, int(options.arch), options.workers, reader.names("--source", options.source, SOURCES))
    except (RuntimeError, ValueError) as error:
        reader.error(str(error))
    for line in wrong:
        print(line, file=sys.stderr)
    made = Manifest.read(options.out)
    print(
        f"{made.kernels} kernels and {made.launchers} launchers for sm_{made.arch} in {made.path}: "
        f"{made.bytes / 2**20:.1f} MiB, {made.seconds:.0f} s, {len(wrong)} failed"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

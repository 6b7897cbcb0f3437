"""Static tables of kernel configurations: one JSON file per kernel, an entry per architecture and shape class.

An entry is {"arch": 90, "class": {...}, "config": {...}, "measured": null | {...}}. `class` names the shape class by
the keys that the kernel looks up; `config` holds constexprs, num_warps and num_stages; `measured` is what
`python -m benchmarks.tune` recorded when it chose the entry on a GPU, or null where the machine code decided.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "configurations"
# Architecture whose entries the interpreter and ahead-of-time compilation take unless told otherwise.
DEFAULT_ARCH = 90
# GPUs of a generation with about 100 KB of shared memory per block, where its first chip has 164 to 228.
SMALL_MEMORY = {86: 86, 89: 86, 120: 86, 121: 86}

_arch: int | None = None
_replaced: dict[str, dict[str, Any]] = {}


@contextmanager
def use_arch(arch: int) -> Iterator[None]:
    """Look every configuration of the block up for this architecture (80, 86, 90, 100)."""
    global _arch
    before, _arch = _arch, arch
    try:
        yield
    finally:
        _arch = before


@contextmanager
def use_config(kernel: str, **config: Any) -> Iterator[None]:
    """Launch `kernel` with this configuration inside the block, whatever its table says: for tuning and for tests."""
    before = dict(_replaced)
    _replaced[kernel] = config
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device as 10 major + minor; DEFAULT_ARCH elsewhere."""
    if _arch is not None:
        return _arch
    return _capability(device.index or 0) if device.type == "cuda" else DEFAULT_ARCH


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def table(kernel: str) -> tuple[dict[str, Any], ...]:
    """Entries of a kernel's table, in file order."""
    return tuple(json.loads((FOLDER / f"{kernel}.json").read_text(encoding="utf-8"))["entries"])


@cache
def kernels() -> tuple[str, ...]:
    """Names of all tables."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def configuration(kernel: str, device: torch.device, **keys: Any) -> dict[str, Any]:
    """Configuration of a launch: the entry of the newest architecture that the device can run, for this shape class.

    Raises:
        ValueError: the table has no entry of this class for this device.
    """
    return _replaced.get(kernel) or _lookup(kernel, architecture(device), tuple(sorted(keys.items())))


@cache
def _lookup(kernel: str, arch: int, keys: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    shape_class, limit = dict(keys), SMALL_MEMORY.get(arch, arch)
    entries = [entry for entry in table(kernel) if entry["class"] == shape_class and entry["arch"] <= limit]
    if not entries:
        archs = sorted({entry["arch"] for entry in table(kernel)})
        raise ValueError(
            f"{kernel}: expected a table entry for {shape_class} on sm_{arch}, found none (sm_ of {archs})"
        )
    return max(entries, key=lambda entry: entry["arch"])["config"]

"""Saving and loading checkpoints of a run directory."""

import errno
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from wizard_engine.checkpoint.manifest import FORMAT, GROUP_PATTERN, NAME, describe_group, read_group, read_manifest
from wizard_engine.files import sync_directory, to_plain, write_json

STEP_PATTERN = re.compile(r"step_(\d{8,})")
PARTIAL, REPLACED = ".partial_", ".replaced_"


def save(
    directory: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int = 2,
) -> Path:
    """Write `directory`/checkpoints/step_NNNNNNNN, complete or not at all; returns that directory.

    Args:
        directory: run directory.
        step: optimizer steps done, at least 0; a checkpoint of the same step is replaced.
        tensors: group -> name -> tensor of any dtype and device; a group is one file. Groups may be empty.
        state: JSON object: counters, loader position, generator states, ...
        keep_last: newest checkpoints kept, at least 1; older ones are removed once this one is in place.
    Raises:
        OSError: the disk is full or fails; names the file. What was there before is intact, nothing is left over.
        ValueError: step, keep_last or a group's name is out of range.
        TypeError: the state is not JSON.
    """
    if step < 0 or keep_last < 1:
        raise ValueError(f"step, keep_last: expected at least 0 and 1, got {step} and {keep_last}")
    for group in tensors:
        if not GROUP_PATTERN.fullmatch(group):
            raise ValueError(f"group: expected letters, digits, _ . -, got {group!r}; rename the group")
    plain = to_plain(state)
    folder = Path(directory) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    final = folder / f"step_{step:08d}"
    partial = folder / f"{PARTIAL}{final.name}"
    try:
        partial.mkdir()
        groups = {group: _write_group(partial / f"{group}.safetensors", values) for group, values in tensors.items()}
        write_json(partial / NAME, {"format": FORMAT, "step": step, "state": plain, "groups": groups})
        sync_directory(partial)
        _put_in_place(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(error.errno, f"{final}: not saved ({error}); earlier checkpoints are intact") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in _steps(folder)[:-keep_last]:
        if old != final:
            shutil.rmtree(old)
    return final


def latest(directory: Path) -> Path | None:
    """The newest checkpoint of a run directory; None where there is none."""
    folder = Path(directory) / "checkpoints"
    if not folder.is_dir():
        return None
    _restore(folder)
    return next(reversed(_steps(folder)), None)


def load(
    path: Path, like: Mapping[str, Mapping[str, Tensor]] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(group -> name -> CPU tensor, state) of a checkpoint directory, every byte verified.

    Args:
        path: a directory that `save` returned.
        like: tensors that the caller will copy into; names and shapes must agree, values and dtypes do not matter.
    Raises:
        ValueError: a file is absent, cut, damaged or foreign; names the file and the tensor.
    """
    path = Path(path)
    manifest = read_manifest(path)
    tensors = {group: read_group(path, group, entry) for group, entry in manifest["groups"].items()}
    for group, values in (like or {}).items():
        _check_like(path / f"{group}.safetensors", tensors.get(group, {}), values)
    return tensors, manifest["state"]


def _check_like(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    for name in sorted({*tensors, *like}):
        found = list(tensors[name].shape) if name in tensors else "nothing"
        expected = list(like[name].shape) if name in like else "nothing"
        if found != expected:
            raise ValueError(
                f"{path}: tensor {name}: expected shape {expected}, got {found}; this checkpoint is another model's: "
                "use the configuration it was made with, or another --out"
            )


def _owned(tensor: Tensor, seen: set[int]) -> Tensor:
    """The tensor on the CPU, contiguous, alone in its storage (safetensors refuses to write shared memory)."""
    tensor = tensor.detach().to("cpu").contiguous()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
        tensor = tensor.clone()
    if tensor.numel():
        seen.add(tensor.untyped_storage().data_ptr())
    return tensor


def _write_group(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file durably; returns its manifest entry."""
    seen: set[int] = set()
    owned = {name: _owned(tensor, seen) for name, tensor in tensors.items()}
    try:
        save_file(owned, path)
    except SafetensorError as error:
        raise OSError(_error_number(str(error)), f"{path}: {error}") from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return describe_group(path, owned)


def _error_number(message: str) -> int:
    """The system's error number that safetensors quotes as `(os error 28)`."""
    found = re.search(r"os error (\d+)", message)
    return int(found.group(1)) if found else errno.EIO


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename onto the final name; a checkpoint of the same step steps aside first and is restored if that fails."""
    aside = final.with_name(REPLACED + final.name)
    if final.exists():
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync_directory(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := STEP_PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _restore(folder: Path) -> None:
    """Give back its name to a checkpoint whose replacement was killed between the two renames."""
    for aside in folder.glob(REPLACED + "*"):
        final = folder / aside.name.removeprefix(REPLACED)
        if not final.exists():
            with suppress(FileNotFoundError):
                aside.rename(final)


def _tidy(folder: Path) -> None:
    """Remove what killed runs left behind."""
    _restore(folder)
    for pattern in (PARTIAL, REPLACED):
        for path in folder.glob(pattern + "*"):
            shutil.rmtree(path)

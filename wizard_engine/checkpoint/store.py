"""Saving and loading checkpoints of a run directory, by one rank or by many."""

import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wizard_engine.parallel.shard_spec import ShardSpec
from wizard_engine.runtime.files import (
    REPLACED,
    replace_directory,
    restore_replaced,
    sync_directory,
    to_plain,
    write_json,
    write_sealed,
)
from wizard_engine.runtime.metrics import byte_bar, progress
from wizard_engine.runtime.object_collectives import first_error, from_main
from wizard_engine.runtime.process import Runtime

from .manifest import FORMAT, GROUP_PATTERN, NAME, Shard, ShardFile, file_name, read_manifest, spec_of, write_shards

STEP_PATTERN = re.compile(r"step_(\d{8,})")
PARTIAL = ".partial_"
Groups = Mapping[str, Mapping[str, Shard | Tensor]]
POLL_SECONDS = 0.01
GRACE_SECONDS = 5.0
NICE = 19


def save(directory: Path, step: int, *, tensors: Groups, state: Mapping[str, Any], keep_last: int = 2) -> Path:
    """Write `directory`/checkpoints/step_NNNNNNNN from one process, complete or not at all; returns that directory.

    Args, errors: as `Saver.save`.
    """
    saver = Saver(directory, Runtime(), keep_last=keep_last)
    saver.save(step, tensors, state)
    saver.wait()
    return Path(directory) / "checkpoints" / f"step_{step:08d}"


class Saver:
    """Writes the checkpoints of a run while the training goes on: `save` makes a copy, and a thread writes it.

    Every rank writes one file into a partial directory. When all files are there, rank 0 writes the manifest and
    renames the directory, so that a checkpoint is complete or absent. The ranks share a file system.

    Args:
        directory: run directory.   keep_last: newest checkpoints kept, at least 1; older ones are removed once the new
            one is in place.   timeout_seconds: how long rank 0 waits for the others' files.
    Attributes:
        stall_seconds: time for which the last `save` stopped the training.
    """

    def __init__(
        self, directory: Path, runtime: Runtime, *, keep_last: int = 2, timeout_seconds: float = 600.0
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last: expected at least 1, got {keep_last}")
        self.folder, self.runtime, self.keep_last = Path(directory) / "checkpoints", runtime, keep_last
        self.timeout_seconds, self.stall_seconds = timeout_seconds, 0.0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._closing = False
        # Pinned memory is slow to allocate: buffers stay for the next checkpoint.
        self._host: dict[str, Tensor] = {}

    def save(self, step: int, tensors: Groups, state: Mapping[str, Any]) -> None:
        """Start to write a checkpoint, after the one before is done; every rank makes the call.

        Args:
            step: optimizer steps done, at least 0; a checkpoint of the same step is replaced.
            tensors: group -> name -> tensor, or the shard of it that this rank writes. Of equal tensors on several
                ranks, one rank passes its own.
            state: JSON object: counters, loader position, ...; rank 0's is kept.
        Raises:
            OSError: the checkpoint before this one was not written; names the rank and the file. Earlier checkpoints
                are intact, and no partial one is left.
            ValueError: step or a group's name is out of range.   TypeError: the state is not JSON.
        """
        began = time.perf_counter()
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        for group in tensors:
            if not GROUP_PATTERN.fullmatch(group):
                raise ValueError(f"group: expected letters, digits, _ . -, got {group!r}; rename the group")
        # Fail here, in the caller, rather than in the thread.
        plain = to_plain(state)
        json.dumps(plain)
        # The thread still reads the host buffers that this call is about to overwrite.
        self.wait()
        partial = self.folder / f"{PARTIAL}step_{step:08d}"
        from_main(self.runtime, lambda: self._prepare(partial))
        shards = {f"{g}/{n}": self._copied(f"{g}/{n}", p) for g, values in tensors.items() for n, p in values.items()}
        # Copies to pinned memory are asynchronous: the optimizer must not change a source before they are done.
        if any(tensor.is_pinned() for tensor in self._host.values()):
            torch.cuda.synchronize()
        listed = {g: {n: _described(p) for n, p in values.items()} for g, values in tensors.items()}
        self._thread = threading.Thread(target=self._work, args=(step, partial, shards, listed, plain), daemon=True)
        self._thread.start()
        self.stall_seconds = time.perf_counter() - began

    def wait(self) -> None:
        """Wait until the last checkpoint is written; every rank makes the call.

        Raises:
            OSError: it was not written; on every rank, with the first rank that failed.
        """
        if self._thread is None:
            return
        with progress(desc=f"write checkpoint in {self.folder}", unit="checkpoint", total=1) as bar:
            while self._thread.is_alive():
                self._thread.join(1.0)
                bar.refresh()
        self._thread = None
        error, self._error = self._error, None
        if error is not None and self.runtime.world_size == 1:
            raise error
        text = first_error(error, self.runtime)
        if text:
            raise OSError(text)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint of this rank is under way."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Finish the checkpoint in progress, without a collective: another rank may be gone."""
        # The thread gives up early on notes of ranks that may be dead.
        self._closing = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _prepare(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _tidy(self.folder)
        partial.mkdir()

    def _copied(self, key: str, shard: Shard | Tensor) -> Shard:
        """A copy of a shard in a host buffer, which the next checkpoint uses again."""
        if isinstance(shard, Tensor):
            shard = Shard.whole(shard)
        values, host = shard.values, self._host.get(key)
        if host is None or host.shape != values.shape or host.dtype != values.dtype:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._host[key] = host
        host.copy_(values, non_blocking=True)
        return Shard(shard.spec, shard.start, host)

    def _work(
        self, step: int, partial: Path, shards: Mapping[str, Shard], listed: Mapping[str, Any], state: Any
    ) -> None:
        """Runs in the thread: writes this rank's file, and on rank 0 the rest."""
        _yield_to_others()
        final = self.folder / f"step_{step:08d}"
        note = partial / f"{file_name(self.runtime.rank)}.json"
        # Ranks talk through note files: a collective in this thread would interleave with those of the training.
        try:
            entry = write_shards(partial / file_name(self.runtime.rank), shards)
            write_json(note, {"entry": entry, "tensors": listed})
        except Exception as error:
            # A note with the error spares rank 0 the wait for this rank's file.
            self._error = _not_saved(final, error)
            with suppress(OSError):
                write_json(note, {"error": str(self._error)})
        if self.runtime.is_main:
            try:
                if self._error is None:
                    self._commit(step, partial, final, state)
            except Exception as error:
                self._error = _not_saved(final, error)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _commit(self, step: int, partial: Path, final: Path, state: Any) -> None:
        """Rank 0: when every rank's file is there, write the manifest and give the directory its name."""
        files, tensors = {}, {}
        for rank in range(self.runtime.world_size):
            note = self._note(partial / f"{file_name(rank)}.json", rank)
            if "error" in note:
                # That rank reports the error to all ranks, in `wait`.
                return
            files[file_name(rank)] = note["entry"]
            for group, values in note["tensors"].items():
                tensors.setdefault(group, {}).update(values)
        # The manifest goes last, and the rename after it: whoever sees the final name sees a complete checkpoint.
        manifest = {"format": FORMAT, "step": step, "state": state, "tensors": tensors, "files": files}
        write_sealed(partial / NAME, manifest, indent=None)
        for note_path in partial.glob("*.safetensors.json"):
            note_path.unlink()
        # The names of the files must be on the disk before the rename makes them visible.
        sync_directory(partial)
        replace_directory(partial, final)
        for old in _steps(self.folder)[: -self.keep_last]:
            if old != final:
                shutil.rmtree(old)

    def _note(self, path: Path, rank: int) -> dict[str, Any]:
        """A rank's note about its file; waits for it.

        Raises:
            OSError: it did not come in time.
        """
        began = time.monotonic()
        while not path.exists():
            # While closing, the other rank may be dead: a short grace is enough for one that is merely slower.
            limit = GRACE_SECONDS if self._closing else self.timeout_seconds
            if time.monotonic() - began > limit:
                raise OSError(f"expected the file of rank {rank} within {limit:.0f} seconds, got none")
            time.sleep(POLL_SECONDS)
        return json.loads(path.read_text(encoding="utf-8"))


def _not_saved(final: Path, error: Exception) -> OSError:
    """The error that `wait` raises on every rank."""
    number = getattr(error, "errno", None) or errno.EIO
    return OSError(number, f"{final}: not saved ({error}); earlier checkpoints are intact")


def _yield_to_others() -> None:
    """Lower this thread's priority below that of the training's threads; only Linux has a priority per thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _described(shard: Shard | Tensor) -> dict[str, Any]:
    values, shape = (shard, shard.shape) if isinstance(shard, Tensor) else (shard.values, shard.spec.shape)
    return {"dtype": str(values.dtype).removeprefix("torch."), "shape": list(shape)}


class Checkpoint:
    """A complete checkpoint, read by ranges; a context manager.

    Attributes:
        state: JSON object saved with the tensors.   step: of the optimizer.
        tensors: group -> name -> {"dtype", "shape"}.
    Raises:
        ValueError: the manifest or a file is absent, truncated or changed; names file and tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self.state, self.step, self.tensors = manifest["state"], manifest["step"], manifest["tensors"]
        match = STEP_PATTERN.fullmatch(self.path.name)
        if match and int(match.group(1)) != self.step:
            raise ValueError(
                f"{self.path / NAME}: expected step {int(match.group(1))}, as its directory's name says, got "
                f"{self.step}; give the directory its name back, or remove this checkpoint"
            )
        keyed = {f"{g}/{n}": e for g, values in self.tensors.items() for n, e in values.items()}
        self._files: list[ShardFile] = []
        self._where: dict[str, list[tuple[ShardSpec, int, int, ShardFile]]] = {}
        try:
            for name, entry in manifest["files"].items():
                file = ShardFile(self.path / name, entry, keyed)
                self._files.append(file)
                for key, (start, stop, *rest) in entry["parts"].items():
                    spec = spec_of(tuple(keyed[key]["shape"]), [start, stop, *rest])
                    self._where.setdefault(key, []).append((spec, start, stop, file))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files:
            file.__exit__()

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Check the bytes of this rank's subset of the files.

        Raises:
            ValueError: a tensor is damaged; names file and tensor.
        """
        # Every byte is read by one rank, so that the time shrinks with the number of ranks.
        files = self._files[rank::world_size]
        with byte_bar(f"check {self.path}", sum(file.entry["bytes"] for file in files)) as bar:
            for file in files:
                file.verify(bar.update)

    def check_like(self, group: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError unless a group has exactly these tensors, in these shapes."""
        tensors = self.tensors.get(group, {})
        for name in sorted({*tensors, *shapes}):
            saved = list(tensors[name]["shape"]) if name in tensors else "nothing"
            expected = list(shapes[name]) if name in shapes else "nothing"
            if saved != expected:
                raise ValueError(
                    f"{self.path}: {group}: tensor {name}: expected shape {expected}, got {saved}; this checkpoint is "
                    "another model's: use the configuration it was made with, or another --out"
                )

    def read(self, group: str, name: str, spec: ShardSpec, start: int, out: Tensor) -> None:
        """Copy elements of a tensor's rows and columns in `spec`, from `start` on in row-major order, into `out`.

        The sharding at the time of the save does not matter.

        Args:
            out: (n,) of any dtype and device.
        """
        key, stop = f"{group}/{name}", start + out.numel()
        for saved_spec, first, last, file in self._where.get(key, ()):
            # The same rows and columns: one contiguous range. Otherwise the layouts meet in rectangles.
            if saved_spec == spec:
                low, high = max(start, first), min(stop, last)
                if low < high:
                    out[low - start : high - start].copy_(file.values(key, low - first, high - low))
                continue
            for tile in spec.slices(start, stop):
                for other in saved_spec.slices(first, last):
                    common = tile.overlap(other)
                    if common is not None:
                        source = file.values(key, other.offset, other.size).view(other.rows, other.columns)
                        tile.crop(tile.of(out), common).copy_(other.crop(source, common))

    def whole(self, group: str, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        entry = self.tensors[group][name]
        out = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        self.read(group, name, ShardSpec.whole(out.shape), 0, out.view(-1))
        return out


def latest(directory: Path) -> Path | None:
    """The newest checkpoint of a run directory; None where there is none."""
    folder = Path(directory) / "checkpoints"
    if not folder.is_dir():
        return None
    restore_replaced(folder)
    return next(reversed(_steps(folder)), None)


def resume(directory: Path, runtime: Runtime, stack: ExitStack) -> Checkpoint | None:
    """The newest checkpoint, opened and verified by all ranks together; None where there is none.

    Raises:
        ValueError: on every rank, if it is damaged on one.
    """
    # Rank 0 chooses: with a shared file system, others may see the directory in another state.
    newest = from_main(runtime, lambda: latest(directory))
    newest_path = None if newest is None else str(newest)
    if newest_path is None:
        return None
    error, opened = None, None
    try:
        opened = stack.enter_context(Checkpoint(Path(newest_path)))
        opened.verify(runtime.rank, runtime.world_size)
    except ValueError as caught:
        error = caught
    text = first_error(error, runtime)
    if text:
        raise ValueError(text)
    return opened


def load(path: Path, like: Mapping[str, Mapping[str, Tensor]] | None = None) -> tuple[dict, dict[str, Any]]:
    """(group -> name -> whole CPU tensor, state) of a checkpoint directory, every byte verified.

    Args:
        path: a directory with a manifest.   like: tensors whose names and shapes must agree.
    Raises:
        ValueError: a file is absent, cut, damaged or foreign; names the file and the tensor.
    """
    with Checkpoint(path) as checkpoint:
        checkpoint.verify()
        for group, values in (like or {}).items():
            checkpoint.check_like(group, {name: tuple(tensor.shape) for name, tensor in values.items()})
        groups = {g: {n: checkpoint.whole(g, n) for n in values} for g, values in checkpoint.tensors.items()}
        return groups, checkpoint.state


def _steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = [(int(match.group(1)), path) for path in folder.iterdir() if (match := STEP_PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(steps)]


def _tidy(folder: Path) -> None:
    """Remove partial and replaced directories of killed runs."""
    restore_replaced(folder)
    for pattern in (PARTIAL, REPLACED):
        for path in folder.glob(pattern + "*"):
            shutil.rmtree(path)

"""Stages of work that know their parents, and are skipped when nothing they depend on has changed."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from wizard_engine.files import file_hash, file_mark, read_object, to_plain, write_json

MISSING = "(absent)"
UNDECIDING = ("out", "overwrite", "device", "threads", "quiet", "audit")


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two JSON values differ, each with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*new, *old]))
        pairs = [(old.get(key, MISSING), new.get(key, MISSING), f"{prefix}.{key}" if prefix else key) for key in keys]
        return [line for a, b, name in pairs for line in _differences(a, b, name)]
    return [] if old == new else [f"{prefix} ({_short(old)} -> {_short(new)})"]


def _short(value: Any) -> str:
    text = value if value is MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else text[:45] + "..."


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A JSON value in which every text that `names` knows is replaced."""
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_main(flag: bool) -> bool:
    """Rank 0's flag, on every rank; the ranks wait for it."""
    if not dist.is_initialized():
        return flag
    held = torch.tensor([int(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(held, src=0)
    return bool(held.item())


class Stage:
    """One step of work with parents: skipped when its inputs, its configuration and its outputs are unchanged.

    `OUT/config.json` says what is being made there, and is written by `start`; `OUT/stage.json` says that it is made,
    and is written, by one rename, by `finish`. Under torchrun every rank makes the same calls; rank 0 decides and
    writes, the others follow.

    Args:
        out: directory of the stage.
        name: which stage it is, "sft" say.
        config: everything that decides the result, seed included; leave out what does not (paths, thread counts).
        inputs: name -> file or directory that the stage reads; they count by content, not by path.
        overwrite: replace what another configuration left in `out`.
    """

    def __init__(
        self, out: Path, name: str, config: Mapping[str, Any], inputs: Mapping[str, Path], overwrite: bool = False
    ):
        self.out, self.name, self.overwrite = Path(out), name, overwrite
        self.config: dict[str, Any] = json.loads(json.dumps(to_plain(config)))
        self.inputs = {key: Path(path) for key, path in inputs.items()}
        self._identity: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, config: Any, name: str, inputs: Mapping[str, Path], models: Mapping[str, str | Path | None] | None = None
    ) -> Self:
        """Stage of a recipe's configuration.

        Args:
            config: dataclass with `out` and perhaps `overwrite`; fields that do not decide the result (UNDECIDING) are
                left out, and paths that are inputs are recorded as such, so moving a file does not change the stage.
            inputs: as for the class.
            models: name -> model directory (an input) or the name of a preset or program (part of the configuration).
        """
        found = {key: Path(path) for key, path in (models or {}).items() if path is not None and Path(path).exists()}
        paths = {**inputs, **found}
        names = {str(path): f"input {key}" for key, path in paths.items()}
        plain = {
            field.name: _renamed(to_plain(getattr(config, field.name)), names)
            for field in fields(config)
            if field.name not in UNDECIDING
        }
        return cls(config.out, name, plain, paths, getattr(config, "overwrite", False))

    def identity(self) -> dict[str, Any]:
        """{"stage", "config", "inputs" (name -> SHA-256)}: equal identities make equal outputs.

        Raises:
            ValueError: an input is absent.
        """
        if self._identity is None:
            for key, path in self.inputs.items():
                if not path.exists():
                    raise ValueError(f"{self.name}: input {key}: expected a file or directory, got none at {path}")
            hashes = {key: file_hash(path) for key, path in self.inputs.items()}
            self._identity = {"stage": self.name, "config": self.config, "inputs": hashes}
        return self._identity

    def is_current(self) -> bool:
        """True when `finish` has been reached with this identity and every output is still as it was written."""
        return _from_main(_is_main() and self._is_current())

    def _is_current(self) -> bool:
        record = read_object(self.out / "stage.json")
        if record is None or not all(path.exists() for path in self.inputs.values()):
            return False
        if {key: record.get(key) for key in ("stage", "config", "inputs")} != self.identity():
            return False
        outputs = {self.out / name: mark for name, mark in record["outputs"].items()}
        return all(path.exists() and file_mark(path) == mark for path, mark in outputs.items())

    def result(self) -> dict:
        """What `finish` was given.

        Raises:
            ValueError: the stage is not finished.
        """
        record = read_object(self.out / "stage.json")
        if record is None:
            raise ValueError(f"{self.out}: expected a finished stage {self.name!r}, got no stage.json; run the stage")
        return record["result"]

    def start(self) -> None:
        """Claim `out` for this identity, keeping what an interrupted run of the same identity left there.

        Raises:
            ValueError: `out` holds another configuration and `overwrite` is off; the message names what differs.
        """
        error = self._claim() if _is_main() else None
        if _from_main(error is not None):
            raise ValueError(error or f"{self.out}: the stage cannot start; rank 0 says why")

    def _claim(self) -> str | None:
        """Write config.json; returns what stands against it, if anything."""
        path = self.out / "config.json"
        former = read_object(path)
        if path.exists() and (former is None or "stage" not in former):
            raise ValueError(
                f"{path}: expected a stage's configuration, got another kind of file; choose another --out"
            )
        differing = [] if former is None else _differences(former, self.identity())
        if differing and not self.overwrite:
            return (
                f"{self.out}: expected the configuration that is there, got another: {'; '.join(differing)}; "
                "choose another --out, or --overwrite to replace it"
            )
        if differing:
            self._clear()
        (self.out / "stage.json").unlink(missing_ok=True)
        write_json(path, self.identity())
        return None

    def _clear(self) -> None:
        """Remove what the former stage wrote here: its listed outputs, checkpoints and metrics, nothing else."""
        record = read_object(self.out / "stage.json") or {}
        names = [
            name for name in record.get("outputs", {}) if not Path(name).is_absolute() and ".." not in Path(name).parts
        ]
        for path in [self.out / name for name in ("stage.json", "checkpoints", "metrics.jsonl", *names)]:
            if path.is_dir() and path.resolve() != self.out.resolve():
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()

    def finish(self, result: Mapping[str, Any], outputs: Sequence[Path] = ()) -> None:
        """Record the stage as done.

        Args:
            result: JSON object that `result()` gives back later.
            outputs: files and directories that must still be there, unchanged, for the stage to count as done.
        Raises:
            ValueError: an output is absent.
        """
        if _is_main():
            self._record(result, outputs)
        _from_main(True)

    def finish_model(self, result: Mapping[str, Any], model: Any, tokenizer: Any, save: Callable[..., Any]) -> dict:
        """`save(model, tokenizer, OUT/model)`, then `finish` with that directory as the output; returns the result."""
        if _is_main():
            save(model, tokenizer, self.out / "model")
        self.finish(result, [self.out / "model"])
        return self.result()

    def _record(self, result: Mapping[str, Any], outputs: Sequence[Path]) -> None:
        marks = {}
        for path in map(Path, outputs):
            if not path.exists():
                raise ValueError(f"{self.name}: output {path}: expected a file or directory, got none")
            marks[os.path.relpath(path, self.out)] = file_mark(path)
        write_json(self.out / "stage.json", {**self.identity(), "outputs": marks, "result": result})

"""Stages: units of work that are skipped if their inputs, configuration and outputs are unchanged."""

import dataclasses
import json
import os
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .files import file_fingerprint, file_hash, read_sealed, remove, size_of, to_plain, write_sealed
from .metrics import byte_bar
from .object_collectives import check_same, from_main
from .process import Runtime
from .run_lock import RunLock
from .text_lines import printable

# Of config.json and stage.json: 1 had no number, 2 no checksums.
VERSION = 3

# Metadata of the field of an option that changes how a stage runs but not what it makes.
INCIDENTAL = {"incidental": True}
# In front of the file of an agent whose replies are written in it; an input like any other file.
SCRIPTED = "scripted:"
# Metadata of the field of an option that changes what a stage measures, and nothing else that it makes.
MEASURED = {"measured": True}
MISSING = "(absent)"
# Characters of a value in a message, and of them those that stand before the first difference.
SHOWN, BEFORE_DIFFERENCE = 60, 16
ADVICE = {
    "stage.json": "remove the file to run the stage again; a training run goes on from its last checkpoint",
    "config.json": "restore the file, or choose another --out",
}


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two JSON values differ, each with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*new, *old]))
        pairs = [(old.get(key, MISSING), new.get(key, MISSING), f"{prefix}.{key}" if prefix else key) for key in keys]
        return [line for a, b, name in pairs for line in _differences(a, b, name)]
    return [] if old == new else [f"{prefix} ({' -> '.join(_where_different(old, new))})"]


def _where_different(*values: Any) -> list[str]:
    """Two different values as text; of long ones the part that begins shortly before the first difference."""
    texts = [value if value is MISSING else json.dumps(value, ensure_ascii=False) for value in values]
    # A short text needs no cut; where it ends early, the other one may differ far behind its beginning.
    same = next((place for place, pair in enumerate(zip(*texts)) if len(set(pair)) > 1), min(map(len, texts)))
    start = max(0, same - BEFORE_DIFFERENCE)
    return [_cut(text, start if len(text) > SHOWN else 0) for text in texts]


def _cut(text: str, start: int) -> str:
    before = "..." if start else ""
    shown = text[start : start + SHOWN - len(before)]
    return before + (shown if len(text) <= start + len(shown) else shown[:-3] + "...")


def _read(path: Path) -> dict[str, Any] | None:
    return read_sealed(path, ADVICE[path.name], version=("version", VERSION))


@dataclass(frozen=True)
class StageState:
    """What there is of a stage: done as configured; of another configuration or other inputs; begun; nothing ("new");
    or nothing yet because an input is not there ("waits"). `why` says what differs, or which input is absent.
    """

    kind: Literal["done", "other", "begun", "new", "waits"]
    why: str = ""


class Stage:
    """A unit of work, skipped if its inputs, its configuration and its outputs are unchanged.

    `start` writes `OUT/config.json`, the identity of the stage. `finish` writes `OUT/stage.json`, the record that it is
    done, atomically. Under torchrun only rank 0 makes these calls.

    Args:
        out: directory of the stage.
        name: of the stage, such as "sft".
        config: all options that change the result, seed included; no others (paths, thread counts).
        inputs: name -> file or directory that the stage reads; compared by content, not by path.
        overwrite: replace the results of another configuration in `out`.
        extendable: dotted names of options that say how long the stage runs: with larger ones it goes on.
        quiet: do not print what a finished stage wrote.
        measured: options and inputs of what the stage measures beside its work. A finished stage that was not asked
            for it runs again; its checkpoints stay, so that a training run measures without training again.
    Attributes:
        done: whether the stage is current, set by `open_stage`.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Path],
        overwrite: bool = False,
        *,
        extendable: Sequence[str] = (),
        quiet: bool = False,
        measured: tuple[Mapping[str, Any], Mapping[str, Path]] = ({}, {}),
    ):
        self.out, self.name, self.overwrite, self.extendable = Path(out), name, overwrite, tuple(extendable)
        self.quiet = quiet
        self.config: dict[str, Any] = json.loads(json.dumps(to_plain(config)))
        self.inputs = {key: Path(path) for key, path in inputs.items()}
        self.measured = json.loads(json.dumps(to_plain(measured[0]))), dict(measured[1])
        self.done = False
        self._identity: dict[str, Any] | None = None
        self._measures: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """{"stage", "version", "config", "inputs" (name -> SHA-256)}: equal identities make equal outputs.

        Raises:
            ValueError: an input is absent.
        """
        if self._identity is None:
            hashes = self._hashes(self.inputs)
            self._identity = {"stage": self.name, "version": VERSION, "config": self.config, "inputs": hashes}
        return self._identity

    def measures(self) -> dict[str, Any]:
        """{"config", "inputs" (name -> SHA-256)} of what the stage measures; empty where it reads nothing for that.

        Raises:
            ValueError: an input is absent.
        """
        if self._measures is None:
            options, inputs = self.measured
            self._measures = {"config": options, "inputs": self._hashes(inputs)} if inputs else {}
        return self._measures

    def _hashes(self, inputs: Mapping[str, Path]) -> dict[str, str]:
        for key, path in inputs.items():
            if not path.exists():
                raise ValueError(f"{self.name}: input {key}: expected a file or directory, got none at {path}")
        with byte_bar(f"read inputs of {self.name}", sum(map(size_of, inputs.values()))) as bar:
            return {key: file_hash(path, bar.update) for key, path in inputs.items()}

    def is_current(self) -> bool:
        """Whether this identity has finished with what is to be measured, and every output is unchanged since.

        Raises:
            ValueError: stage.json is damaged.
        """
        record = _read(self.out / "stage.json")
        if record is None or not all(path.exists() for path in self.inputs.values()):
            return False
        if {key: record.get(key) for key in ("stage", "version", "config", "inputs")} != self.identity():
            return False
        if self.measures() not in ({}, record.get("measures")):
            return False
        outputs = {self.out / name: fingerprint for name, fingerprint in record["outputs"].items()}
        return all(path.exists() and file_fingerprint(path) == fingerprint for path, fingerprint in outputs.items())

    def state(self) -> StageState:
        """What there is of this stage; changes nothing.

        Raises:
            ValueError: its record is damaged.
        """
        record, begun = _read(self.out / "stage.json"), _read(self.out / "config.json")
        former = record or (begun if self._work() else None)
        absent = [path for path in self.inputs.values() if not path.exists()]
        if absent:
            differing = former is not None and _differences(former.get("config"), self.config)
            return StageState("other", "; ".join(differing)) if differing else StageState("waits", f"no {absent[0]}")
        if former is None:
            return StageState("new")
        known = {key: former.get(key) for key in ("stage", "version", "config", "inputs")}
        if known != self.identity() and not self._goes_on(known):
            plain = _differences({**known, "inputs": None}, {**self.identity(), "inputs": None})
            old, new = known["inputs"] or {}, self.identity()["inputs"]
            changed = [f"{key} has other content" for key in new if key in old and old[key] != new[key]]
            moved = [f"input {key}" for key in dict.fromkeys([*old, *new]) if (key in old) != (key in new)]
            return StageState("other", "; ".join([*plain, *changed, *moved]))
        if record is not None and self.is_current():
            return StageState("done")
        return StageState("begun", "its outputs have changed since" if record and known == self.identity() else "")

    def lock(self) -> None:
        """Keep other processes out of `out`, until `finish`, `unlock`, or the end of this object or process.

        Raises:
            ValueError: another process is in it; says which.
        """
        # An absent input is an error before anything is made.
        self.identity()
        self.measures()
        lock = RunLock.take(self.out)
        self.unlock = weakref.finalize(self, lock.release)

    def unlock(self) -> None:
        """Free `out`, where `lock` took it."""

    def result(self) -> dict:
        """The result that `finish` recorded.

        Raises:
            ValueError: the stage is not finished.
        """
        record = _read(self.out / "stage.json")
        if record is None:
            raise ValueError(f"{self.out}: expected a finished stage {self.name!r}, got no stage.json; run the stage")
        return record["result"]

    def start(self) -> None:
        """Claim `out` for this identity and lock it; files of an interrupted run with the same identity stay.

        A configuration without work beside it is replaced. A run that fails on its rows leaves such a one.

        Raises:
            ValueError: `out` holds work of another configuration and `overwrite` is off; names what differs. So does
                work of a release whose options had other names.
        """
        self.lock()
        path = self.out / "config.json"
        former = _read(path)
        differing = self._differing(path, former)
        if differing and not self.overwrite:
            raise ValueError(
                f"{self.out}: expected the configuration that is there, got another: {'; '.join(differing)}; "
                "choose another --out, or --overwrite to replace it"
            )
        if former is None and self.overwrite:
            # Of this directory alone: nothing says that its subfolders are of the same run.
            remove(self.out / "checkpoints")
            remove(self.out / "metrics.jsonl")
        elif differing:
            self._clear()
        (self.out / "stage.json").unlink(missing_ok=True)
        write_sealed(path, self.identity())

    def _differing(self, path: Path, former: Mapping[str, Any] | None) -> list[str]:
        """In what a former configuration with work beside it differs from this one.

        Raises:
            ValueError: it is no configuration of a stage, one of another version, or absent where checkpoints are.
        """
        if former is not None and "stage" not in former:
            raise ValueError(
                f"{path}: expected a stage's configuration, got another kind of file; choose another --out"
            )
        if former is None:
            if (self.out / "checkpoints").exists() and not self.overwrite:
                raise ValueError(
                    f"{path}: expected the configuration of the checkpoints beside it, got no file; restore it, choose "
                    "another --out, or --overwrite to replace them"
                )
            return []
        if not self._work():
            return []
        version = former.get("version", 1)
        if version != VERSION and not self.overwrite:
            raise ValueError(
                f"{self.out}: expected a run directory with options of version {VERSION}, got version {version}, of an "
                "earlier release; finish it with the release that wrote it, choose another --out, or --overwrite to "
                "replace it"
            )
        return [] if self._goes_on(former) else _differences(former, self.identity())

    def _goes_on(self, former: Mapping[str, Any]) -> bool:
        """Whether a configuration asks for more of a former one: it differs in `extendable` options that are larger."""
        rest = json.loads(json.dumps(former))
        for name in self.extendable:
            section, other = rest.get("config", {}), self.config
            *path, last = name.split(".")
            for key in path:
                section, other = section.get(key, {}), other.get(key, {})
            old, new = section.get(last, MISSING), other.get(last, MISSING)
            if old == new:
                continue
            # None is no limit.
            if old in (None, MISSING) or new is MISSING or (new is not None and new < old):
                return False
            section[last] = new
        return rest == self.identity()

    def _work(self) -> list[Path]:
        """Records, checkpoints and metrics of a stage in `out` and in its direct subfolders."""
        paths = [self.out / name for name in ("stage.json", "checkpoints", "metrics.jsonl")]
        paths += [*self.out.glob("*/checkpoints"), *self.out.glob("*/metrics.jsonl")]
        return [path for path in paths if path.exists()]

    def _clear(self) -> None:
        """Remove the listed outputs, the checkpoints and the metrics of the former stage, nothing else."""
        record = _read(self.out / "stage.json") or {}
        names = [
            name for name in record.get("outputs", {}) if not Path(name).is_absolute() and ".." not in Path(name).parts
        ]
        for path in [*(self.out / name for name in names), *self._work()]:
            if path.is_dir() and path.resolve() != self.out.resolve():
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()

    def finish(self, result: Mapping[str, Any], outputs: Sequence[Path] = (), note: str = "") -> None:
        """Record the stage as done, free its directory, and print one line with what it wrote.

        Args:
            result: JSON object that `result()` gives back later.
            outputs: files and directories that must exist unchanged for the stage to count as done.
            note: what else the line says, such as how many answers were rejected; rejected rows it takes from `result`.
        Raises:
            ValueError: an output is absent.
        """
        fingerprints = {}
        for path in map(Path, outputs):
            if not path.exists():
                raise ValueError(f"{self.name}: output {path}: expected a file or directory, got none")
            fingerprints[os.path.relpath(path, self.out)] = file_fingerprint(path)
        measures = {"measures": self.measures()} if self.measures() else {}
        record = {**self.identity(), **measures, "outputs": fingerprints, "result": result}
        write_sealed(self.out / "stage.json", record)
        self.unlock()
        if not self.quiet:
            rejected = result.get("rejected") or result.get("counts", {}).get("rejected")
            rows = f"{rejected} rows rejected, see {self.out / 'rejects.jsonl'}" if rejected else ""
            print(printable("; ".join(filter(None, [f"done: {', '.join(map(str, outputs)) or self.out}", note, rows]))))


def path_of(spec: str | Path) -> Path:
    """The path in the name of an agent: a directory's, or that of `scripted:FILE`."""
    return Path(str(spec).removeprefix(SCRIPTED))


def identity(cfg: Any, *, measured: bool = False) -> tuple[dict[str, Any], dict[str, Path]]:
    """Identity of a configuration: the options that change the result, and the files and directories that it reads.

    A dataclass whose texts also say what changes nothing has a method `in_identity(text) -> text` without that.

    Args:
        measured: of what the stage measures instead of what it makes.
    """
    options: dict[str, Any] = {}
    inputs: dict[str, Path] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.metadata.get("incidental") or bool(field.metadata.get("measured")) != measured:
            continue
        if dataclasses.is_dataclass(value):
            inner, more = identity(value)
            options[field.name] = inner
            inputs |= {f"{field.name}.{key}": path for key, path in more.items()}
            continue
        files = _files(value)
        for index, path in enumerate(files):
            inputs[field.name if len(files) == 1 else f"{field.name}.{index}"] = path
        rest = _without_files(value)
        rest = _texts_mapped(rest, cfg.in_identity) if hasattr(cfg, "in_identity") else rest
        if rest not in (None, [], {}) or not files:
            options[field.name] = rest
    return options, inputs


def _without_files(value: Any) -> Any:
    """An option's value without the paths in it."""
    if isinstance(value, tuple | list):
        return [item for item in value if not _files(item)]
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if not _files(item)}
    return None if _files(value) else value


def _texts_mapped(value: Any, change: Callable[[str], str]) -> Any:
    """An option's value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, tuple | list):
        return [_texts_mapped(item, change) for item in value]
    return value


def _files(value: Any) -> list[Path]:
    """Paths in an option's value: paths, lists of them, and text that names a directory, or the file of an agent."""
    if isinstance(value, Path):
        return [value]
    if isinstance(value, str) and "/" in value and Path(value).is_dir():
        return [Path(value)]
    if isinstance(value, str) and value.startswith(SCRIPTED) and path_of(value).is_file():
        return [path_of(value)]
    if isinstance(value, Mapping):
        return [path for item in value.values() for path in _files(item)]
    if isinstance(value, tuple | list):
        return [path for item in value for path in _files(item)]
    return []


def open_stage(cfg: Any, name: str, runtime: Runtime, *, extendable: Sequence[str] = ()) -> Stage:
    """The stage that a recipe's configuration describes, claimed unless it is done (`stage.done`).

    Its directory is locked until `finish_stage`, or until the stage is forgotten.

    Raises:
        ValueError: another process runs in the directory, or it holds something else; on every rank.
    """
    (options, inputs), measured = identity(cfg), identity(cfg, measured=True)
    files = {key: str(path) for key, path in (inputs | measured[1]).items()}
    check_same(runtime, f"{name}: configuration", options | measured[0] | files)
    stage = Stage(
        cfg.out,
        name,
        options,
        inputs,
        overwrite=cfg.overwrite,
        extendable=extendable,
        quiet=getattr(cfg, "quiet", False),
        measured=measured,
    )

    def claim() -> bool:
        if stage.is_current():
            return True
        stage.lock()
        # Another process may have finished it in the meantime.
        if stage.is_current():
            stage.unlock()
            return True
        stage.start()
        return False

    stage.done = from_main(runtime, claim)
    if stage.done and runtime.is_main and not stage.quiet:
        print(printable(f"done before, nothing to do: {stage.out}"))
    return stage


def finish_stage(stage: Stage, runtime: Runtime, result: dict, outputs: list[Path], note: str = "") -> dict:
    """Record the stage as done and print what it wrote (rank 0); returns its result on every rank."""
    from_main(runtime, lambda: stage.finish(result, outputs, note))
    return result

"""Runs the stages of a graph in their order: in the processes of the driver, or each by a torchrun of its own."""

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wizard_engine.evaluation.summary import Timing
from wizard_engine.runtime.cli import option_names
from wizard_engine.runtime.files import read_object
from wizard_engine.runtime.metrics import silenced
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.process import Runtime, return_free_memory
from wizard_engine.runtime.run_lock import RunLock
from wizard_engine.runtime.stage import Stage
from wizard_engine.runtime.text_lines import printable

from .commands import stage_command
from .graph import Node, Status, not_made, paths_of, statuses, with_paths
from .run_file import RunFile
from .served import clean_environment, served

REDO = "pass --redo-stale to make what has changed anew; what is there is moved to OUT/former"


class Driver:
    """Runs a graph.

    Args:
        main_of: recipe -> its main function.   stage_of: recipe -> its Stage of a configuration.
    Attributes:
        left_out: stages that had no rows, or learn from such a stage -> why.
        known: what there is of every stage, as the run goes on; on rank 0.
        began: called on rank 0 when a stage begins that is not done.
    """

    def __init__(
        self,
        run: RunFile,
        runtime: Runtime,
        nodes: Sequence[Node],
        main_of: Mapping[str, Callable[..., Any]],
        stage_of: Mapping[str, Callable[[Any], Stage]],
    ) -> None:
        self.run, self.runtime, self.nodes = run, runtime, nodes
        self.main_of, self.stage_of = main_of, stage_of
        self.timing = Timing(run.out / "timing.json", runtime)
        self.left_out: dict[str, str] = {}
        self.known: dict[str, Status] = {}
        self.began: Callable[[], object] = lambda: None
        self._instead: dict[Path, Path | None] = {}

    def statuses(self) -> dict[str, Status]:
        """What there is of every stage."""
        return statuses(self.nodes, self.stage_of)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other drivers out of the run's directory.

        Raises:
            ValueError: another process runs in it.
        """
        lock: list[RunLock] = []
        from_main(self.runtime, lambda: lock.append(RunLock.take(self.run.out)))
        try:
            yield
        finally:
            for held in lock:
                held.release()

    def run_all(self, only: Sequence[str] = (), *, redo_stale: bool = False) -> None:
        """Run every stage that is not done.

        Args:
            only: run these alone.   redo_stale: make stale stages anew; what they had made is moved to OUT/former.
        Raises:
            ValueError: stages alone without those that they read, or stale stages without `redo_stale` (nothing has
                been run then), a stage without rows, or what a stage raised.
        """
        chosen = [node for node in self.nodes if not only or node.where in only]
        unknown = [name for name in only if name not in {node.where for node in self.nodes}]
        if unknown:
            known = ", ".join(node.where for node in self.nodes)
            raise ValueError(f"only: expected stages of this run, got {unknown[0]}; it has {known}")
        with self.locked():
            if only:
                from_main(self.runtime, lambda: self._check_there(chosen))
            from_main(self.runtime, lambda: self._check_stale(chosen, redo_stale=redo_stale))
            for node in chosen:
                self._run(node, redo_stale=redo_stale)

    def _check_there(self, chosen: Sequence[Node]) -> None:
        """Refuse stages alone where stages that they read are not done; on rank 0."""
        states, names = self.statuses(), {node.where for node in chosen}
        for node in self.nodes:
            if node.where not in names and self._is_left_out(node):
                self._leave_out(node, "", quiet=True)
        nodes = [dataclasses.replace(node, config=self._config(node)) for node in self.nodes]
        there = {where for where, status in states.items() if status.state in ("done", "depends")}
        there |= names | self.left_out.keys()
        lines = []
        for node in nodes:
            if node.where in names and (missing := not_made(node, nodes, there)):
                shown = [f"{where} ({states[where].state})" for where in missing]
                lines.append(f"{node.where} reads {', '.join(shown)}")
        if lines:
            raise ValueError(
                f"only: expected stages whose inputs are there, got {'; '.join(lines)}; run these first, or name them "
                "too; nothing was started"
            )

    def _is_left_out(self, node: Node) -> bool:
        """Whether a run of all stages has left this one out: what it learns from is there, and has no rows."""
        if any(other is None and path in paths_of(node.config) for path, other in self._instead.items()):
            return True
        made = [
            path.exists() or any(self.run.out / where in path.parents for where in self.left_out)
            for path in node.learns
        ]
        is_empty = made and all(made) and not any(_has_lines(path) for path in node.learns)
        return bool(is_empty) and self.run.on_empty == "skip"

    def _config(self, node: Node) -> Any:
        """A stage's configuration with what it reads instead of stages that were left out."""
        return with_paths(node.config, {path: other for path, other in self._instead.items() if other is not None})

    def _check_stale(self, chosen: Sequence[Node], *, redo_stale: bool) -> None:
        self.known = states = self.statuses()
        stale = [(node.where, states[node.where].why) for node in chosen if states[node.where].state == "stale"]
        if stale and not redo_stale:
            lines = "; ".join(f"{where} ({why})" if why else where for where, why in stale)
            raise ValueError(
                f"{self.run.out}: expected the run that is there, got another: {lines}; nothing was changed. Put the "
                f"former options back, choose another --out, or {REDO}"
            )

    def _run(self, node: Node, *, redo_stale: bool) -> None:
        config, is_done = from_main(self.runtime, lambda: self._ready(node, redo_stale=redo_stale))
        if config is None:
            self.left_out[node.where] = from_main(self.runtime, lambda: self.left_out.get(node.where, ""))
            return
        self._say(f"== {node.where}")
        timed = self.timing.of(node.where, node.out)
        with timed, silenced(self.run.quiet), served(self.run, None if is_done else config, self.runtime):
            if is_done:
                # Neither its models are served for it, nor its processes started.
                self._say(f"done before, nothing to do: {node.out}")
            else:
                self._work(node, config)
        return_free_memory()
        self.known[node.where] = Status("done")

    def _work(self, node: Node, config: Any) -> None:
        try:
            if self.run.launch.separate_processes:
                self._start(node, config)
            elif node.is_main_only:
                from_main(self.runtime, lambda: self.main_of[node.recipe](config) and None)
            else:
                self.main_of[node.recipe](config)
        except ValueError as error:
            raise ValueError(of_stage(self.run, node, str(error))) from error

    def _say(self, line: str) -> None:
        if self.runtime.is_main and not self.run.quiet:
            print(printable(line), flush=True)

    def _ready(self, node: Node, *, redo_stale: bool) -> tuple[Any, bool]:
        """The configuration of a stage that can run, None where it is left out, and whether it is done; on rank 0."""
        gone = [path for path, other in self._instead.items() if other is None and path in paths_of(node.config)]
        if gone:
            self._leave_out(node, f"{gone[0].parent} was left out")
            return None, False
        config = without_rows_of(
            self._config(node), [other.out for other in self.nodes if other.where in self.left_out]
        )
        if node.learns and not any(_has_lines(path) for path in node.learns):
            why = "no rows in " + ", ".join(map(str, node.learns))
            made = [text for text in (why_empty(path.parent) for path in node.learns) if text]
            why += f": {'; '.join(made)}" if made else ""
            if self.run.on_empty == "end":
                raise ValueError(f'{node.where}: expected rows to learn from, got {why}; or set on-empty = "skip"')
            self._leave_out(node, why)
            return None, False
        config = with_held_out_rows(config)
        state = self.stage_of[node.recipe](config).state()
        if state.kind == "other" and not redo_stale:
            raise ValueError(f"{node.where}: expected what is there, got another: {state.why}; {REDO}")
        if state.kind == "other":
            _move_aside(node.out, self.run.out)
        is_done = state.kind == "done"
        if not is_done:
            self.known[node.where] = Status("running")
            self.began()
        return config, is_done

    def _leave_out(self, node: Node, why: str, *, quiet: bool = False) -> None:
        self.left_out[node.where] = why
        self.known[node.where] = Status("left out", why)
        for path, other in node.stands_for.items():
            self._instead[path] = other if other is None else self._instead.get(other, other)
        if not quiet:
            print(printable(f"== {node.where}: left out: {why}"), flush=True)

    def _start(self, node: Node, config: Any) -> None:
        """Run a stage by a torchrun of its own; rank 0 starts it, and its output goes through."""
        from_main(self.runtime, lambda: self._wait_for(node, config))

    def _wait_for(self, node: Node, config: Any) -> None:
        command = stage_command(self.run, node, config)
        done = subprocess.run(with_interpreter(shlex.split(command)), check=False, env=clean_environment())
        if done.returncode:
            raise ValueError(
                f"{node.where}: expected its processes to end well, got exit status {done.returncode}, for the reason "
                f"above; the same command goes on from here: {command}"
            )


def with_interpreter(words: list[str]) -> list[str]:
    """The words of a stage's command line with this process's interpreter, where they begin with a program of its."""
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*programs.get(words[0], words[:1]), *words[1:]]


def without_rows_of(config: Any, left_out: Sequence[Path]) -> Any:
    """A configuration without the row files of stages that were left out, where it has several; with their shares."""
    data = getattr(config, "data", ())
    if not isinstance(data, tuple):
        return config
    kept = [place for place, path in enumerate(data) if not any(out in path.parents for out in left_out)]
    if len(kept) == len(data):
        return config
    shares = getattr(config, "shares", ())
    changes = {"shares": tuple(shares[place] for place in kept)} if shares else {}
    return dataclasses.replace(config, data=tuple(data[place] for place in kept), **changes)


def with_held_out_rows(config: Any) -> Any:
    """A training stage's configuration with those files of held-out rows that have some."""
    given = getattr(config, "held_out", ())
    files = tuple(path for path in given if _has_lines(path)) if isinstance(given, tuple) else given
    if files == given:
        return config
    return dataclasses.replace(config, held_out=files, eval_every=config.eval_every if files else 0)


def _has_lines(path: Path) -> bool:
    """Whether a file has anything but blanks; one in another format than lines counts too."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return any(line.strip() for line in file)


def _move_aside(out: Path, run: Path) -> None:
    """Move a stage's directory to OUT/former, to a place of its own; its ledger stays, for no call is paid twice."""
    place = run / "former" / out.relative_to(run)
    number = next(n for n in range(1, 10_000) if not place.with_name(f"{place.name}.{n}").exists())
    former = place.with_name(f"{place.name}.{number}")
    former.parent.mkdir(parents=True, exist_ok=True)
    out.rename(former)
    ledgers = [path for path in former.glob("ledger.sqlite*") if path.is_file()]
    if ledgers:
        out.mkdir()
        for path in ledgers:
            path.rename(out / path.name)


REPORTS = ("report.json", "mix.json", "sampling.json")


def why_empty(out: Path) -> str:
    """What a stage's own report says of rows that it did not make."""
    report = next(filter(None, (read_object(out / name) for name in REPORTS)), {})
    said = []
    for key in ("counts", "prompts", "selected", "missing", "unreadable", "files"):
        value = report.get(key)
        if isinstance(value, dict):
            said += [f"{count} {word.replace('_', ' ')}" for word, count in value.items() if isinstance(count, int)]
        elif isinstance(value, list):
            said += [f"{line['taken']} of {line['given']} rows of {line['file']}" for line in value]
        elif isinstance(value, int):
            said.append(f"{value} {key}")
    return f"{out.name} says: {', '.join(said)}" if said else ""


def of_stage(run: RunFile, node: Node, error: str) -> str:
    """A stage's error with the stage's name, and where the options that it names stand in the run file."""
    if error.startswith(f"{node.where}:"):
        return error
    known = option_names(type(node.config))
    named = [option for option in dict.fromkeys(re.findall(r"--[a-z][\w.-]*\w", error)) if option in known]
    tables = [f"{option[2:]} of [{node.table}]" for option in named if node.table]
    rank, text = re.fullmatch(r"(\[rank \d+/\d+\] )?(.*)", error, re.DOTALL).groups(default="")
    return f"{rank}{node.where}: {text}" + (f". In {run.path or 'the run file'}: {', '.join(tables)}" if tables else "")

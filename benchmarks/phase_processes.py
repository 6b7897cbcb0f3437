"""Runs phases one after the other, each in processes of its own: shares of the time, crashes, hangs, logs."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.check_cases import DONE, LEFT_OUT, LOST, NOTE, WRONG, Visit, journal_of
from benchmarks.check_files import LINE_CHARACTERS, LOG, PHASES, append, enforce

ROOT = Path(__file__).resolve().parents[1]
# Seconds under which a phase is not started, and processes that may follow one that a case ended.
LEAST_SECONDS = 8.0
RESTARTS = 3
# Of a phase's output, in the log and on the terminal.
LOG_LINES, LOG_CHARACTERS = 2000, 2**19
STATUS = {DONE: "done", WRONG: "wrong", LEFT_OUT: "left out", LOST: "lost the device", None: "stopped"}


@dataclass(frozen=True)
class Phase:
    """A name, its weight among the phases (seconds of 510), what it does, and bytes of the GPU's memory it needs."""

    name: str
    seconds: float
    run: Callable[[Visit], int] | None
    bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a phase: done, wrong, lost the device, crashed, stopped, left out or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""


def share_of(phases: Sequence[Phase], place: int, left: float) -> float:
    """Seconds that a phase may take: its share of what is left for it and those behind it."""
    return left * phases[place].seconds / sum(phase.seconds for phase in phases[place:])


def run_phases(
    phases: Sequence[Phase],
    out: Path,
    seconds: float,
    launch: Callable[[Phase, float], Outcome],
    report: Callable[[Sequence[Outcome]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the phases in order until the time is spent.

    Behind each its outcome is on disk, `report` has run, and the folder holds nothing but the check's files.
    """
    deadline, outcomes = clock() + seconds, []
    for place, phase in enumerate(phases):
        left = deadline - clock()
        if left < LEAST_SECONDS:
            outcome = Outcome(phase.name, "skipped", 0.0, "the minutes are spent")
        else:
            print(f"== {phase.name}: {left:.0f} s left", flush=True)
            outcome = launch(phase, share_of(phases, place, left))
        said = enforce(out)
        outcome = Outcome(outcome.name, outcome.status, outcome.seconds, "; ".join(filter(None, [outcome.note, *said])))
        print(f"== {phase.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.note}", flush=True)
        outcomes.append(outcome)
        append(out / PHASES, vars(outcome))
        report(outcomes)
    enforce(out)
    return outcomes


def spawn(
    phase: Phase, out: Path, scratch: Path, seconds: float, command: Sequence[str], least: float = LEAST_SECONDS
) -> Outcome:
    """Run a phase; where a case ends its process, go on behind that case in a new one, RESTARTS times at most."""
    began, notes, code = time.monotonic(), [], None
    for attempt in range(RESTARTS + 1):
        left = seconds - (time.monotonic() - began)
        if attempt and left < least:
            break
        code, said = _run_once(phase, out, scratch, left, command)
        notes = said or notes
        case = journal_of(scratch, phase.name).open
        if code in (DONE, WRONG, LEFT_OUT, None) or case is None:
            break
        print(f"== {phase.name}: {_status(code)} in case {case}", flush=True)
    case = None if code in (DONE, WRONG, LEFT_OUT) else journal_of(scratch, phase.name).open
    said = notes[-2:] + ([f"in case {case}"] if case else [])
    return Outcome(phase.name, _status(code), round(time.monotonic() - began, 1), "; ".join(said))


def _status(code: int | None) -> str:
    return STATUS.get(code, f"crashed (exit {code})")


def _run_once(
    phase: Phase, out: Path, scratch: Path, seconds: float, command: Sequence[str]
) -> tuple[int | None, list[str]]:
    """One process, in a group of its own: its exit status, None where it had to be ended, and its notes.

    It is told 85 % of the seconds, and ended after all of them.
    """
    arguments = [*command, "--phase", phase.name, "--out", str(out), "--scratch", str(scratch)]
    process = subprocess.Popen(
        [*arguments, "--seconds", f"{0.85 * seconds:.1f}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    log = Log(out / LOG, phase.name)
    reader = threading.Thread(target=log.follow, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end_group(process)
    reader.join(timeout=5)
    return code, log.notes


def _end_group(process: subprocess.Popen) -> None:
    """End the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Log:
    """The output of a process: to the terminal and the log up to a limit, then counted; its notes are collected."""

    path: Path
    name: str
    notes: list[str] = field(default_factory=list)
    lines: int = 0
    characters: int = 0
    omitted: int = 0

    def follow(self, stream: Any) -> None:
        """Read a stream to its end."""
        with open(self.path, "a", encoding="utf-8") as file:
            # A line without an end must not fill the memory.
            while line := stream.readline(LINE_CHARACTERS):
                self._take(line.rstrip("\n"), file)
            if self.omitted:
                self._write(f"{self.omitted} further lines are left out", file)

    def _take(self, line: str, file: Any) -> None:
        if line.startswith(NOTE):
            self.notes.append(line.removeprefix(NOTE).strip())
            del self.notes[:-8]
        self.lines, self.characters = self.lines + 1, self.characters + len(line)
        if self.lines <= LOG_LINES and self.characters <= LOG_CHARACTERS:
            self._write(line, file)
        else:
            self.omitted += 1

    def _write(self, line: str, file: Any) -> None:
        print(line, flush=True)
        file.write(f"[{self.name}] {line}\n")
        file.flush()

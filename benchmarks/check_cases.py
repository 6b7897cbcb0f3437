"""A phase of the GPU check inside its process: its cases, one after the other, each on record before it begins.

A case that loses the device or ends the process costs itself alone: the next process of the phase goes on behind it.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.check_files import LINE_CHARACTERS, ROWS, append, read_lines

NOTE = "note: "
# Exit statuses of a phase's process; 1 and 2 are Python's own.
DONE, LOST, WRONG, LEFT_OUT = 0, 3, 4, 5
LOST_DEVICE = (
    "illegal memory access",
    "illegal address",
    "misaligned address",
    "launch failure",
    "launch timed out",
    "illegal instruction",
    "invalid program counter",
    "hardware stack error",
    "device-side assert",
    "ecc error",
    "uncorrectable",
    "device lost",
    "context is destroyed",
    "nccl error",
    "unhandled cuda error",
)
Row = dict[str, Any]
Case = tuple[str, Callable[[], Iterable[Row]]]


def is_lost(error: BaseException) -> bool:
    """True for an error after which no call of this process reaches the device."""
    text = str(error).lower()
    return any(sign in text for sign in LOST_DEVICE)


class Journal:
    """The cases that a phase has begun, in a file, with the seconds and the outcome of those that ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def ended(self) -> dict[str, tuple[float, bool]]:
        """Seconds of each case that ended, and whether all was right."""
        return {line["ended"]: (line["seconds"], line["right"]) for line in self._lines() if "ended" in line}

    @property
    def open(self) -> str | None:
        """The case in progress, or that the process did not survive."""
        begun = [line["began"] for line in self._lines() if "began" in line]
        return begun[-1] if begun and begun[-1] not in self.ended else None

    def _lines(self) -> list[Row]:
        return read_lines(self.path)

    def begin(self, name: str) -> None:
        """The case begins now."""
        self._write({"began": name})

    def end(self, name: str, seconds: float, right: bool) -> None:
        """The case has ended."""
        self._write({"ended": name, "seconds": seconds, "right": right})

    def _write(self, value: Row) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())


def journal_of(scratch: Path, phase: str) -> Journal:
    """The journal of a phase."""
    return Journal(scratch / f"{phase}.journal")


@dataclass
class Visit:
    """What a phase works with.

    Attributes:
        out: folder of the results.   scratch: folder of everything else, gone after the check.
        seconds: that it may take.   device: of the check.
    """

    phase: str
    out: Path
    scratch: Path
    seconds: float
    device: torch.device
    began: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        """No case begins behind it."""
        return self.began + self.seconds

    def record(self, row: Row) -> None:
        """Put a row into the results, on disk when this returns."""
        append(self.out / ROWS, {"from": self.phase} | row)

    def note(self, text: str) -> None:
        """Say something that the summary repeats."""
        print(NOTE + text, flush=True)


def run_cases(visit: Visit, cases: Sequence[Case]) -> int:
    """Run the cases that no earlier process began, in their order, until the time is spent; returns the exit status.

    A case gives its rows as it has them: each is on disk before the next is made. One with `status` wrong or error,
    unless `is_ours` is False, makes the phase wrong. Errors of a case become its row.
    """
    journal = journal_of(visit.scratch, visit.phase)
    if (lost := journal.open) is not None:
        visit.record({"case": lost, "status": "lost", "note": "the process or the device did not survive this case"})
        journal.end(lost, 0.0, False)
    for name, run in cases:
        if name in journal.ended:
            continue
        if time.monotonic() > visit.deadline:
            break
        began = time.monotonic()
        journal.begin(name)
        right = _rows_of(visit, name, run)
        journal.end(name, round(time.monotonic() - began, 3), right)
    visit.note(progress(journal, [name for name, _ in cases]))
    return DONE if all(right for _, right in journal.ended.values()) else WRONG


def _rows_of(visit: Visit, name: str, run: Callable[[], Iterable[Row]]) -> bool:
    """Record what a case gives; True if all of it is right."""
    # Here, for it needs Triton, whose absence the command says itself.
    from benchmarks.kernel_peers import FAILURES

    right = True
    try:
        for row in run():
            visit.record({"case": name} | row)
            right &= row.get("status") not in ("wrong", "error") or not row.get("is_ours", True)
    except FAILURES as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LINE_CHARACTERS]
        print(f"{name}: {text}", flush=True)
        if is_lost(error):
            raise SystemExit(LOST) from error
        visit.record({"case": name, "status": "error", "note": text})
        right = False
    return right


def progress(journal: Journal, names: Sequence[str]) -> str:
    """`18 of 151 cases, 0 not right, all need about 240 s`; what is not done is named where it is little."""
    ended = {name: journal.ended[name] for name in names if name in journal.ended}
    wrong = [name for name, (_, right) in ended.items() if not right]
    text = f"{len(ended)} of {len(names)} cases" + (
        f", {len(wrong)} not right: {', '.join(wrong[:3])}" if wrong else ""
    )
    if ended and len(ended) < len(names):
        whole = sum(seconds for seconds, _ in ended.values()) / len(ended) * len(names)
        first = next(name for name in names if name not in ended)
        text += f", all need about {whole:.0f} s, next would be {first}"
    return text[:LINE_CHARACTERS]

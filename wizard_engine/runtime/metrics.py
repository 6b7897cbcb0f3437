"""Metrics of a run: a JSON line per step, and progress bars."""

import json
import math
import numbers
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from .files import naming, write_bytes
from .text_lines import printable

BAR_METRICS = ("loss", "tokens_per_second", "mfu")
# Of a bar without a terminal, between its lines: seconds at first, then a share of its time, and seconds at most.
LINE_SECONDS, LINE_SHARE, MOST_LINE_SECONDS = 5.0, 0.1, 60.0
LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
# Before a bar of bytes appears: small files are done by then.
DELAY_SECONDS = 2.0
# Between two drawings of a bar for the phases of a step.
DRAWN_SECONDS = 0.5
_is_silent: ContextVar[bool] = ContextVar("is_silent", default=False)


@contextmanager
def silenced(quiet: bool) -> Iterator[None]:
    """Within it no bar and no line is shown where `quiet` is set: also of code that has no such option itself."""
    token = _is_silent.set(quiet or _is_silent.get())
    try:
        yield
    finally:
        _is_silent.reset(token)


class Progress(tqdm):
    """A bar on stderr of rank 0; where stderr is no terminal, a line now and then, also during one long item.

    Args:
        quiet: neither; so it is within `silenced`.   leave: what it showed last stays, as bar or as line.
        options: of tqdm.
    """

    has_lines = False

    def __init__(
        self, items: Iterable | None = None, *, desc: str, quiet: bool = False, leave: bool = False, **options: Any
    ) -> None:
        is_other_rank = dist.is_initialized() and dist.get_rank() != 0
        is_silent = quiet or _is_silent.get() or is_other_rank
        self._ended = threading.Event()
        # With disable=None tqdm itself asks whether stderr is a terminal.
        super().__init__(
            items,
            desc=printable(desc),
            disable=True if is_silent else None,
            leave=leave,
            dynamic_ncols=True,
            **options,
        )
        self.has_lines = self.disable and not is_silent
        if self.has_lines:
            self.postfix = None
            shown = {"prefix": printable(desc), "bar_format": LINE_FORMAT, "initial": self.n}
            self._shown = shown | {name: x for name, x in options.items() if name.startswith("unit")}
            self._start = time.monotonic()
            threading.Thread(target=_lines, args=(weakref.ref(self), self._ended), daemon=True).start()

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar or lines."""
        return self.has_lines or not self.disable

    def __iter__(self) -> Iterator:
        """The items, which are counted."""
        if not self.has_lines:
            yield from super().__iter__()
            return
        try:
            for item in self.iterable:
                yield item
                self.n += 1
        finally:
            self.close()

    def update(self, n: float = 1) -> bool | None:
        """Count what is done."""
        if not self.has_lines:
            return super().update(n)
        self.n += n
        return None

    def close(self) -> None:
        """End the bar or its lines."""
        if self.has_lines and self.leave and not self._ended.is_set():
            tqdm.write(self.line(), file=sys.stderr)
        self._ended.set()
        super().close()

    @property
    def seconds(self) -> float:
        """Since a bar with lines was made."""
        return time.monotonic() - self._start

    def line(self) -> str:
        """What a line says: `sft: 40/110 step [00:20<00:35, loss=1.25]`."""
        return tqdm.format_meter(self.n, self.total, self.seconds, postfix=self.postfix, **self._shown)


def _lines(bar: "weakref.ref[Progress]", ended: threading.Event) -> None:
    """Print a bar's line now and then, the less often the longer it lasts, until it is closed or forgotten."""
    pause = LINE_SECONDS
    while not ended.wait(pause):
        current = bar()
        if current is None:
            return
        tqdm.write(current.line(), file=sys.stderr)
        pause = min(max(LINE_SECONDS, LINE_SHARE * current.seconds), MOST_LINE_SECONDS)
        del current


def progress(
    items: Iterable | None = None, *, desc: str, unit: str, total: int | None = None, quiet: bool = False
) -> Progress:
    """A bar or lines on stderr, see `Progress`, over `items` or for `update` calls."""
    return Progress(items, desc=desc, unit=unit, total=total, quiet=quiet)


def byte_bar(description: str, total: int) -> Progress:
    """A bar of bytes, or lines; a context manager, moved by `update(bytes)`."""
    return Progress(desc=description, total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=DELAY_SECONDS)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a metrics file, in order; a last line that a kill has cut off is skipped."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsLogger:
    """Appends a JSON line per step to a file and moves a bar, see `Progress`.

    On resume, lines of steps after `resume_step` (they will be run again) and a line cut by a kill are dropped. Under
    torchrun only rank 0 writes.

    Args:
        path: the file; its directory is made.
        total_steps: steps of the whole run.
        desc: the bar's label.
        quiet: no bar; the file is written all the same.
        resume_step: steps done before; 0 begins a new file.
        shown: metrics on the bar.
    Raises:
        ValueError: a line of the existing file, other than a cut last one, is no JSON object with a `step`.
    """

    def __init__(
        self,
        path: Path | str,
        total_steps: int,
        desc: str,
        quiet: bool = False,
        *,
        resume_step: int = 0,
        shown: Sequence[str] = BAR_METRICS,
    ) -> None:
        self._shown, self._postfix, self._drawn = tuple(shown), dict[str, str](), 0.0
        self._file = self._bar = None
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        self.path = Path(path)
        write_bytes(self.path, _lines_until(self.path, resume_step))
        # Unbuffered: a line that a full disk refuses is not tried again by close().
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._bar = Progress(total=total_steps, initial=resume_step, desc=desc, unit="step", quiet=quiet, leave=True)

    def log(self, *, step: int, **values: float | list[float]) -> None:
        """Write one step: numbers in full precision, not-a-number and infinity as null.

        Raises:
            TypeError: a value that is not a number.
            OSError: the line cannot be written; names the file.
        """
        line = json.dumps({name: _number(name, value) for name, value in {"step": step, **values}.items()})
        if self._file is None or self._bar is None:
            return
        data = (line + "\n").encode("utf-8")
        with naming(self.path, "the same command goes on from the last checkpoint"):
            while data:
                data = data[self._file.write(data) :]
        self.show(values)
        self._bar.update(step - self._bar.n)

    def show(self, values: Mapping[str, Any]) -> None:
        """Put the values of shown metrics on the bar; those of other steps stay."""
        if self._bar is None:
            return
        now = {name: f"{values[name]:.4g}" for name in self._shown if name in values}
        self._postfix = {name: text for name in self._shown if (text := (self._postfix | now).get(name))}
        self._bar.set_postfix(self._postfix, refresh=False)

    def show_phase(self, name: str) -> None:
        """Say behind the values on the bar what a step is at, until the next values; drawn twice a second at most."""
        if self._bar is None:
            return
        is_due = time.monotonic() - self._drawn > DRAWN_SECONDS
        self._drawn = time.monotonic() if is_due else self._drawn
        self._bar.set_postfix(self._postfix | {"now": name}, refresh=is_due)

    @staticmethod
    def warn(text: str) -> None:
        """Print a line on stderr, above the bar; controls in it are escaped."""
        tqdm.write(printable(text, keep="\n"), file=sys.stderr)

    def close(self) -> None:
        """Close the file and the bar; a second call does nothing."""
        if self._file is not None and self._bar is not None:
            self._file.close()
            self._bar.close()
        self._file = self._bar = None


def _number(name: str, value: Any) -> Any:
    """The value as a JSON number, or a list of them (one per layer, for example)."""
    if isinstance(value, list):
        return [_number(name, item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"metric {name}: expected a number, got {type(value).__name__}")
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _lines_until(path: Path, step: int) -> bytes:
    """The complete lines of steps 1 to `step`."""
    if step < 1 or not path.exists():
        return b""
    kept = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line_step = json.loads(line)["step"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: expected a JSON object with `step`; remove the line") from None
        if line_step <= step:
            kept.append(line + b"\n")
    return b"".join(kept)

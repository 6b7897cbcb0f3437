"""Held-out measures of a training run: before its first step, every so many steps, and at its end.

Measuring trains nothing and changes nothing that training reads. A measurement has a value for each row; means over
rows have standard errors, and differences between the first and the last measurement are paired over the rows.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from wizard_engine.data.chat import Sample
from wizard_engine.data.samples import check_rows
from wizard_engine.parallel import Mesh
from wizard_engine.runtime.files import read_sealed, write_json_lines, write_sealed
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.process import Runtime, post_position
from wizard_engine.runtime.ranges import Checked, NonNegative
from wizard_engine.runtime.stage import INCIDENTAL, MEASURED, Stage
from wizard_engine.runtime.text_lines import printable

FILE, FIRST = "held_out.jsonl", "held_out_before.json"
# Of the file of the first measurement.
VERSION = 1
Columns = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions(Checked):
    """What a training recipe is measured on."""

    held_out: tuple[Path, ...] = field(default=(), metadata=MEASURED)
    """Rows to measure on before the first step and after the last, in the formats of --data. They are not trained on.
    A finished run measures them without training again."""
    eval_every: NonNegative[int] = field(default=0, metadata=INCIDENTAL)
    """Steps between further measurements on the rows of --held-out; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_every and not self.held_out:
            raise ValueError(
                f"eval_every: expected 0 without rows to measure on, got {self.eval_every}; name some with --held-out"
            )


@dataclass(frozen=True)
class Measure:
    """A value of every row, and how they are put together.

    values: (N,) fp64.   weights: (N,): the mean is a ratio, sum(values) / sum(weights), such as nats per token.
    classes: (N,) bool: the values are placements among the rows of the other class, whose mean is an area under the
    curve.
    """

    values: np.ndarray
    weights: np.ndarray | None = None
    classes: np.ndarray | None = None

    def __sub__(self, other: "Measure") -> "Measure":
        """The difference, paired over the rows."""
        return Measure(self.values - other.values, self.weights, self.classes)

    def estimate(self) -> list[float | None]:
        """[mean, standard error]; None for what the rows do not say.

        Ratio: R = sum v / sum w, error^2 = n / (n - 1) sum (v - R w)^2 / (sum w)^2, which for equal weights is that of
        a mean. Area under the curve: the sum over both classes of the variance of the placements' mean.

        Source: Cochran 1977, Sampling Techniques, eq. 6.13 (ratio); DeLong et al. 1988, Biometrics 44:837 (area).
        """
        if self.classes is not None:
            sides = [self.values[self.classes == side] for side in (False, True)]
            mean = float(sides[1].mean()) if min(map(len, sides)) else math.nan
            variance = sum(float(side.var(ddof=1)) / len(side) if len(side) > 1 else math.nan for side in sides)
            return _finite(mean, math.sqrt(variance))
        weights = np.ones(len(self.values)) if self.weights is None else self.weights
        total, count = float(weights.sum()), len(self.values)
        if total <= 0:
            return [None, None]
        mean = float(self.values.sum()) / total
        squares = float(np.square(self.values - mean * weights).sum())
        return _finite(mean, math.sqrt(squares * count / (count - 1)) / total if count > 1 else math.nan)

    def by_row(self) -> np.ndarray:
        """(N,) what a row alone has: its value over its weight."""
        return self.values if self.weights is None else self.values / np.maximum(self.weights, 1e-12)


def placements(scores: np.ndarray, classes: np.ndarray) -> Measure:
    """The area under the curve: how often a row of class True has a higher score than one of class False; ties half."""
    values = np.full(len(scores), math.nan)
    if classes.any() and not classes.all():
        for side in (False, True):
            others = np.sort(scores[classes != side])
            own = scores[classes == side]
            below, upto = (np.searchsorted(others, own, side=end) for end in ("left", "right"))
            share = (below + upto) / (2 * len(others))
            values[classes == side] = share if side else 1.0 - share
    return Measure(values, classes=classes)


def _finite(*values: float) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


class Rows(Protocol):
    """Held-out rows of one kind: how they are scored, and what the scores say."""

    units: Mapping[str, str]
    """Name of each measure -> its unit, in the order of the report."""

    def samples(self) -> Iterable[Sample]:
        """All that the model reads."""

    def sizes(self) -> Mapping[str, np.ndarray]:
        """What the file of rows says of each of them beside its values, such as its tokens."""

    def score(self, model: Any, mesh: Mesh, desc: str) -> Columns:
        """(N,) fp64 columns in row order, the same on every rank; every rank makes the call."""

    def measures(self, now: Columns, first: Columns) -> dict[str, Measure]:
        """The measures by name, of the scores of now and those before the first step."""


class HeldOut:
    """Held-out rows of a run, made before the run: the first measurement is of the model that it starts from.

    The first measurement is kept in OUT/held_out_before.json. A run that goes on reads it there; where it cannot, the
    model is still the one that the run starts from, not that of its checkpoint.

    Args:
        stage: of the run.   rows: the same on every rank.   rejected: rows that could not be used.
        every: steps between measurements; 0: none but the first and the last.
    Attributes:
        steps_before: steps of earlier runs of the stage. Steps are counted over all of them.
    """

    def __init__(
        self,
        stage: Stage,
        runtime: Runtime,
        mesh: Mesh,
        model: Any,
        rows: Rows,
        *,
        rejected: int,
        every: int,
        quiet: bool,
    ) -> None:
        self.stage, self.runtime, self.mesh, self.model, self.rows = stage, runtime, mesh, model, rows
        self.rejected, self.every, self.quiet = rejected, every, quiet
        self.steps_before, self._measured = 0, -1
        key = self._key() if runtime.is_main else ""
        stored = from_main(runtime, lambda: self._stored(key))
        if stored is None:
            self.first = self._score()
            from_main(runtime, lambda: self._store(key))
        else:
            self.first = {name: np.asarray(values, dtype=np.float64) for name, values in stored.items()}
        self.now = self.first

    @property
    def names(self) -> tuple[str, ...]:
        """The measures as `values` names them."""
        return tuple(f"held_out_{name}" for name in self.rows.units)

    def values(self) -> dict[str, float]:
        """`held_out_NAME` -> mean in the newest measurement; not a number where the rows do not say."""
        estimates = self._estimates(self.rows.measures(self.now, self.first))
        return {f"held_out_{name}": math.nan if mean is None else mean for name, (mean, _) in estimates.items()}

    def after_step(self, step: int, *, is_last: bool) -> dict[str, float]:
        """`values` after a step of the current run where a measurement is due, which every rank makes; else {}."""
        done = self.steps_before + step
        if not is_last and (self.every == 0 or done % self.every):
            return {}
        self._measure(done)
        return self.values()

    def finish(self, steps: int) -> dict[str, Any]:
        """The result for the stage's record, after all runs: OUT/held_out.jsonl is written, and a line is printed.

        Args:
            steps: of all runs.
        Returns:
            {"held_out": {"rows", "rejected", "before", "after", "difference"}}, the last three name -> [mean, standard
            error], with differences paired over the rows.
        """
        if self._measured != steps:
            self._measure(steps)
        before, after = (self.rows.measures(columns, self.first) for columns in (self.first, self.now))
        result = {
            "rows": len(next(iter(self.first.values()))),
            "rejected": self.rejected,
            "before": self._estimates(before),
            "after": self._estimates(after),
            "difference": self._estimates({name: after[name] - before[name] for name in after}),
        }
        from_main(self.runtime, lambda: write_json_lines(self.file, self._lines(before, after)))
        if self.runtime.is_main and not self.quiet:
            print(printable("\n".join(report(result, self.rows.units)), keep="\n"))
        return {"held_out": result}

    @property
    def file(self) -> Path:
        """The rows' values in the first and the last measurement, an object a line."""
        return self.stage.out / FILE

    def _measure(self, steps: int) -> None:
        self.now, self._measured = self._score(), steps

    def _score(self) -> Columns:
        post_position("held-out rows")
        return self.rows.score(self.model, self.mesh, "" if self.quiet else "held-out")

    def _estimates(self, measures: Mapping[str, Measure]) -> dict[str, list[float | None]]:
        return {name: measures[name].estimate() for name in self.rows.units}

    def _lines(self, before: Mapping[str, Measure], after: Mapping[str, Measure]) -> Iterable[dict[str, Any]]:
        """A line of each row."""
        sizes = {name: values.tolist() for name, values in self.rows.sizes().items()}
        columns = [{name: m.by_row().tolist() for name, m in measures.items()} for measures in (before, after)]
        for index in range(len(next(iter(self.first.values())))):
            first, last = ({name: _finite(c[index])[0] for name, c in side.items()} for side in columns)
            yield {"index": index, "before": first, "after": last} | {name: x[index] for name, x in sizes.items()}

    def _key(self) -> str:
        """Hash of what the first measurement depends on."""
        digest = hashlib.sha256(repr(self.stage.identity()).encode())
        for sample in self.rows.samples():
            digest.update(sample.tokens.tobytes())
            digest.update(sample.weights.tobytes())
        for values in self.rows.sizes().values():
            digest.update(values.tobytes())
        return digest.hexdigest()

    def _stored(self, key: str) -> dict[str, list[float]] | None:
        path = self.stage.out / FIRST
        stored = read_sealed(path, "remove it, and the rows are measured again", version=("version", VERSION))
        return stored["columns"] if stored is not None and stored.get("key") == key else None

    def _store(self, key: str) -> None:
        columns = {name: values.tolist() for name, values in self.first.items()}
        write_sealed(self.stage.out / FIRST, {"version": VERSION, "key": key, "columns": columns}, indent=None)


def open_held_out(
    cfg: Any, stage: Stage, runtime: Runtime, mesh: Mesh, model: Any, read: Callable[[], tuple[Rows, int]]
) -> HeldOut | None:
    """The held-out rows of a recipe's configuration, measured for the first time; None where it names none.

    Args:
        cfg: HeldOutOptions, with `quiet`.   model: that the run starts from, before the run resumes.
        read: gives the rows, and how many could not be used.
    """
    if not cfg.held_out:
        return None
    rows, rejected = read()
    check_rows(runtime, f"{stage.name}: held out", rows.samples())
    return HeldOut(stage, runtime, mesh, model, rows, rejected=rejected, every=cfg.eval_every, quiet=cfg.quiet)


def finish_held_out(held_out: HeldOut | None, steps: int) -> tuple[dict[str, Any], list[Path]]:
    """`finish` and the files that it wrote; nothing where there are no held-out rows."""
    return ({}, []) if held_out is None else (held_out.finish(steps), [held_out.file])


def report(result: Mapping[str, Any], units: Mapping[str, str]) -> list[str]:
    """`held-out: loss 1.654 -> 1.239 nats a token (-0.415 +- 0.029, 200 rows)`, a line of each measure."""
    lines = []
    for name, unit in units.items():
        before, after = result["before"][name][0], result["after"][name][0]
        if before is None or after is None:
            lines.append(f"held-out: {name} not defined on these {result['rows']} rows")
            continue
        mean, error = result["difference"][name]
        spread = "" if error is None else f" +- {error:.3f}"
        what = f"{before:.3f} -> {after:.3f}" + (f" {unit}" if unit else "")
        lines.append(f"held-out: {name} {what} ({mean:+.3f}{spread}, {result['rows']} rows)")
    return lines

"""Answers to held-out prompts before, during and after reinforcement learning: what training bought.

Every row gets one answer at the rollouts' temperature. Its random numbers depend on the row alone, so that two
measurements of a row are a pair, and neither changes the training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.parallel.mesh import Axis
from wizard_engine.runtime.files import content_hash, read_sealed, write_json_lines, write_sealed
from wizard_engine.runtime.object_collectives import from_main, gather_objects
from wizard_engine.runtime.process import Runtime
from wizard_engine.runtime.stage import Stage

from .options import RewardOptions, RolloutOptions
from .rewards import AnswerReward, Reference
from .sampler import Sampler
from .trajectories import Rollout, roll_out

Line = dict[str, Any]
# Of a row's line; a row has those that its reward models and its reference give.
MEASURES = ("reward", "instruction_factor", "process_factor", "preference_factor", "checked", "length", "finished")
FILE, FIRST = "held_out.jsonl", "held_out_before.json"
# Of the file of the first measurement.
VERSION = 1
AGAIN = "remove it, and the rows are measured again"


@dataclass(frozen=True)
class PromptRows:
    """Rows that answers are sampled to.

    where: `path:line` of each.   prompts: the turns up to the last question.   references: the row's own answer, None
    where no number can be read in it, or where none is needed.   own: the row's own answer, which a preference model
    compares with; none where there is no such model.
    """

    where: list[str] = field(default_factory=list)
    prompts: list[tuple[Message, ...]] = field(default_factory=list)
    references: list[Reference | None] = field(default_factory=list)
    own: list[str] = field(default_factory=list)


class HeldOut:
    """Measurements of a policy on held-out rows; without rows nothing is measured. Every rank makes the calls.

    Args:
        rows: to measure on.   out: run directory.   sampler, tokenizer: of the policy.
        score: rewards of a rollout, given the references of its prompts, and the rows' own answers where a preference
        model needs them.   reward: its factors, and the penalty.
        has_process: whether a process model scores.   options: of the rollouts.   seed: of the answers.
        every: rollouts between measurements; 0: none in between.   measures_last: the weights after the last rollout
        are those that are written.   quiet: no progress bar.
    """

    def __init__(
        self,
        rows: PromptRows,
        out: Path,
        *,
        sampler: Sampler,
        tokenizer: Tokenizer,
        score: Callable[[Rollout, Sequence[Reference | None], Sequence[str]], list[AnswerReward]],
        reward: RewardOptions,
        has_process: bool,
        options: RolloutOptions,
        data: Axis,
        seed: int,
        every: int,
        measures_last: bool,
        quiet: bool = True,
    ) -> None:
        self.rows, self.out, self.sampler, self.tokenizer = rows, Path(out), sampler, tokenizer
        self.desc = "" if quiet else "held-out answers"
        self.score, self.reward, self.has_process = score, reward, has_process
        self.options, self.data, self.seed, self.every = options, data, seed, every
        self.measures_last = measures_last
        self.first: list[Line] = []
        self.last: list[Line] | None = None

    def measure(self) -> list[Line]:
        """A line for each row, in their order, from the current weights."""
        mine = range(self.data.index, len(self.rows.where), self.data.size)
        references = [self.rows.references[i] for i in mine]
        own = [self.rows.own[i] for i in mine] if self.rows.own else []
        self.sampler.sync_weights()
        rollout = roll_out(
            self.sampler,
            self.tokenizer,
            [self.rows.prompts[i] for i in mine],
            samples=1,
            temperature=self.options.temperature,
            max_new_tokens=self.options.max_new_tokens,
            seed=self.seed,
            first=self.data.index,
            stride=self.data.size,
            desc=self.desc,
        )
        self.sampler.release()
        answers = zip(self.score(rollout, references, own), rollout.texts, rollout.lengths)
        lines = [
            line_of(reward, self.reward, answer=text, length=length, has_process=self.has_process)
            for reward, text, length in answers
        ]
        return gathered_lines(lines, self.data, len(self.rows.where))

    @property
    def file(self) -> Path:
        """The rows' answers and numbers in the first and the last measurement, an object a line."""
        return self.out / FILE

    def before(self, stage: Stage, rt: Runtime) -> None:
        """Measure the model that the run starts from, before the run goes on from a checkpoint.

        The measurement is kept in OUT/held_out_before.json. A run that goes on reads it there.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.rows.where:
            return
        path = self.out / FIRST
        key = from_main(rt, lambda: content_hash([stage.identity(), stage.measures()]))
        stored = from_main(rt, lambda: read_sealed(path, AGAIN, version=("version", VERSION)))
        if stored is not None and stored.get("key") == key:
            self.first = stored["lines"]
            return
        self.first = self.measure()
        content = {"version": VERSION, "key": key, "lines": self.first}
        from_main(rt, lambda: write_sealed(path, content, indent=None))

    def is_due(self, finished: int) -> bool:
        """Whether to measure after so many rollouts."""
        if not self.rows.where:
            return False
        if finished == self.options.steps:
            return self.measures_last
        return bool(self.every) and finished % self.every == 0

    def metrics(self, finished: int) -> dict[str, float]:
        """Means after so many rollouts, for the log."""
        lines = self.measure()
        if finished == self.options.steps:
            self.last = lines
        return {f"held_out_{name}": mean for name, (mean, _) in means(lines).items()}

    def after(self, rt: Runtime) -> dict[str, Any]:
        """Measure the weights that are written, and write every row's line; returns the comparison."""
        last = self.measure() if self.last is None else self.last
        from_main(rt, lambda: write_lines(self.file, self.rows, before=self.first, after=last))
        return comparison(self.first, last)


def line_of(
    reward: AnswerReward, options: RewardOptions, *, answer: str, length: int, has_process: bool = True
) -> Line:
    """What is measured of one answer; `has_process`: by a process model too."""
    final = reward.final(options.factors, options.no_eos_penalty)
    line: Line = {"reward": final, "length": length, "finished": float(reward.finished)}
    if reward.instruction is not None:
        line["instruction_factor"] = reward.instruction
    if has_process:
        line["process_factor"] = reward.process
    if reward.preferred is not None:
        line["preference_factor"] = reward.preference
    if reward.is_right is not None:
        line["checked"] = reward.checked
    return line | {"answer": answer}


def gathered_lines(local: Sequence[Line], data: Axis, count: int) -> list[Line]:
    """The lines of all rows in their order, on every rank, from those of rows index, index + size, ... of each."""
    lines: list[Line] = [{}] * count
    for index, of_rank in gather_objects((data.index, list(local))):
        lines[index :: data.size] = of_rank
    return lines


def means(lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """Name -> mean and standard error over the rows that have the measure."""
    columns = {name: [float(line[name]) for line in lines if name in line] for name in MEASURES}
    return {name: mean_and_error(values) for name, values in columns.items() if values}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error s / sqrt(n), which is 0 for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1) / count)


def comparison(before: Sequence[Line], after: Sequence[Line]) -> dict[str, Any]:
    """What stage.json records: means before and after, and means of the rows' differences, with standard errors."""
    differences = [
        {name: b[name] - a[name] for name in MEASURES if name in a and name in b} for a, b in zip(before, after)
    ]
    three = {"before": means(before), "after": means(after), "difference": means(differences)}
    return {"rows": len(before)} | {
        name: {measure: list(numbers) for measure, numbers in of.items()} for name, of in three.items()
    }


def shown(result: Mapping[str, Any]) -> str:
    """The line that ends a run: `held-out: reward 0.31 -> 0.42 (+0.11 +- 0.02, 100 rows)`."""
    parts = []
    for name in ("reward", "checked", "finished"):
        if name in result["difference"]:
            before, after = (result[when][name][0] for when in ("before", "after"))
            change, error = result["difference"][name]
            parts.append(f"{name} {before:.3g} -> {after:.3g} ({change:+.2g} +- {error:.2g})")
    parts[0] = f"{parts[0][:-1]}, {result['rows']} rows)"
    return f"held-out: {', '.join(parts)}"


def write_lines(path: Path, rows: PromptRows, **measured: Sequence[Line]) -> None:
    """Write a line for each row: where it stands, and each measurement of it."""
    names = list(measured)
    write_json_lines(path, ({"row": w} | dict(zip(names, of)) for w, *of in zip(rows.where, *measured.values())))

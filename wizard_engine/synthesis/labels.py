"""Training rows for the two reward models: answers with a label per step, and instructions ranked by quality.

Source: WizardMath (Luo et al. 2023, arXiv:2308.09583): a model labels each step of the student's own solutions 1, 0 or
-1, and ranks evolutions of one instruction.
"""

import asyncio
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from wizard_engine.agents import prompts
from wizard_engine.agents.calls import AnyAgent, Calls, Limits, OnLength, derive_seed
from wizard_engine.agents.replies import read_labels, read_ranking
from wizard_engine.agents.scheduler import Scheduler
from wizard_engine.data.records import Conversation, Preference, Process
from wizard_engine.data.solution_steps import step_texts
from wizard_engine.runtime.spill import Spill

from .pairs import instruction_attributes, row_spill


def label_processes(
    rows: Sequence[Conversation],
    *,
    student: AnyAgent,
    labeller: AnyAgent,
    samples: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    limits: Limits | None = None,
    on_length: OnLength = "drop",
    top_p: float = 1.0,
    statistics: dict[str, Any] | None = None,
    scheduler: Scheduler | None = None,
    folder: Path | None = None,
) -> Spill[Process]:
    """The student's answers with a label for each step, in the order of the rows.

    A labeller sees one instruction and no history, so multi-turn rows are skipped and counted.

    Args:
        rows: their user turns are answered.
        student: task "answer", `samples` times at `temperature`; equal answers to a row count once.
        labeller: task "label".
        limits: longest replies.   on_length: "drop" or "keep" answers that were cut.   top_p: of all calls (see Calls).
        statistics: filled with "answers", "kept", "dropped" (reasons), "labels" (label -> steps), "calls".
        scheduler: of the calls; None for one without a ledger.   folder: of temporary files (see runtime.spill).
    Returns:
        one row an answer; answers with unreadable labels are skipped and counted.
    Raises:
        ValueError: fewer than 1 sample.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}; give the answers wanted a row")
    calls = Calls(scheduler, limits=limits, on_length=on_length, top_p=top_p)
    desk = _Desk(calls, student, labeller, samples, temperature, seed)
    return calls.scheduler.run(_labelled(desk, rows, statistics, folder))


async def _labelled(
    desk: "_Desk", rows: Sequence[Conversation], statistics: dict[str, Any] | None, folder: Path | None
) -> Spill[Process]:
    labelled: Spill[list] = Spill(folder)
    agents = [desk.student, desk.labeller]
    await desk.calls.scheduler.rows(
        rows,
        desk.labelled,
        labelled.put,
        desc="labels",
        total=len(rows),
        width=desk.samples,
        calls=2 * desk.samples,
        agents=agents,
    )
    processes, labels = row_spill(folder), Counter()
    for place, row in enumerate(rows):
        for answer, marks in labelled[place]:
            lineage = {"parents": [row.id], "operator": "label_processes", "agent": desk.labeller.name}
            policy = {"policy": desk.student.fingerprint, "answer": answer}
            attributes = instruction_attributes(row) | policy | desk.calls.marks(answer)
            steps = tuple(step_texts(answer))
            processes.append(Process(tuple(row.messages[:-1]), steps, tuple(marks), attributes, lineage))
            labels.update(map(str, marks))
    if statistics is not None:
        dropped = dict(sorted(desk.dropped.items()))
        statistics |= {"answers": desk.num_answers, "kept": len(processes), "dropped": dropped}
        statistics |= {"labels": dict(sorted(labels.items())), "calls": desk.calls.statistics()}
    return processes


@dataclass
class _Desk:
    """The agents, settings and counts of one call of label_processes."""

    calls: Calls
    student: AnyAgent
    labeller: AnyAgent
    samples: int
    temperature: float
    seed: int
    num_answers: int = 0
    dropped: Counter[str] = field(default_factory=lambda: Counter({"several turns": 0, "no answer": 0, "repeated": 0}))

    async def labelled(self, row: Conversation) -> list[tuple[str, tuple[int, ...]]]:
        """The distinct answers to a row with readable labels."""
        if sum(message.role == "user" for message in row.messages) != 1:
            self.dropped["several turns"] += 1
            return []
        answers = await self._answers(row)
        self.num_answers += len(answers)
        labels = await asyncio.gather(*(self._labels(row, answer) for answer in answers))
        unreadable = labels.count(None)
        if unreadable:
            self.dropped["labels unreadable"] += unreadable
        return [(answer, marks) for answer, marks in zip(answers, labels) if marks is not None]

    async def _answers(self, row: Conversation) -> list[str]:
        """The distinct answers."""
        seeds = [derive_seed(self.seed, "sample", number) for number in range(self.samples)]
        prompt, settings = row.messages[:-1], {"temperature": self.temperature, "row": row.id}
        texts = await asyncio.gather(*(self.calls.converse(self.student, prompt, seed, **settings) for seed in seeds))
        given = [text for text in texts if text is not None]
        distinct = list(dict.fromkeys(given))
        self.dropped["no answer"] += len(texts) - len(given)
        self.dropped["repeated"] += len(given) - len(distinct)
        return distinct

    async def _labels(self, row: Conversation, answer: str) -> tuple[int, ...] | None:
        steps = step_texts(answer)
        fields = {"instruction": row.instruction, "answer_steps": _lines(steps)}
        fields |= {"reference": prompts.reference_of(row.attributes)}
        seed = derive_seed(self.seed, "label")
        return await self.calls.ask(
            self.labeller, "label", fields, seed, read=lambda text: read_labels(text, len(steps)), row=row.id
        )


def _lines(steps: Sequence[str]) -> str:
    return "\n".join(prompts.flatten(step) for step in steps)


def rank_instructions(
    groups: Sequence[Sequence[str]],
    *,
    ranker: AnyAgent,
    min_gap: float = 0.5,
    margin_scale: float = 0.1,
    seed: int = 0,
    limits: Limits | None = None,
    top_p: float = 1.0,
    statistics: dict[str, Any] | None = None,
    scheduler: Scheduler | None = None,
    folder: Path | None = None,
) -> Spill[Preference]:
    """Pairs of instructions for the instruction reward model: an empty prompt, the better text chosen.

    Every pair of a group whose quality scores (0 to 10) differ by more than `min_gap` is a row;
    attributes["margin"] = margin_scale * difference is the margin of the ranking loss.

    Args:
        groups: texts to compare with each other, best 4 to 8 in a group (see instruction_groups); groups with fewer
            than two distinct texts give nothing.
        ranker: task "rank".   limits: longest replies.   top_p: of all calls (see Calls).
        statistics: filled with "groups", "kept", "dropped" (reasons), "calls".
        scheduler: of the calls; None for one without a ledger.   folder: of temporary files (see runtime.spill).
    Raises:
        ValueError: a negative min_gap or margin_scale.
    """
    if min_gap < 0 or margin_scale < 0:
        raise ValueError(f"min_gap, margin_scale: expected 0 or more, got {min_gap}, {margin_scale}; raise them")
    calls, dropped = Calls(scheduler, limits=limits, top_p=top_p), Counter({"groups too small": 0})
    seed_ = derive_seed(seed, "rank")

    async def ranked(group: Sequence[str]) -> tuple[float, ...] | None:
        texts = _distinct(group)
        if len(texts) < 2:
            dropped["groups too small"] += 1
            return ()
        fields = {"instructions": prompts.numbered(texts)}
        return await calls.ask(ranker, "rank", fields, seed_, read=lambda text: read_ranking(text, len(texts)))

    scores: Spill[list[float] | None] = Spill(folder)
    calls.scheduler.run(
        calls.scheduler.rows(groups, ranked, scores.put, desc="rankings", total=len(groups), agents=[ranker])
    )
    dropped["groups unreadable"] = sum(given is None for given in scores)
    rows, seen = row_spill(folder), set()
    for group, given in zip(groups, scores):
        for pair in _ranked_pairs(_distinct(group), given or (), min_gap, margin_scale, ranker.name, dropped):
            signature = int(pair.id, 16)
            dropped["repeated"] += signature in seen
            if signature not in seen:
                seen.add(signature)
                rows.append(pair)
    if statistics is not None:
        usable = len(groups) - dropped["groups too small"]
        statistics |= {"groups": usable, "kept": len(rows), "dropped": dict(sorted(dropped.items()))}
        statistics |= {"calls": calls.statistics()}
    return rows


def _distinct(group: Sequence[str]) -> list[str]:
    """The texts of a group without those that differ from another in blanks alone."""
    return list({prompts.flatten(text): text for text in group}.values())


def _ranked_pairs(group, scores, min_gap: float, margin_scale: float, ranker: str, dropped: Counter):
    for (first, a), (second, b) in combinations(zip(group, scores), 2):
        if abs(a - b) <= min_gap:
            dropped["no margin"] += 1
            continue
        chosen, rejected = (first, second) if a > b else (second, first)
        attributes = {"margin": margin_scale * abs(a - b), "chosen_score": max(a, b), "rejected_score": min(a, b)}
        yield Preference((), chosen, rejected, attributes, {"operator": "rank_instructions", "agent": ranker})


def instruction_groups(rows: Sequence[Conversation], *, size: int = 6) -> Sequence[list[str]]:
    """Groups of instructions that descend from one row, in the order of their first members, at most `size` in each.

    Rows are joined through lineage["parents"], the first parent of each; families larger than `size` are cut into
    several groups. The instructions are read from the rows when a group is taken; until the groups are formed a row
    takes about two hundred bytes, and twelve afterwards.
    """
    own, parents = array("Q"), {}
    for row in rows:
        own.append(_number(row.id))
        given = [number for name in row.lineage.get("parents", ()) if (number := _number(name)) != own[-1]]
        if given:
            parents[own[-1]] = given[0]
    families: dict[int, int] = {}
    of_row = array("Q", (families.setdefault(_root(number, parents), len(families)) for number in own))
    return _Groups(rows, of_row, size)


class _Groups(Sequence):
    """Groups of instructions, read from their rows.

    Args:
        of_row: number of the family of each row.   size: most rows of a group.
    """

    def __init__(self, rows: Sequence[Conversation], of_row: array, size: int) -> None:
        self.rows = rows
        families = np.frombuffer(of_row, np.uint64) if len(of_row) else np.zeros(0, np.uint64)
        self._places = np.argsort(families, kind="stable")
        _, starts, counts = np.unique(families[self._places], return_index=True, return_counts=True)
        self._starts = array("q")
        for start, count in zip(starts.tolist(), counts.tolist()):
            self._starts.extend(range(start, start + count, size))
        self._starts.append(len(families))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, group: int) -> list[str]:
        if not 0 <= group < len(self):
            raise IndexError(f"group: expected 0 to {len(self) - 1}, got {group}")
        places = self._places[self._starts[group] : self._starts[group + 1]]
        return [self.rows[place].instruction for place in places.tolist()]


def _number(row_id: Any) -> int:
    """A number of 64 bits for a row's id."""
    return int.from_bytes(blake2b(str(row_id).encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _root(number: int, parents: dict[int, int]) -> int:
    """The oldest ancestor of a row, whether it is among the rows or not."""
    seen = {number}
    while (parent := parents.get(number)) is not None and parent not in seen:
        seen.add(parent)
        number = parent
    return number

"""Self-teaching: the model's own samples of selected prompts become supervised and preference rows.

No algorithm is published for this stage of WizardLM-2. Here a judge scores samples at temperature 1, and an
active-learning score selects prompts. The best sample becomes a supervised row; the best and the worst become a
preference row. Both are on-policy: written by the model that is trained on them.
"""

import asyncio
import random
import statistics as numbers
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wizard_engine.agents.calls import AnyAgent, Calls, Limits, OnLength, derive_seed
from wizard_engine.agents.prompts import flatten
from wizard_engine.agents.replies import read_evolved
from wizard_engine.agents.scheduler import InOrder, Scheduler
from wizard_engine.data.records import Conversation, Message, Preference
from wizard_engine.runtime.spill import Spill

from .elimination import detect_failure, instruction_fault
from .evol_instruct import KEPT_IN_BREADTH, KEPT_IN_DEPTH, OPERATORS
from .judging import Match, Verdict, aids, judge_match, rate_answer
from .pairs import Pairs, instruction_attributes, row_spill

Score = Literal["spread", "flip", "margin"]


@dataclass(frozen=True)
class SelfTaught:
    """Result of a round of self-teaching, kept on disk.

    Attributes:
        sft: the best sample of each selected prompt that is good enough.
        preferences: best and worst sample of each selected prompt, with gap, scores and the student's fingerprint.
        scores: one object a prompt: row, operator, instruction, samples, distinct, best, worst, spread, flip, margin,
            score, selected.
        statistics: "prompts", "evolved_prompts", "selected", "dropped" (reasons), "mean_score", "mean_score_selected",
            "pairs", "calls".
    """

    sft: Spill[Conversation]
    preferences: Spill[Preference]
    scores: Spill[dict[str, Any]]
    statistics: dict[str, Any]


@dataclass
class _Case:
    """One prompt with the student's samples.

    parent: id of its row.   weights: loss weights of the row's answers, () where all are trained.
    operator: how it was evolved.
    """

    parent: str
    prompt: tuple[Message, ...]
    attributes: dict[str, Any]
    weights: tuple[int, ...] = ()
    operator: str | None = None
    samples: list[str] = field(default_factory=list)
    ratings: dict[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    score: float | None = None

    @property
    def ranked(self) -> list[str]:
        """Distinct samples with a rating, best first; of equal ones the more frequent first."""
        frequency = Counter(self.samples)
        return sorted(self.ratings, key=lambda text: (-self.ratings[text], -frequency[text], text))

    @property
    def spread(self) -> float:
        """Standard deviation of the ratings over all samples, repeated ones included, points."""
        rated = [self.ratings[text] for text in self.samples if text in self.ratings]
        return numbers.pstdev(rated) if len(rated) > 1 else 0.0

    def to_line(self) -> list[Any]:
        """The case as a JSON value."""
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def from_line(cls, line: list[Any]) -> "_Case":
        """The case of a value of `to_line`."""
        case = cls(*line)
        case.prompt = tuple(Message(*message) for message in case.prompt)
        case.weights = tuple(case.weights)
        if case.verdict is not None:
            case.verdict = Verdict(*(tuple(scores) for scores in case.verdict))
        return case


def self_teach(
    rows: Sequence[Conversation],
    *,
    student: AnyAgent,
    judge: AnyAgent,
    evolver: AnyAgent | None = None,
    samples: int = 4,
    score: Score = "spread",
    keep: float = 0.5,
    min_gap: float = 1.0,
    min_score: float = 6.0,
    temperature: float = 1.0,
    seed: int = 0,
    limits: Limits | None = None,
    on_length: OnLength = "drop",
    top_p: float = 1.0,
    scheduler: Scheduler | None = None,
    folder: Path | None = None,
) -> SelfTaught:
    """Supervised and preference rows from the student's own samples.

    The prompts are the last user turns of the rows in their context. With an evolver, every instruction is also evolved
    once; the result is used if it changed and the student's first sample shows no failure. Each prompt gets `samples`
    samples and each distinct sample a rating. The best and the worst are judged as a pair in both orders. The
    active-learning score of a prompt is one of
        spread: standard deviation of its samples' ratings: the student is sometimes right and sometimes wrong;
        flip:   change of the pair's gap between the two orders: the judge is in doubt;
        margin: averaged gap of the pair: best and worst differ most clearly.
    The fraction `keep` of the prompts with the highest scores is selected, among those with different samples.

    Args:
        student: answers at `temperature`.   judge: tasks "rate" and "judge".   evolver: task "evolve".
        samples: per prompt, at least 2.
        keep: fraction of the prompts, above 0 and at most 1.
        min_gap: smallest averaged gap of a preference row, points.
        min_score: lowest rating of a supervised row, 1 to 10.
        limits: longest replies.   on_length: "drop" or "keep" answers that were cut.   top_p: of all calls (see Calls).
        scheduler: of the calls; None for one without a ledger.   folder: of temporary files (see runtime.spill).
    Raises:
        ValueError: fewer than 2 samples, keep outside (0, 1], an unknown score.
    """
    _validate(samples, keep, score)
    calls = Calls(scheduler, limits=limits, on_length=on_length, top_p=top_p)
    lesson = _Lesson(calls, student, judge, evolver, samples, score, temperature, seed)
    output = _Output(row_spill(folder), Pairs(min_gap, folder), min_score, student, calls)
    return calls.scheduler.run(_taught(lesson, rows, keep, output, folder))


async def _taught(
    lesson: "_Lesson", rows: Sequence[Conversation], keep: float, output: "_Output", folder: Path | None
) -> SelfTaught:
    calls, dropped = lesson.calls, lesson.dropped
    spill: Spill[list[_Case | None]] = Spill(folder, dump=_to_lines, load=_from_lines)
    known = {_signature(row.instruction) for row in rows} if lesson.evolver is not None else set()
    evolved = lesson.evolved(known)
    agents = [agent for agent in (lesson.student, lesson.judge, lesson.evolver) if agent is not None]
    # Samples with their ratings, and two verdicts; the same of the evolved prompt.
    each = 2 * lesson.samples + 2
    await calls.scheduler.rows(
        enumerate(rows),
        evolved,
        spill.put,
        desc="samples",
        total=len(rows),
        width=2 * lesson.samples,
        calls=each if lesson.evolver is None else 2 * each + 1,
        agents=agents,
    )
    chosen, summary = _select(_cases(spill), keep, dropped)
    scores: Spill[dict[str, Any]] = Spill(folder)
    for index, case in enumerate(_cases(spill)):
        scores.append(_described(case, index in chosen))
        if index in chosen:
            output.add(case, dropped)
    statistics = {
        **summary,
        "dropped": dict(sorted(dropped.items())),
        "mean_score": _mean([line["score"] for line in scores if line["score"] is not None]),
        "mean_score_selected": _mean([line["score"] for line in scores if line["selected"]]),
        "pairs": output.pairs.statistics(),
        "calls": calls.statistics(),
    }
    return SelfTaught(output.sft, output.pairs.rows, scores, statistics)


def _cases(spill: Spill[list[_Case | None]]) -> Iterator[_Case]:
    """The rows' own cases, then the evolved ones."""
    for which in (0, 1):
        for pair in spill:
            if pair[which] is not None:
                yield pair[which]


def _to_lines(cases: Sequence[_Case | None]) -> list[Any]:
    return [None if case is None else case.to_line() for case in cases]


def _from_lines(lines: Sequence[Any]) -> list[_Case | None]:
    return [None if line is None else _Case.from_line(line) for line in lines]


@dataclass
class _Lesson:
    """The agents, settings and counts of one round."""

    calls: Calls
    student: AnyAgent
    judge: AnyAgent
    evolver: AnyAgent | None
    samples: int
    score: Score
    temperature: float
    seed: int
    dropped: Counter[str] = field(default_factory=lambda: Counter({"evolved: failure shown": 0}))

    def evolved(self, known: set[int]):
        """The work on one (place, row): its case, and that of its evolution or None."""
        order = InOrder()

        async def work(item: tuple[int, Conversation]) -> list[_Case | None]:
            place, row = item
            case = _Case(row.id, tuple(row.messages[:-1]), instruction_attributes(row), row.weights)
            return await asyncio.gather(self._sampled(case), self._evolved(case, place, known, order))

        return work

    async def _evolved(self, case: _Case, place: int, known: set[int], order: InOrder) -> _Case | None:
        """The last turn evolved once and sampled, unless that shows a fault."""
        if self.evolver is None:
            return None
        operator = random.Random(derive_seed(self.seed, "operator", case.parent)).choice(OPERATORS)
        instruction = case.prompt[-1].content
        fields = {"operator": operator, "method": "", "instruction": instruction}
        seed = derive_seed(self.seed, "evolve")
        text = await self.calls.ask(self.evolver, "evolve", fields, seed, read=read_evolved, row=case.parent)
        fault = "call failed" if text is None else instruction_fault(instruction, text)
        await order.reach(place)
        signature = _signature(text or "")
        if fault is None and signature in known:
            fault = "already known"
        known.add(signature)
        order.leave(place)
        if fault is not None:
            self.dropped[f"evolved: {fault}"] += 1
            return None
        inherited = KEPT_IN_BREADTH if operator == "breadth" else KEPT_IN_DEPTH
        attributes = {name: case.attributes[name] for name in inherited if name in case.attributes}
        attributes["evolutions"] = case.attributes.get("evolutions", 0) + 1
        prompt = (*case.prompt[:-1], Message("user", text))
        return await self._sampled(_Case(case.parent, prompt, attributes, case.weights, operator))

    async def _sampled(self, case: _Case) -> _Case | None:
        """The case with samples, ratings, verdict and score; None if the first sample shows a bad evolution."""
        seeds = [derive_seed(self.seed, "sample", number) for number in range(self.samples)]
        settings = {"temperature": self.temperature, "row": case.parent}
        texts = await asyncio.gather(
            *(self.calls.converse(self.student, case.prompt, seed, **settings) for seed in seeds)
        )
        case.samples = [text for text in texts if text is not None]
        if case.operator is not None and case.samples and detect_failure(case.samples[0]):
            self.dropped["evolved: failure shown"] += 1
            return None
        await self._rate(case)
        await self._battle(case)
        return case

    async def _rate(self, case: _Case) -> None:
        """Sets a rating for each distinct sample."""
        distinct, seed = list(dict.fromkeys(case.samples)), derive_seed(self.seed, "rate")
        ratings = await asyncio.gather(
            *(
                rate_answer(
                    self.calls, self.judge, case.prompt, text, seed, attributes=case.attributes, row=case.parent
                )
                for text in distinct
            )
        )
        case.ratings = {text: rating for text, rating in zip(distinct, ratings) if rating is not None}

    async def _battle(self, case: _Case) -> None:
        """Sets the verdict on best and worst sample, and the score, of a case with different samples."""
        if len(case.ranked) < 2:
            return
        seed = derive_seed(self.seed, "judge")
        case.verdict = await judge_match(self.calls, self.judge, _match(case), seed, row=case.parent)
        if case.verdict is not None:
            case.score = {"spread": case.spread, "flip": case.verdict.swing, "margin": case.verdict.gap}[self.score]


def _signature(text: str) -> int:
    """A number of 64 bits that texts share if they differ in blanks alone."""
    return int.from_bytes(blake2b(flatten(text).encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _match(case: _Case) -> Match:
    return Match(case.prompt, case.ranked[0], case.ranked[-1], **aids(case.attributes, case.prompt))


def _select(cases: Iterator[_Case], keep: float, dropped: Counter) -> tuple[set[int], dict[str, int]]:
    """Numbers of the chosen cases, and counts.

    Chosen is the fraction `keep` of all cases with the highest scores; of equal scores the earlier ones.
    """
    scores, indices, prompts, evolved = array("d"), array("q"), 0, 0
    dropped.update({"samples agree": 0, "samples missing": 0, "call failed": 0, "score too low": 0})
    for index, case in enumerate(cases):
        prompts, evolved = prompts + 1, evolved + (case.operator is not None)
        ranked = len(case.ranked)
        dropped["samples agree"] += ranked < 2 <= len(case.samples)
        dropped["samples missing"] += ranked < 2 and len(case.samples) < 2
        dropped["call failed"] += case.score is None and ranked > 1
        if case.score is not None:
            scores.append(case.score)
            indices.append(index)
    # The sort is stable: of equal scores the earlier stays first.
    best = sorted(range(len(scores)), key=lambda place: -scores[place])[: round(keep * prompts)]
    dropped["score too low"] += len(scores) - len(best)
    counts = {"prompts": prompts, "evolved_prompts": evolved, "selected": len(best)}
    return {indices[place] for place in best}, counts


class _Output(NamedTuple):
    """Where the rows of chosen cases go."""

    sft: Spill[Conversation]
    pairs: Pairs
    min_score: float
    student: AnyAgent
    calls: Calls

    def add(self, case: _Case, dropped: Counter) -> None:
        """Adds the rows of one case."""
        best = case.ranked[0]
        lineage = {"parents": [case.parent], "operator": "self_teach", "agent": self.student.name}
        attributes = case.attributes | {"policy": self.student.fingerprint, "active_score": case.score}
        if case.operator is not None:
            lineage["evolved_by"] = case.operator
        if case.ratings[best] >= self.min_score:
            messages = (*case.prompt, Message("assistant", best))
            weights = (*case.weights[:-1], 1) if case.weights else ()
            scored = attributes | {"answer_score": case.ratings[best]} | self.calls.marks(best)
            self.sft.append(Conversation(messages, scored, lineage, weights))
        else:
            dropped["best sample too weak for a supervised row"] += 1
        if case.verdict.gap > 0:
            match = _match(case)
            marks = self.calls.marks(match.first, match.second)
            self.pairs.add(match, case.verdict, attributes | marks, lineage)
        else:
            self.pairs.dropped["ratings and battle disagree"] += 1


def _described(case: _Case, is_selected: bool) -> dict[str, Any]:
    ranked = case.ranked
    return {
        "row": case.parent,
        "operator": case.operator,
        "instruction": case.prompt[-1].content,
        "samples": len(case.samples),
        "distinct": len(ranked),
        "best": case.ratings[ranked[0]] if ranked else None,
        "worst": case.ratings[ranked[-1]] if ranked else None,
        "spread": case.spread,
        "flip": None if case.verdict is None else case.verdict.swing,
        "margin": None if case.verdict is None else case.verdict.gap,
        "score": case.score,
        "selected": is_selected,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _validate(samples: int, keep: float, score: str) -> None:
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}; one sample agrees with itself")
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share above 0 and at most 1, got {keep}; give 0.5 for the upper half")
    if score not in ("spread", "flip", "margin"):
        raise ValueError(f"score: expected spread, flip or margin, got {score!r}; choose one of them")

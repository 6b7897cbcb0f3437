"""Self-teaching: the model's own samples of selected prompts become supervised and preference rows.

No algorithm is published for this stage of WizardLM-2. Here a judge scores samples at temperature 1, and an
active-learning score selects prompts. The best sample becomes a supervised row; the best and the worst become a
preference row. Both are on-policy: written by the model that is trained on them.
"""

import random
import statistics as numbers
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wizard_engine.agents.prompts import flatten
from wizard_engine.agents.protocol import Agent
from wizard_engine.agents.replies import read_evolved
from wizard_engine.data.records import Conversation, Message, Preference

from .calls import JUDGE_TOKENS, Calls, OnLength, derive_seed
from .elimination import detect_failure, instruction_fault
from .evol_instruct import KEPT_IN_BREADTH, KEPT_IN_DEPTH, OPERATORS
from .judging import Match, Verdict, judge_matches, rate_answers
from .pairs import Pairs, instruction_attributes

Score = Literal["spread", "flip", "margin"]


@dataclass(frozen=True)
class SelfTaught:
    """Result of a round of self-teaching.

    Attributes:
        sft: the best sample of each selected prompt that is good enough.
        preferences: best and worst sample of each selected prompt, with gap, scores and the student's fingerprint.
        scores: one object a prompt: row, operator, instruction, samples, distinct, best, worst, spread, flip, margin,
            score, selected.
        statistics: "prompts", "evolved_prompts", "selected", "dropped" (reasons), "mean_score", "mean_score_selected",
            "pairs", "calls".
    """

    sft: list[Conversation]
    preferences: list[Preference]
    scores: list[dict[str, Any]]
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


def self_teach(
    rows: Sequence[Conversation],
    *,
    student: Agent,
    judge: Agent,
    evolver: Agent | None = None,
    samples: int = 4,
    score: Score = "spread",
    keep: float = 0.5,
    min_gap: float = 1.0,
    min_score: float = 6.0,
    temperature: float = 1.0,
    seed: int = 0,
    max_tokens: int = 256,
    judge_max_tokens: int = JUDGE_TOKENS,
    on_length: OnLength = "drop",
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
        max_tokens: longest reply.
        judge_max_tokens: longest verdict.   on_length: "drop" or "keep" answers that were cut (see Calls).
    Raises:
        ValueError: fewer than 2 samples, keep outside (0, 1], an unknown score.
    """
    _validate(samples, keep, score)
    calls, pairs, dropped = (
        Calls(max_tokens=max_tokens, judge_max_tokens=judge_max_tokens, on_length=on_length),
        Pairs(min_gap),
        Counter(),
    )
    cases = [_Case(row.id, tuple(row.messages[:-1]), instruction_attributes(row), row.weights) for row in rows]
    cases += _evolved_cases(calls, evolver, cases, dropped, seed) if evolver is not None else []
    cases = _sample(calls, student, cases, samples, temperature, dropped, seed)
    _rate(calls, judge, cases, seed)
    _battle(calls, judge, cases, score, seed)
    selected = _select(cases, keep, dropped)
    sft: list[Conversation] = []
    for case in selected:
        _teach(calls, case, student, pairs, sft, min_score, dropped)
    chosen = {id(case) for case in selected}
    statistics = {
        "prompts": len(cases),
        "evolved_prompts": sum(case.operator is not None for case in cases),
        "selected": len(selected),
        "dropped": dict(sorted(dropped.items())),
        "mean_score": _mean([case.score for case in cases if case.score is not None]),
        "mean_score_selected": _mean([case.score for case in selected]),
        "pairs": pairs.statistics(),
        "calls": calls.statistics(),
    }
    return SelfTaught(sft, pairs.rows, [_described(case, id(case) in chosen) for case in cases], statistics)


def _evolved_cases(calls: Calls, evolver: Agent, cases: Sequence[_Case], dropped: Counter, seed: int) -> list[_Case]:
    """New prompts: the last turns evolved once, without those that show a fault."""
    operators = [random.Random(derive_seed(seed, "operator", case.parent)).choice(OPERATORS) for case in cases]
    fields = [
        {"operator": operator, "method": "", "instruction": case.prompt[-1].content}
        for case, operator in zip(cases, operators)
    ]
    texts = calls.ask(evolver, "evolve", fields, derive_seed(seed, "evolve"), read=lambda text, _: read_evolved(text))
    made, known = [], {flatten(case.prompt[-1].content) for case in cases}
    for case, text, operator in zip(cases, texts, operators):
        fault = "call failed" if text is None else instruction_fault(case.prompt[-1].content, text)
        if fault is None and flatten(text) in known:
            fault = "already known"
        known.add(flatten(text or ""))
        if fault is not None:
            dropped[f"evolved: {fault}"] += 1
            continue
        inherited = KEPT_IN_BREADTH if operator == "breadth" else KEPT_IN_DEPTH
        attributes = {name: case.attributes[name] for name in inherited if name in case.attributes}
        attributes["evolutions"] = case.attributes.get("evolutions", 0) + 1
        made.append(_Case(case.parent, (*case.prompt[:-1], Message("user", text)), attributes, case.weights, operator))
    return made


def _sample(
    calls: Calls, student: Agent, cases: Sequence[_Case], samples: int, temperature: float, dropped: Counter, seed: int
) -> list[_Case]:
    """Sets the samples; returns the cases without evolved prompts whose first sample shows a failure."""
    seeds = [derive_seed(seed, "sample", number) for number in range(samples) for _ in cases]
    prompts = [case.prompt for case in cases] * samples
    texts = calls.converse(student, prompts, seeds, temperature=temperature)
    for index, case in enumerate(cases):
        case.samples = [text for text in texts[index :: len(cases)] if text is not None]
    kept = [case for case in cases if case.operator is None or not (case.samples and detect_failure(case.samples[0]))]
    dropped["evolved: failure shown"] += len(cases) - len(kept)
    return kept


def _rate(calls: Calls, judge: Agent, cases: Sequence[_Case], seed: int) -> None:
    """Sets a rating for each distinct sample, in one batch."""
    items = [(case, text) for case in cases for text in dict.fromkeys(case.samples)]
    ratings = rate_answers(calls, judge, [(case.prompt, text) for case, text in items], derive_seed(seed, "rate"))
    for (case, text), rating in zip(items, ratings):
        if rating is not None:
            case.ratings[text] = rating


def _battle(calls: Calls, judge: Agent, cases: Sequence[_Case], score: Score, seed: int) -> None:
    """Sets the verdict on best and worst sample, and the score, of every case with different samples."""
    differing = [case for case in cases if len(case.ranked) > 1]
    matches = [_match(case) for case in differing]
    for case, verdict in zip(differing, judge_matches(calls, judge, matches, derive_seed(seed, "judge"))):
        case.verdict = verdict
        if verdict is not None:
            case.score = {"spread": case.spread, "flip": verdict.swing, "margin": verdict.gap}[score]


def _match(case: _Case) -> Match:
    return Match(case.prompt, case.ranked[0], case.ranked[-1])


def _select(cases: Sequence[_Case], keep: float, dropped: Counter) -> list[_Case]:
    """The fraction `keep` of all cases with the highest scores, in their order; of equal scores the earlier ones."""
    scored = [index for index, case in enumerate(cases) if case.score is not None]
    dropped["samples agree"] += sum(len(case.ranked) < 2 <= len(case.samples) for case in cases)
    dropped["samples missing"] += sum(len(case.ranked) < 2 and len(case.samples) < 2 for case in cases)
    dropped["call failed"] += sum(case.score is None and len(case.ranked) > 1 for case in cases)
    best = sorted(scored, key=lambda index: (-cases[index].score, index))[: round(keep * len(cases))]
    dropped["score too low"] += len(scored) - len(best)
    return [cases[index] for index in sorted(best)]


def _teach(
    calls: Calls,
    case: _Case,
    student: Agent,
    pairs: Pairs,
    sft: list[Conversation],
    min_score: float,
    dropped: Counter,
) -> None:
    """Adds the rows of one selected case."""
    best = case.ranked[0]
    lineage = {"parents": [case.parent], "operator": "self_teach", "agent": student.name}
    attributes = case.attributes | {"policy": student.fingerprint, "active_score": case.score}
    if case.operator is not None:
        lineage["evolved_by"] = case.operator
    if case.ratings[best] >= min_score:
        messages = (*case.prompt, Message("assistant", best))
        weights = (*case.weights[:-1], 1) if case.weights else ()
        scored = attributes | {"answer_score": case.ratings[best]} | calls.marks(best)
        sft.append(Conversation(messages, scored, lineage, weights))
    else:
        dropped["best sample too weak for a supervised row"] += 1
    if case.verdict.gap > 0:
        match = _match(case)
        pairs.add(match, case.verdict, attributes | calls.marks(match.first, match.second), lineage)
    else:
        pairs.dropped["ratings and battle disagree"] += 1


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

"""Judging two answers in both orders, and rating single answers."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wizard_engine.agents import prompts
from wizard_engine.agents.aids import aids
from wizard_engine.agents.calls import AnyAgent, Calls, together
from wizard_engine.agents.replies import scores_of
from wizard_engine.data.records import Message


class Match(NamedTuple):
    """Two answers to the last user turn of a conversation, and what the judge is told besides (see `agents.aids`)."""

    prompt: tuple[Message, ...]
    first: str
    second: str
    criteria: str = ""
    reference: str = ""


class Verdict(NamedTuple):
    """Scores 1 to 10 of a match in both orders: `forward` with the first answer as A, `backward` with it as B."""

    forward: tuple[float, float]
    backward: tuple[float, float]

    @property
    def scores(self) -> tuple[float, float]:
        """Score of the first and of the second answer, averaged over the orders."""
        return (self.forward[0] + self.backward[0]) / 2, (self.forward[1] + self.backward[1]) / 2

    @property
    def gap(self) -> float:
        """Averaged score of the first answer minus that of the second, points."""
        first, second = self.scores
        return first - second

    @property
    def gaps(self) -> tuple[float, float]:
        """First minus second, in each order."""
        return self.forward[0] - self.forward[1], self.backward[0] - self.backward[1]

    @property
    def winner(self) -> int:
        """1 if the first answer wins in both orders, -1 if the second does, else 0."""
        one, two = self.gaps
        return 1 if one > 0 and two > 0 else -1 if one < 0 and two < 0 else 0

    @property
    def is_flipped(self) -> bool:
        """Whether the two orders name different winners (a tie in one of them is no flip)."""
        one, two = self.gaps
        return one * two < 0

    def swapped(self) -> "Verdict":
        """The verdict of the same match with first and second answer exchanged."""
        return Verdict(self.forward[::-1], self.backward[::-1])

    @property
    def swing(self) -> float:
        """Change of the gap between the two orders, points: a measure of the judge's doubt."""
        one, two = self.gaps
        return abs(one - two)


Judges = AnyAgent | Sequence[AnyAgent]


def panel(judges: Judges) -> tuple[AnyAgent, ...]:
    """One judge or several as a tuple."""
    return tuple(judges) if isinstance(judges, Sequence) else (judges,)


def check_judges(judges: Judges) -> None:
    """Raises ValueError where there is no judge, or one that is named twice: it would count twice in the mean."""
    names = [judge.name for judge in panel(judges)]
    if not names or len(set(names)) < len(names):
        got = ", ".join(names) or "none"
        raise ValueError(f"judge: expected at least one, and names that differ, got {got}; name each judge once")


def names_of(judges: Judges) -> str:
    """Names of the judges, for a row's lineage."""
    return "+".join(judge.name for judge in panel(judges))


async def judge_match(calls: Calls, judges: Judges, match: Match, seed: int, *, row: str = "") -> Verdict | None:
    """The verdict on a match: the mean over the judges that could be read in both orders; None without any."""
    judges = panel(judges)
    if len(judges) == 1:
        return await _verdict(calls, judges[0], match, seed, row)
    verdicts = await asyncio.gather(*(_verdict(calls, judge, match, seed, row) for judge in judges))
    given = [verdict for verdict in verdicts if verdict is not None]
    if len(given) <= 1:
        return given[0] if given else None
    return Verdict(_mean([v.forward for v in given]), _mean([v.backward for v in given]))


async def _verdict(calls: Calls, judge: AnyAgent, match: Match, seed: int, row: str) -> Verdict | None:
    """One judge's verdict; None if one of the two orders failed or could not be read."""
    asked = (calls.ask(judge, "judge", _fields(match, swap), seed, read=_read_pair, row=row) for swap in (False, True))
    forward, swapped = await together(judge, asked)
    if forward is None or swapped is None:
        return None
    return Verdict(forward, (swapped[1], swapped[0]))


def _read_pair(text: str) -> tuple[float, ...] | None:
    return scores_of(text, 2)


def _read_one(text: str) -> tuple[float, ...] | None:
    return scores_of(text, 1)


def _mean(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(first for first, _ in scores) / len(scores), sum(second for _, second in scores) / len(scores)


async def rate_answer(
    calls: Calls,
    judge: AnyAgent,
    prompt: tuple[Message, ...],
    answer: str,
    seed: int,
    *,
    attributes: Mapping[str, Any] | None = None,
    row: str = "",
) -> float | None:
    """A score 1 to 10 of an answer to an instruction with these attributes; None if it failed or could not be read."""
    fields = {"history": _history(prompt), "instruction": prompt[-1].content, "answer": answer}
    fields |= aids(attributes, prompt)
    score = await calls.ask(judge, "rate", fields, seed, read=_read_one, row=row)
    return None if score is None else score[0]


def _fields(match: Match, swap: bool) -> dict[str, str]:
    a, b = (match.second, match.first) if swap else (match.first, match.second)
    prompt = match.prompt
    told = {"criteria": match.criteria, "reference": match.reference}
    return {"history": _history(prompt), "instruction": prompt[-1].content, "answer_a": a, "answer_b": b, **told}


def _history(prompt: Sequence[Message]) -> str:
    return prompts.dialogue(prompt[:-1])

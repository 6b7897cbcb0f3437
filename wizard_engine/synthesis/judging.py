"""Judging two answers in both orders, and rating single answers."""

from collections.abc import Sequence
from typing import NamedTuple

from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Agent
from wizard_engine.agents.replies import read_scores
from wizard_engine.data.records import Message

from .calls import Calls


class Match(NamedTuple):
    """Two answers to the last user turn of a conversation."""

    prompt: tuple[Message, ...]
    first: str
    second: str


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


def judge_matches(calls: Calls, judge: Agent, matches: Sequence[Match], seed: int) -> list[Verdict | None]:
    """A verdict for each match, in one batch; None if one of the two orders failed or could not be read."""
    fields = [_fields(match, swap) for match in matches for swap in (False, True)]
    scores = calls.ask(judge, "judge", fields, seed, read=lambda text, _: read_scores(text, 2))
    verdicts: list[Verdict | None] = []
    for forward, swapped in zip(scores[0::2], scores[1::2]):
        readable = forward is not None and swapped is not None
        verdicts.append(Verdict(forward, (swapped[1], swapped[0])) if readable else None)
    return verdicts


def rate_answers(
    calls: Calls, judge: Agent, items: Sequence[tuple[tuple[Message, ...], str]], seed: int
) -> list[float | None]:
    """A score 1 to 10 for each (prompt, answer), all in one batch; None if it failed or could not be read."""
    fields = [
        {"history": _history(prompt), "instruction": prompt[-1].content, "reference": "", "answer": answer}
        for prompt, answer in items
    ]
    scores = calls.ask(judge, "rate", fields, seed, read=lambda text, _: read_scores(text, 1))
    return [None if score is None else score[0] for score in scores]


def _fields(match: Match, swap: bool) -> dict[str, str]:
    a, b = (match.second, match.first) if swap else (match.first, match.second)
    prompt = match.prompt
    return {"history": _history(prompt), "instruction": prompt[-1].content, "answer_a": a, "answer_b": b}


def _history(prompt: Sequence[Message]) -> str:
    return prompts.dialogue(prompt[:-1])

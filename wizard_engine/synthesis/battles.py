"""Battles: several agents answer the same turn, and a judge compares every pair of answers."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from wizard_engine.agents.calls import AnyAgent, Calls
from wizard_engine.agents.prompts import flatten
from wizard_engine.data.records import Conversation, Message

from .judging import Judges, Match, Verdict, aids, judge_match
from .pairs import instruction_attributes


@dataclass
class Scene:
    """One turn that all contestants answer.

    Attributes:
        row: its source row.   turn: 0 for the row's own turn, 1 for the first simulated one, ...
        prompt: the conversation up to the user turn.
        answers: one a contestant, None for a failed call.
        verdicts: (i, j) with i < j -> verdict on their answers; absent if either is missing or both are equal.
    """

    row: Conversation
    turn: int
    prompt: tuple[Message, ...]
    answers: list[str | None] = field(default_factory=list)
    verdicts: dict[tuple[int, int], Verdict] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        """What holds for any answer to this turn; the row's reference answers the row's own turn alone."""
        attributes = instruction_attributes(self.row)
        if self.turn:
            attributes.pop("reference", None)
        return attributes

    def aids(self) -> dict[str, str]:
        """What a judge is told besides the answers; the row's reference answers the row's own turn alone."""
        return aids(self.row.attributes, self.prompt) | ({"reference": ""} if self.turn else {})

    def verdict(self, first: int, second: int) -> Verdict | None:
        """The verdict on two contestants, seen from `first`; None without a battle."""
        if first > second:
            mirrored = self.verdicts.get((second, first))
            return None if mirrored is None else mirrored.swapped()
        return self.verdicts.get((first, second))

    def is_identical(self, first: int, second: int) -> bool:
        """Whether two contestants gave the same answer, blanks aside."""
        texts = self.answers[first], self.answers[second]
        return None not in texts and flatten(texts[0]) == flatten(texts[1])

    def score(self, contestant: int) -> float:
        """Mean score of a contestant over its battles; 0 without one."""
        scores = [v.scores[pair.index(contestant)] for pair, v in self.verdicts.items() if contestant in pair]
        return sum(scores) / len(scores) if scores else 0.0

    def ranking(self) -> list[int]:
        """The contestants that battled, best mean score first; of equal ones the earlier first."""
        fought = sorted({contestant for pair in self.verdicts for contestant in pair})
        return sorted(fought, key=lambda contestant: (-self.score(contestant), contestant))

    def loss(self) -> tuple[float, int]:
        """By how many points contestant 0 loses to the best-scored rival that beats it, and which one; (0, 0) if none.

        A battle whose two orders name different winners is no loss.
        """
        for rival in self.ranking():
            verdict = self.verdict(rival, 0) if rival else None
            if verdict is not None and verdict.gap > 0 and not verdict.is_flipped:
                return verdict.gap, rival
        return 0.0, 0

    def to_line(self) -> list[Any]:
        """The scene without its row, as a JSON value."""
        return [self.turn, self.prompt, self.answers, [[*pair, *verdict] for pair, verdict in self.verdicts.items()]]

    @classmethod
    def from_line(cls, row: Conversation, line: list[Any]) -> "Scene":
        """The scene of a row from a value of `to_line`."""
        turn, prompt, answers, verdicts = line
        fought = {(a, b): Verdict(tuple(forward), tuple(backward)) for a, b, forward, backward in verdicts}
        return cls(row, turn, tuple(Message(*message) for message in prompt), answers, fought)


async def hold_battles(
    calls: Calls, contestants: Sequence[AnyAgent], judges: Judges, scene: Scene, *, temperature: float, seed: int
) -> None:
    """Fills in the answers, all asked at once, then the verdicts of all pairs."""
    row = scene.row.id
    scene.answers[:] = await asyncio.gather(
        *(calls.converse(c, scene.prompt, seed, temperature=temperature, row=row) for c in contestants)
    )
    pairs = [
        (a, b)
        for a, b in combinations(range(len(contestants)), 2)
        if None not in (scene.answers[a], scene.answers[b]) and not scene.is_identical(a, b)
    ]
    matches = [Match(scene.prompt, scene.answers[a], scene.answers[b], **scene.aids()) for a, b in pairs]
    verdicts = await asyncio.gather(*(judge_match(calls, judges, match, seed, row=row) for match in matches))
    scene.verdicts.update((pair, verdict) for pair, verdict in zip(pairs, verdicts) if verdict is not None)


def battle_records(scene: Scene, names: Sequence[str]) -> list[dict[str, Any]]:
    """One object a battle of a scene, equal answers included; none for failed calls."""
    records = (_record(scene, a, b, names) for a, b in combinations(range(len(names)), 2))
    return [record for record in records if record is not None]


def _record(scene: Scene, a: int, b: int, names: Sequence[str]) -> dict[str, Any] | None:
    verdict = scene.verdict(a, b)
    record = {"row": scene.row.id, "turn": scene.turn, "a": names[a], "b": names[b]}
    if verdict is None:
        tie = {"score_a": None, "score_b": None, "gap": 0.0, "winner": "tie", "is_flipped": False, "identical": True}
        return record | tie if scene.is_identical(a, b) else None
    return record | {
        "score_a": verdict.scores[0],
        "score_b": verdict.scores[1],
        "gap": verdict.gap,
        "winner": {1: "a", -1: "b", 0: "tie"}[verdict.winner],
        "is_flipped": verdict.is_flipped,
        "identical": False,
    }


class BattleTables:
    """Results of ours (a in its battles) by rival, topic and difficulty, and the judge's rate of flips over all.

    Each table has a line a value: battles, wins, losses, ties, flips, identical, mean_gap (points, positive where ours
    is ahead). Rows without the attribute are under "unknown"; a numeric difficulty is rounded.
    """

    def __init__(self, ours: str) -> None:
        self.ours, self.battles, self._judged, self._flipped = ours, 0, 0, 0
        self._tables: dict[str, dict[str, _Line]] = {"rivals": {}, "topics": {}, "difficulties": {}}

    def add(self, battle: Mapping[str, Any], row: Conversation) -> None:
        """Count a battle of a row."""
        self.battles += 1
        self._judged += not battle["identical"]
        self._flipped += battle["is_flipped"]
        if battle["a"] != self.ours:
            return
        topic, difficulty = (label(row.attributes.get(name)) for name in ("topic", "difficulty"))
        for table, key in zip(self._tables.values(), (battle["b"], topic, difficulty)):
            table.setdefault(key, _Line()).add(battle)

    def statistics(self) -> dict[str, Any]:
        """The tables, "battles" and "flip_rate", as JSON."""
        tables = {
            name: {key: line.statistics() for key, line in sorted(table.items())}
            for name, table in self._tables.items()
        }
        return tables | {"battles": self.battles, "flip_rate": self._flipped / self._judged if self._judged else 0.0}


def label(value: Any) -> str:
    """An attribute's value as the name of a table's line: numbers rounded, lists joined, None as "unknown"."""
    if value is None:
        return "unknown"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(round(value))
    return "+".join(sorted(map(str, value))) if isinstance(value, list | tuple | set) else str(value)


@dataclass
class _Line:
    """One line of a table."""

    winners: Counter[str] = field(default_factory=Counter)
    flips: int = 0
    identical: int = 0
    gap: float = 0.0

    def add(self, battle: Mapping[str, Any]) -> None:
        self.winners[battle["winner"]] += 1
        self.flips += battle["is_flipped"]
        self.identical += battle["identical"]
        self.gap += battle["gap"]

    def statistics(self) -> dict[str, float]:
        battles = self.winners.total()
        return {
            "battles": battles,
            "wins": self.winners["a"],
            "losses": self.winners["b"],
            "ties": self.winners["tie"],
            "flips": self.flips,
            "identical": self.identical,
            "mean_gap": self.gap / battles,
        }

"""Battles: several agents answer the same turn, and a judge compares every pair of answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from wizard_engine.agents.prompts import flatten
from wizard_engine.agents.protocol import Agent
from wizard_engine.data.records import Conversation, Message

from .calls import Calls
from .judging import Match, Verdict, judge_matches


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


def hold_battles(
    calls: Calls, contestants: Sequence[Agent], judge: Agent, scenes: Sequence[Scene], *, temperature: float, seed: int
) -> None:
    """Fills in the answers (one batch a contestant) and the verdicts of all pairs (one batch)."""
    for contestant in contestants:
        texts = calls.converse(contestant, [scene.prompt for scene in scenes], seed, temperature=temperature)
        for scene, text in zip(scenes, texts):
            scene.answers.append(text)
    fights = [
        (scene, pair)
        for scene in scenes
        for pair in combinations(range(len(contestants)), 2)
        if None not in (scene.answers[pair[0]], scene.answers[pair[1]]) and not scene.is_identical(*pair)
    ]
    matches = [Match(scene.prompt, scene.answers[a], scene.answers[b]) for scene, (a, b) in fights]
    for (scene, pair), verdict in zip(fights, judge_matches(calls, judge, matches, seed)):
        if verdict is not None:
            scene.verdicts[pair] = verdict


def battle_records(scenes: Sequence[Scene], names: Sequence[str]) -> list[dict[str, Any]]:
    """One object a battle, equal answers included; none for failed calls."""
    return [
        record
        for scene in scenes
        for a, b in combinations(range(len(names)), 2)
        if (record := _record(scene, a, b, names)) is not None
    ]


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


def battle_tables(battles: Sequence[dict[str, Any]], rows: Sequence[Conversation], ours: str) -> dict[str, Any]:
    """Results of ours (a in its battles) by rival, topic and difficulty, and the judge's rate of flips over all.

    Each table has a line a value: battles, wins, losses, ties, flips, identical, mean_gap (points, positive where ours
    is ahead). Rows without the attribute are under "unknown"; a numeric difficulty is rounded.
    """
    attributes = {row.id: row.attributes for row in rows}
    our_battles = [battle for battle in battles if battle["a"] == ours]
    judged = [battle for battle in battles if not battle["identical"]]
    return {
        "rivals": _table(our_battles, lambda battle: battle["b"]),
        "topics": _table(our_battles, lambda battle: label(attributes[battle["row"]].get("topic"))),
        "difficulties": _table(our_battles, lambda battle: label(attributes[battle["row"]].get("difficulty"))),
        "battles": len(battles),
        "flip_rate": sum(battle["is_flipped"] for battle in judged) / len(judged) if judged else 0.0,
    }


def label(value: Any) -> str:
    """An attribute's value as the name of a table's line: numbers rounded, lists joined, None as "unknown"."""
    if value is None:
        return "unknown"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(round(value))
    return "+".join(sorted(map(str, value))) if isinstance(value, list | tuple | set) else str(value)


def _table(battles: Sequence[dict[str, Any]], key) -> dict[str, dict[str, float]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for battle in battles:
        groups.setdefault(key(battle), []).append(battle)
    return {name: _line(group) for name, group in sorted(groups.items())}


def _line(group: Sequence[dict[str, Any]]) -> dict[str, float]:
    count = {winner: sum(battle["winner"] == winner for battle in group) for winner in ("a", "b", "tie")}
    return {
        "battles": len(group),
        "wins": count["a"],
        "losses": count["b"],
        "ties": count["tie"],
        "flips": sum(battle["is_flipped"] for battle in group),
        "identical": sum(battle["identical"] for battle in group),
        "mean_gap": sum(battle["gap"] for battle in group) / len(group),
    }

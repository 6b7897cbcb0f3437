"""Co-teaching: models answer the same turns, a judge compares every pair, and ours learns from the battles it lost.

The concrete algorithm is Arena Learning (Luo et al. 2024, arXiv:2407.10627): every pair battles, each battle is judged
in both orders, rows where ours loses by more than K become supervised lessons, winner and loser of a row become a
preference row. There K was 3.0 for supervised and 2.0 for preference rows in the first round, and 1.0 for supervised
ones later. Simulated chat, improvement suggestions and closing the skill gap are named in the WizardLM-2 report; their
form here is this project's.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

from wizard_engine.agents.calls import AnyAgent, Calls, Limits, OnLength, derive_seed
from wizard_engine.agents.prompts import dialogue
from wizard_engine.agents.replies import read_rewritten, read_suggestion, read_user
from wizard_engine.agents.scheduler import Scheduler
from wizard_engine.data.records import Conversation, Message, Preference, kept_weights
from wizard_engine.runtime.spill import Spill

from .battles import BattleTables, Scene, battle_records, hold_battles, label
from .elimination import detect_failure
from .judging import Judges, Match, check_judges, judge_match, names_of, panel
from .lessons import Losses, choose_lessons
from .pairs import Pairs, row_spill


@dataclass(frozen=True)
class CoTaught:
    """Result of a round of co-teaching; its rows and battles are kept on disk.

    Attributes:
        sft: the lessons, in the order of their scenes, with gap, rival, skill quota and suggestion in attributes and
        lineage.
        preferences: best and worst answer of a scene, with their score gap.
        battles: one object a battle: row, turn, a, b (agent names), score_a, score_b, gap, winner ("a", "b" or "tie"),
            is_flipped, identical.
        statistics: "rivals", "topics", "difficulties" (see battles.BattleTables), "skills" (see lessons), "flip_rate",
            "missing" (battles without answers or verdict; they are in no table),
            "selected" (scenes, lessons and pairs, with the reasons for dropping), "calls".
    """

    sft: Spill[Conversation]
    preferences: Spill[Preference]
    battles: Spill[dict[str, Any]]
    statistics: dict[str, Any]


class _Target(NamedTuple):
    """The answer of a lesson, its author, and the suggestion it follows ("" for a rival's original answer)."""

    answer: str
    agent: str
    suggestion: str


def co_teach(
    rows: Sequence[Conversation],
    *,
    ours: AnyAgent,
    rivals: Sequence[AnyAgent],
    judge: Judges,
    suggester: AnyAgent | None = None,
    rewriter: AnyAgent | None = None,
    user: AnyAgent | None = None,
    sft_threshold: float = 3.0,
    dpo_threshold: float = 2.0,
    chat_turns: int = 1,
    lessons: int | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    limits: Limits | None = None,
    on_length: OnLength = "drop",
    top_p: float = 1.0,
    scheduler: Scheduler | None = None,
    folder: Path | None = None,
) -> CoTaught:
    """Lessons and preference rows for `ours` from battles with its rivals.

    1. All contestants answer the last user turn of every row. With `chat_turns` above 1, `user` continues each chat
       after its best answer, and the new turn is another scene.
    2. Every pair battles, judged in both orders, scores averaged. Equal answers are a tie without a judgement.
    3. A scene is a candidate lesson if ours loses by more than `sft_threshold` to the best-scored rival that beats it.
       The suggester, if any, says what ours should change. The rewriter (default: that rival) rewrites the answer of
       ours accordingly. The rewrite replaces the rival's answer as the target if the judge prefers it in both orders.
    4. `lessons` limits the lessons; quotas go to the weakest skills by the rule of lessons.choose_lessons.
    5. The best and the worst answer of a scene become a preference row if their gap exceeds `dpo_threshold`.

    Rows are worked on at the same time, each from its answers to its verdicts without waiting for the others. Memory
    does not grow with their number.

    Args:
        rows: only their turns up to the last user turn are used.
        ours: the student; rivals must have other names.
        judge: task "judge"; of several the mean counts.   suggester: "suggest".   rewriter: "rewrite".   user: "user".
        sft_threshold, dpo_threshold: K, points of score.
        chat_turns: user turns of each chat that are judged.
        lessons: most lessons; None for all.
        temperature: of the contestants' answers.
        limits: longest replies.   on_length: "drop" or "keep" answers that were cut.   top_p: of all calls (see Calls).
        scheduler: of the calls; None for one without a ledger.   folder: of temporary files (see runtime.spill).
    Raises:
        ValueError: no rivals, no judges, equal names, a threshold below 0, chat_turns below 1, or no `user` for a
            longer chat.
    """
    contestants = [ours, *rivals]
    _validate(contestants, judge, sft_threshold, dpo_threshold, chat_turns, user)
    calls = Calls(scheduler, limits=limits, on_length=on_length, top_p=top_p)
    coach = _Coach(calls, contestants, judge, suggester, rewriter, user, chat_turns, temperature, seed)
    return calls.scheduler.run(_taught(coach, rows, Pairs(dpo_threshold, folder), sft_threshold, lessons, folder))


async def _taught(
    coach: "_Coach",
    rows: Sequence[Conversation],
    pairs: Pairs,
    threshold: float,
    lessons: int | None,
    folder: Path | None,
) -> CoTaught:
    calls, names = coach.calls, [contestant.name for contestant in coach.contestants]
    chats: Spill[list] = Spill(folder)
    await calls.scheduler.rows(
        rows,
        coach.chat,
        lambda place, scenes: chats.put(place, [scene.to_line() for scene in scenes]),
        desc="battles",
        total=len(rows),
        width=coach.width,
        calls=coach.calls_of_chat,
        agents=coach.agents,
    )
    battles: Spill[dict[str, Any]] = Spill(folder)
    tables, losses, index = BattleTables(names[0]), Losses(), _Index()
    for place, scene in _scenes(rows, chats, coach.chat_turns):
        for record in battle_records(scene, names):
            battles.append(record)
            tables.add(record, scene.row)
        coach.offer(pairs, scene)
        losses.add(label(scene.row.attributes.get("skill")), scene.loss()[0])
        index.add(place, scene.turn)
    chosen, skills = choose_lessons(losses, threshold, lessons)
    most = len(losses) if lessons is None else min(lessons, len(losses))
    calls.scheduler.at_most("lessons", taken=len(chosen), most=most, calls=coach.calls_of_lesson)
    sft, from_suggestions = await coach.lessons(_chosen(rows, chats, index, chosen), len(chosen), folder)
    won_by_ours = sum(pair.attributes["winner"] == names[0] for pair in pairs.rows)
    selected = {
        "scenes": len(losses),
        "candidates": sum(line["candidates"] for line in skills.values()),
        "lessons": len(sft),
        "lessons_from_suggestions": from_suggestions,
        "pairs": pairs.statistics(),
        "pairs_won_by_ours": won_by_ours,
    }
    missing = len(losses) * comb(len(names), 2) - len(battles)
    statistics = {**tables.statistics(), "missing": missing, "skills": skills, "selected": selected}
    return CoTaught(sft, pairs.rows, battles, statistics | {"calls": calls.statistics()})


class _Index:
    """Row and turn of every scene, in their order; sixteen bytes a scene."""

    def __init__(self) -> None:
        self.places, self.turns = array("q"), array("q")

    def add(self, place: int, turn: int) -> None:
        self.places.append(place)
        self.turns.append(turn)


def _scenes(rows: Sequence[Conversation], chats: Spill[list], turns: int) -> Iterator[tuple[int, Scene]]:
    """Every scene with the place of its row: the first turns of all rows, then the second ones, ..."""
    for turn in range(turns):
        for place in range(len(chats)):
            lines = chats[place]
            if turn < len(lines):
                yield place, Scene.from_line(rows[place], lines[turn])


def _chosen(rows: Sequence[Conversation], chats: Spill[list], index: _Index, chosen: Sequence[int]) -> Iterator[Scene]:
    for number in chosen:
        place = index.places[number]
        yield Scene.from_line(rows[place], chats[place][index.turns[number]])


@dataclass(frozen=True)
class _Coach:
    """The agents and settings of one round."""

    calls: Calls
    contestants: Sequence[AnyAgent]
    judges: Judges
    suggester: AnyAgent | None
    rewriter: AnyAgent | None
    user: AnyAgent | None
    chat_turns: int
    temperature: float
    seed: int
    agents: list[AnyAgent] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "agents", [*self.contestants, *panel(self.judges)])

    @property
    def width(self) -> int:
        """Calls that one row can have open at once."""
        contestants = len(self.contestants)
        return max(contestants, 2 * comb(contestants, 2) * len(panel(self.judges)))

    @property
    def calls_of_chat(self) -> int:
        """Calls of one row whose chat has all its turns: answers, verdicts in both orders, further user turns."""
        contestants = len(self.contestants)
        each = contestants + 2 * comb(contestants, 2) * len(panel(self.judges))
        return self.chat_turns * (each + 1) - 1

    @property
    def calls_of_lesson(self) -> int:
        """Calls for one lesson: a suggestion, a rewrite, and verdicts in both orders."""
        return 0 if self.suggester is None else 2 + 2 * len(panel(self.judges))

    async def chat(self, row: Conversation) -> list[Scene]:
        """The scenes of a row, one a turn."""
        scenes = [Scene(row, 0, tuple(row.messages[:-1]))]
        while True:
            scene = scenes[-1]
            seed = derive_seed(self.seed, "battle", scene.turn)
            await hold_battles(
                self.calls, self.contestants, self.judges, scene, temperature=self.temperature, seed=seed
            )
            if scene.turn + 1 == self.chat_turns or not scene.verdicts:
                return scenes
            following = await self._following(scene)
            if following is None:
                return scenes
            scenes.append(following)

    async def _following(self, scene: Scene) -> Scene | None:
        """The chat continued after its best answer, unless the new user turn shows a failure."""
        answer = scene.answers[scene.ranking()[0]]
        chat = (*scene.prompt, Message("assistant", answer))
        seed = derive_seed(self.seed, "user", scene.turn)
        turn = await self.calls.converse(self.user, chat, seed, task="user", row=scene.row.id)
        turn = None if turn is None else read_user(turn)
        if turn is None or detect_failure(turn) is not None:
            return None
        return Scene(scene.row, scene.turn + 1, (*chat, Message("user", turn)))

    def offer(self, pairs: Pairs, scene: Scene) -> None:
        """Offers the best and the worst answer of a scene as a preference row."""
        ranking = scene.ranking() or [0, 0]
        best, worst = ranking[0], ranking[-1]
        verdict = scene.verdict(best, worst)
        if verdict is not None and verdict.gap < 0:
            best, worst, verdict = worst, best, verdict.swapped()
        names = {"winner": self.contestants[best].name, "loser": self.contestants[worst].name, "turn": scene.turn}
        lineage = {"parents": [scene.row.id], "operator": "co_teach", "agent": names_of(self.judges)}
        match = Match(scene.prompt, scene.answers[best] or "", scene.answers[worst] or "")
        marks = self.calls.marks(match.first, match.second)
        pairs.add(match, verdict, scene.attributes() | names | marks, lineage)

    async def lessons(
        self, scenes: Iterator[Scene], total: int, folder: Path | None
    ) -> tuple[Spill[Conversation], int]:
        """The rows of lost scenes, and how many of them follow a suggestion."""
        rows, suggested = row_spill(folder), []

        async def lesson(scene: Scene) -> Conversation:
            target = await self._target(scene)
            suggested.extend([1] if target.suggestion else ())
            return self._lesson(scene, target)

        extra = [agent for agent in (self.suggester, self.rewriter) if agent is not None]
        asked = [*self.agents, *extra]
        stage = {"desc": "lessons", "total": total, "width": 2, "calls": self.calls_of_lesson or 1, "agents": asked}
        await self.calls.scheduler.rows(scenes, lesson, rows.put, **stage)
        return rows, len(suggested)

    async def _target(self, scene: Scene) -> _Target:
        """The winner's answer, or the rewrite of ours if the judge prefers it."""
        winner = scene.loss()[1]
        target = _Target(scene.answers[winner], self.contestants[winner].name, "")
        if self.suggester is None:
            return target
        fields = {"history": dialogue(scene.prompt[:-1]), "instruction": scene.prompt[-1].content}
        fields |= {"answer": scene.answers[0], "better": target.answer, "reference": scene.aids()["reference"]}
        asking, row = derive_seed(self.seed, "suggest"), scene.row.id
        suggestion = await self.calls.ask(self.suggester, "suggest", fields, asking, read=read_suggestion, row=row)
        if suggestion is None:
            return target
        agent = self.rewriter or self.contestants[winner]
        fields = _rewrite_fields(scene, suggestion)
        asking = derive_seed(self.seed, "rewrite")
        text = await self.calls.ask(
            agent, "rewrite", fields, asking, read=lambda text: read_rewritten(text, scene.answers[0]), row=row
        )
        if not text or text == target.answer:
            return target
        match = Match(scene.prompt, text, target.answer, **scene.aids())
        seed = derive_seed(self.seed, "judge rewrite")
        verdict = await judge_match(self.calls, self.judges, match, seed, row=row)
        return _Target(text, agent.name, suggestion) if verdict is not None and verdict.winner == 1 else target

    def _lesson(self, scene: Scene, target: _Target) -> Conversation:
        gap, rival = scene.loss()
        attributes = {
            **scene.attributes(),
            "gap": gap,
            "rival": self.contestants[rival].name,
            "answer_score": scene.score(rival),
            "turn": scene.turn,
            **self.calls.marks(target.answer),
        }
        lineage = {"parents": [scene.row.id], "operator": "co_teach", "agent": target.agent}
        if target.suggestion:
            lineage["suggestion"] = target.suggestion
        messages = (*scene.prompt, Message("assistant", target.answer))
        return Conversation(messages, attributes, lineage, kept_weights(scene.row, messages))


def _rewrite_fields(scene: Scene, suggestion: str) -> dict[str, str]:
    instruction = scene.prompt[-1].content
    answer = scene.answers[0]
    told = {"history": dialogue(scene.prompt[:-1]), "reference": scene.aids()["reference"]}
    return {"operator": "correctness", "suggestion": suggestion, "instruction": instruction, "answer": answer, **told}


def _validate(
    contestants: Sequence[AnyAgent],
    judges: Judges,
    sft_threshold: float,
    dpo_threshold: float,
    chat_turns: int,
    user: AnyAgent | None,
) -> None:
    check_judges(judges)
    names = [contestant.name for contestant in contestants]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"rivals: expected at least one, and names that differ, got {', '.join(names)}; rename or add")
    if sft_threshold < 0 or dpo_threshold < 0:
        raise ValueError(f"thresholds: expected 0 or more, got {sft_threshold}, {dpo_threshold}; give points of score")
    if chat_turns < 1 or (chat_turns > 1 and user is None):
        raise ValueError(f"chat_turns: expected 1, or more with a user agent, got {chat_turns}; give --agents.user")

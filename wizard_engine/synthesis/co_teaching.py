"""Co-teaching: models answer the same turns, a judge compares every pair, and ours learns from the battles it lost.

The concrete algorithm is Arena Learning (Luo et al. 2024, arXiv:2407.10627): every pair battles, each battle is judged
in both orders, rows where ours loses by more than K become supervised lessons, winner and loser of a row become a
preference row. There K was 3.0 for supervised and 2.0 for preference rows in the first round, and 1.0 for supervised
ones later. Simulated chat, improvement suggestions and closing the skill gap are named in the WizardLM-2 report; their
form here is this project's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from wizard_engine.agents.protocol import Agent
from wizard_engine.data.records import Conversation, Message, Preference, kept_weights

from .battles import Scene, battle_records, battle_tables, hold_battles
from .calls import JUDGE_TOKENS, Calls, OnLength, as_read, derive_seed
from .elimination import detect_failure
from .evol_answer import strip_meta
from .judging import Match, judge_matches
from .lessons import choose_lessons
from .pairs import Pairs, instruction_attributes


@dataclass(frozen=True)
class CoTaught:
    """Result of a round of co-teaching.

    Attributes:
        sft: the lessons, in the order of their scenes, with gap, rival, skill quota and suggestion in attributes and
        lineage.
        preferences: best and worst answer of a scene, with their score gap.
        battles: one object a battle: row, turn, a, b (agent names), score_a, score_b, gap, winner ("a", "b" or "tie"),
            is_flipped, identical.
        statistics: "rivals", "topics", "difficulties" (see battles.battle_tables), "skills" (see lessons), "flip_rate",
            "missing" (battles without answers or verdict; they are in no table),
            "selected" (scenes, lessons and pairs, with the reasons for dropping), "calls".
    """

    sft: list[Conversation]
    preferences: list[Preference]
    battles: list[dict[str, Any]]
    statistics: dict[str, Any]


class _Target(NamedTuple):
    """The answer of a lesson, its author, and the suggestion it follows ("" for a rival's original answer)."""

    answer: str
    agent: str
    suggestion: str


def co_teach(
    rows: Sequence[Conversation],
    *,
    ours: Agent,
    rivals: Sequence[Agent],
    judge: Agent,
    suggester: Agent | None = None,
    rewriter: Agent | None = None,
    user: Agent | None = None,
    sft_threshold: float = 3.0,
    dpo_threshold: float = 2.0,
    chat_turns: int = 1,
    lessons: int | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    max_tokens: int = 256,
    judge_max_tokens: int = JUDGE_TOKENS,
    on_length: OnLength = "drop",
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

    Args:
        rows: only their turns up to the last user turn are used.
        ours: the student; rivals must have other names.
        judge: task "judge".   suggester: "suggest".   rewriter: "rewrite".   user: "user".
        sft_threshold, dpo_threshold: K, points of score.
        chat_turns: user turns of each chat that are judged.
        lessons: most lessons; None for all.
        temperature: of the contestants' answers.
        max_tokens: longest reply.
        judge_max_tokens: longest verdict.   on_length: "drop" or "keep" answers that were cut (see Calls).
    Raises:
        ValueError: no rivals, equal names, a threshold below 0, chat_turns below 1, or no `user` for a longer chat.
    """
    contestants = [ours, *rivals]
    _validate(contestants, sft_threshold, dpo_threshold, chat_turns, user)
    calls, pairs = (
        Calls(max_tokens=max_tokens, judge_max_tokens=judge_max_tokens, on_length=on_length),
        Pairs(dpo_threshold),
    )
    scenes: list[Scene] = []
    current = [Scene(row, 0, tuple(row.messages[:-1])) for row in rows]
    for turn in range(chat_turns):
        if turn:
            current = _continue(calls, user, current, derive_seed(seed, "user", turn - 1))
        battle_seed = derive_seed(seed, "battle", turn)
        hold_battles(calls, contestants, judge, current, temperature=temperature, seed=battle_seed)
        scenes += current
    for scene in scenes:
        _add_pair(calls, pairs, scene, contestants, judge)
    chosen, skills = choose_lessons([(scene.row, scene.loss()[0]) for scene in scenes], sft_threshold, lessons)
    taught = [scenes[index] for index in chosen]
    targets = _targets(calls, contestants, judge, suggester, rewriter, taught, seed)
    sft = [_lesson(calls, scene, target, contestants) for scene, target in zip(taught, targets)]
    battles = battle_records(scenes, [contestant.name for contestant in contestants])
    selected = {
        "scenes": len(scenes),
        "candidates": sum(line["candidates"] for line in skills.values()),
        "lessons": len(sft),
        "lessons_from_suggestions": sum(bool(target.suggestion) for target in targets),
        "pairs": pairs.statistics(),
        "pairs_won_by_ours": sum(pair.attributes["winner"] == ours.name for pair in pairs.rows),
    }
    tables = battle_tables(battles, rows, ours.name)
    tables["missing"] = len(scenes) * len(list(combinations(contestants, 2))) - len(battles)
    statistics = {**tables, "skills": skills, "selected": selected, "calls": calls.statistics()}
    return CoTaught(sft, pairs.rows, battles, statistics)


def _continue(calls: Calls, user: Agent | None, scenes: Sequence[Scene], seed: int) -> list[Scene]:
    """The next scenes: each chat continues after its best answer, unless the new user turn shows a failure."""
    going = [(scene, scene.answers[scene.ranking()[0]]) for scene in scenes if scene.verdicts]
    chats = [(*scene.prompt, Message("assistant", answer)) for scene, answer in going]
    turns = calls.converse(user, chats, seed, task="user")
    return [
        Scene(scene.row, scene.turn + 1, (*chat, Message("user", turn)))
        for (scene, _), chat, turn in zip(going, chats, turns)
        if turn is not None and detect_failure(turn) is None
    ]


def _add_pair(calls: Calls, pairs: Pairs, scene: Scene, contestants: Sequence[Agent], judge: Agent) -> None:
    """Offers the best and the worst answer of a scene as a preference row."""
    ranking = scene.ranking() or [0, 0]
    best, worst = ranking[0], ranking[-1]
    verdict = scene.verdict(best, worst)
    if verdict is not None and verdict.gap < 0:
        best, worst, verdict = worst, best, verdict.swapped()
    names = {"winner": contestants[best].name, "loser": contestants[worst].name, "turn": scene.turn}
    lineage = {"parents": [scene.row.id], "operator": "co_teach", "agent": judge.name}
    match = Match(scene.prompt, scene.answers[best] or "", scene.answers[worst] or "")
    marks = calls.marks(match.first, match.second)
    pairs.add(match, verdict, instruction_attributes(scene.row) | names | marks, lineage)


def _targets(
    calls: Calls,
    contestants: Sequence[Agent],
    judge: Agent,
    suggester: Agent | None,
    rewriter: Agent | None,
    scenes: Sequence[Scene],
    seed: int,
) -> list[_Target]:
    """Target of each lesson: the winner's answer, or the rewrite of ours if the judge prefers it."""
    winners = [scene.loss()[1] for scene in scenes]
    targets = [_Target(scene.answers[w], contestants[w].name, "") for scene, w in zip(scenes, winners)]
    if suggester is None:
        return targets
    fields = [
        {"instruction": scene.prompt[-1].content, "answer": scene.answers[0], "better": target.answer}
        for scene, target in zip(scenes, targets)
    ]
    suggestions = calls.ask(suggester, "suggest", fields, derive_seed(seed, "suggest"), read=as_read)
    agents = [rewriter or contestants[w] for w in winners]
    rewrites = _rewrite(calls, agents, scenes, suggestions, derive_seed(seed, "rewrite"))
    usable = [i for i, text in enumerate(rewrites) if text and text != targets[i].answer]
    matches = [Match(scenes[i].prompt, rewrites[i], targets[i].answer) for i in usable]
    for i, verdict in zip(usable, judge_matches(calls, judge, matches, derive_seed(seed, "judge rewrite"))):
        if verdict is not None and verdict.winner == 1:
            targets[i] = _Target(rewrites[i], agents[i].name, suggestions[i])
    return targets


def _rewrite(
    calls: Calls, agents: Sequence[Agent], scenes: Sequence[Scene], suggestions: Sequence[str | None], seed: int
) -> list[str | None]:
    """The answers of ours, rewritten by the agents according to the suggestions; one batch an agent."""
    texts: list[str | None] = [None] * len(scenes)
    for agent in {agent.name: agent for agent in agents}.values():
        indices = [i for i, other in enumerate(agents) if other.name == agent.name and suggestions[i] is not None]
        fields = [_rewrite_fields(scenes[i], suggestions[i]) for i in indices]
        for i, text in zip(indices, calls.ask(agent, "rewrite", fields, seed, read=as_read)):
            texts[i] = None if text is None else strip_meta(text)
    return texts


def _rewrite_fields(scene: Scene, suggestion: str) -> dict[str, str]:
    instruction = scene.prompt[-1].content
    answer = scene.answers[0]
    return {"operator": "correctness", "suggestion": suggestion, "instruction": instruction, "answer": answer}


def _lesson(calls: Calls, scene: Scene, target: _Target, contestants: Sequence[Agent]) -> Conversation:
    gap, rival = scene.loss()
    attributes = {
        **instruction_attributes(scene.row),
        "gap": gap,
        "rival": contestants[rival].name,
        "answer_score": scene.score(rival),
        "turn": scene.turn,
        **calls.marks(target.answer),
    }
    lineage = {"parents": [scene.row.id], "operator": "co_teach", "agent": target.agent}
    if target.suggestion:
        lineage["suggestion"] = target.suggestion
    messages = (*scene.prompt, Message("assistant", target.answer))
    return Conversation(messages, attributes, lineage, kept_weights(scene.row, messages))


def _validate(
    contestants: Sequence[Agent], sft_threshold: float, dpo_threshold: float, chat_turns: int, user: Agent | None
) -> None:
    names = [contestant.name for contestant in contestants]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"rivals: expected at least one, and names that differ, got {', '.join(names)}; rename or add")
    if sft_threshold < 0 or dpo_threshold < 0:
        raise ValueError(f"thresholds: expected 0 or more, got {sft_threshold}, {dpo_threshold}; give points of score")
    if chat_turns < 1 or (chat_turns > 1 and user is None):
        raise ValueError(f"chat_turns: expected 1, or more with a user agent, got {chat_turns}; give --agents.user")

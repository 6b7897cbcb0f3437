"""Evol-Instruct: instructions made harder round by round, with elimination and a pool.

Source: Xu et al. 2023, arXiv:2304.12244 (operators, elimination, pool); multi-turn rows follow Auto Evol-Instruct
(Zeng et al. 2024, arXiv:2406.00770): every user turn is evolved separately, its answer given in the evolved context.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Agent
from wizard_engine.agents.replies import read_equal, read_evolved
from wizard_engine.data.records import Conversation, Message, kept_weights

from .calls import JUDGE_TOKENS, Calls, OnLength, derive_seed
from .elimination import instruction_fault, response_fault

OPERATORS = ("constraint", "deepen", "concretise", "steps", "complicate", "breadth")
# Attributes that an evolved row inherits. A breadth evolution has a new topic; the others describe the parent alone.
KEPT_IN_DEPTH = ("source", "topic", "language")
KEPT_IN_BREADTH = ("source", "language")


@dataclass(frozen=True)
class Evolved:
    """Result of a run of Evol-Instruct.

    Attributes:
        rows: the input rows, then the evolved ones by round, in the order of their parents.
        eliminated: one object a failed evolution: parent, round, turn, operator, reason, instruction, response.
        statistics: "operators" (operator -> tried, kept, and every reason), "rounds" (per round: pool, kept), "calls".
    """

    rows: list[Conversation]
    eliminated: list[dict[str, Any]]
    statistics: dict[str, Any]


@dataclass
class _Line:
    """A row during one round: `messages` are the finished turns, `is_open` while more may follow."""

    row: Conversation
    turns: list[Message]
    messages: list[Message] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    is_changed: bool = False
    is_open: bool = True


@dataclass
class _Attempt:
    """One user turn being evolved."""

    line: _Line
    turn: int
    operator: str
    parent: str
    evolved: str | None = None
    response: str | None = None
    reason: str | None = None


def evolve_instructions(
    rows: Sequence[Conversation],
    *,
    evolver: Agent,
    answerer: Agent,
    judge: Agent,
    rounds: int = 1,
    operators: Sequence[str] = OPERATORS,
    method: str = "",
    seed: int = 0,
    temperature: float = 0.0,
    max_tokens: int = 256,
    judge_max_tokens: int = JUDGE_TOKENS,
    on_length: OnLength = "drop",
) -> Evolved:
    """The rows and their evolutions.

    In every round each row of the pool is evolved once, by an operator drawn for the row and the round. A success
    replaces its parent in the pool; after a failure the parent stays for the next round. An evolution fails if its
    instruction is blank, equal to its parent, already known, or has template words; if the judge finds it equal to its
    parent; if its response refuses, is empty or shows a failure (elimination.response_fault); or if a call fails. In a
    multi-turn row, failed turns keep their text, and are answered again if an earlier turn changed. The conversation
    ends before a turn without a good answer.

    Args:
        rows: rows with any number of turns.
        evolver: does task "evolve".   answerer: task "answer".   judge: task "compare".
        method: text of an evolving method (see optimise_method); "" for that of the prompt.
        temperature: of the evolver.
        max_tokens: longest reply.
        judge_max_tokens: longest verdict.   on_length: "drop" or "keep" answers that were cut (see Calls).
    Raises:
        ValueError: an unknown operator, or a negative number of rounds.
    """
    _validate(operators, rounds)
    calls = Calls(max_tokens=max_tokens, judge_max_tokens=judge_max_tokens, on_length=on_length)
    run = _Run(calls, evolver, answerer, judge, tuple(operators), method, seed, temperature)
    pool, made, per_round = list(rows), [], []
    run.known = {_signature(m.content) for row in rows for m in row.messages if m.role == "user"}
    for number in range(1, rounds + 1):
        children = run.round(pool, number)
        made += [child for child in children if child is not None]
        per_round.append({"pool": len(pool), "kept": sum(child is not None for child in children)})
        pool = [row if child is None else child for row, child in zip(pool, children)]
    statistics = {
        "operators": {name: dict(run.counts[name]) for name in operators},
        "rounds": per_round,
        "calls": calls.statistics(),
    }
    return Evolved([*rows, *made], run.eliminated, statistics)


@dataclass
class _Run:
    """The agents, settings and records of one call of evolve_instructions."""

    calls: Calls
    evolver: Agent
    answerer: Agent
    judge: Agent
    operators: tuple[str, ...]
    method: str
    seed: int
    temperature: float
    known: set[str] = field(default_factory=set)
    eliminated: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = {name: Counter(tried=0, kept=0) for name in self.operators}

    def round(self, pool: Sequence[Conversation], number: int) -> list[Conversation | None]:
        """The child of each row of the pool, None if no turn was evolved."""
        lines = [_Line(row, [m for m in row.messages if m.role != "system"]) for row in pool]
        for line in lines:
            line.messages += [m for m in line.row.messages if m.role == "system"]
        for turn in range(max((len(line.turns) // 2 for line in lines), default=0)):
            active = [line for line in lines if line.is_open and len(line.turns) > 2 * turn]
            attempts = [self._attempt(line, turn, number) for line in active]
            self._evolve(attempts, number)
            self._answer(attempts, number)
            self._settle(attempts, number)
        return [self._child(line, number) for line in lines]

    def _attempt(self, line: _Line, turn: int, number: int) -> _Attempt:
        rng = random.Random(derive_seed(self.seed, "operator", line.row.id, turn, number))
        return _Attempt(line, turn, rng.choice(self.operators), line.turns[2 * turn].content)

    def _evolve(self, attempts: list[_Attempt], number: int) -> None:
        """Sets the new instructions and their faults."""
        fields = [{"operator": a.operator, "method": self.method, "instruction": a.parent} for a in attempts]
        seed = derive_seed(self.seed, "evolve", number)
        texts = self.calls.ask(
            self.evolver, "evolve", fields, seed, read=lambda text, _: read_evolved(text), temperature=self.temperature
        )
        seen = set(self.known)
        for attempt, text in zip(attempts, texts):
            attempt.evolved = text
            attempt.reason = "call failed" if text is None else instruction_fault(attempt.parent, text)
            if attempt.reason is None and _signature(text) in seen:
                attempt.reason = "already known"
            seen.add(_signature(text or ""))
        self._compare([a for a in attempts if a.reason is None])

    def _compare(self, attempts: list[_Attempt]) -> None:
        fields = [{"first": a.parent, "second": a.evolved} for a in attempts]
        verdicts = self.calls.ask(self.judge, "compare", fields, self.seed, read=lambda text, _: read_equal(text))
        for attempt, equal in zip(attempts, verdicts):
            if equal is not False:
                attempt.reason = "call failed" if equal is None else "no information gain"

    def _answer(self, attempts: list[_Attempt], number: int) -> None:
        """Sets the responses to the new instructions and their faults."""
        asked = [a for a in attempts if a.reason is None]
        contexts = [[*a.line.messages, Message("user", a.evolved)] for a in asked]
        responses = self.calls.converse(self.answerer, contexts, derive_seed(self.seed, "answer", number))
        for attempt, response in zip(asked, responses):
            attempt.response = response
            attempt.reason = "call failed" if response is None else response_fault(response)

    def _settle(self, attempts: list[_Attempt], number: int) -> None:
        """Counts every attempt and appends the turn, evolved or unchanged, to its line."""
        renewed = self._answer_anew([a for a in attempts if a.reason is not None and a.line.is_changed], number)
        for attempt in attempts:
            self._count(attempt, number)
            line, instruction = attempt.line, attempt.parent
            answer = renewed.get(id(attempt), line.turns[2 * attempt.turn + 1].content)
            if attempt.reason is None:
                instruction, answer = attempt.evolved, attempt.response
                line.operators.append(attempt.operator)
                line.is_changed = True
                self.known.add(_signature(instruction))
            if answer is None:
                line.is_open = False
            else:
                line.messages += [Message("user", instruction), Message("assistant", answer)]

    def _answer_anew(self, attempts: list[_Attempt], number: int) -> dict[int, str | None]:
        """Answers to unchanged turns in a changed context; None if the answer shows a fault."""
        contexts = [[*a.line.messages, Message("user", a.parent)] for a in attempts]
        answers = self.calls.converse(self.answerer, contexts, derive_seed(self.seed, "answer", number))
        good = [None if answer is None or response_fault(answer) else answer for answer in answers]
        return {id(attempt): answer for attempt, answer in zip(attempts, good)}

    def _count(self, attempt: _Attempt, number: int) -> None:
        counts = self.counts[attempt.operator]
        counts["tried"] += 1
        counts[attempt.reason or "kept"] += 1
        if attempt.reason is not None:
            self.eliminated.append(
                {
                    "parent": attempt.line.row.id,
                    "round": number,
                    "turn": attempt.turn,
                    "operator": attempt.operator,
                    "reason": attempt.reason,
                    "instruction": attempt.evolved,
                    "response": attempt.response,
                }
            )

    def _child(self, line: _Line, number: int) -> Conversation | None:
        if not line.is_changed:
            return None
        inherited = KEPT_IN_BREADTH if "breadth" in line.operators else KEPT_IN_DEPTH
        attributes = {name: line.row.attributes[name] for name in inherited if name in line.row.attributes}
        lineage = {
            "parents": [line.row.id],
            "operator": "+".join(line.operators),
            "agent": self.evolver.name,
            "answerer": self.answerer.name,
            "round": number,
        }
        attributes["evolutions"] = line.row.attributes.get("evolutions", 0) + 1
        attributes |= self.calls.marks(*(m.content for m in line.messages if m.role == "assistant"))
        messages = tuple(line.messages)
        return Conversation(messages, attributes, lineage, kept_weights(line.row, messages))


def _signature(text: str) -> str:
    return prompts.flatten(text).casefold()


def _validate(operators: Sequence[str], rounds: int) -> None:
    unknown = [name for name in operators if name not in prompts.operators("evolve")]
    if unknown or not operators:
        known = ", ".join(prompts.operators("evolve"))
        raise ValueError(f"operators: expected some of {known}, got {', '.join(unknown) or 'none'}; choose from them")
    if rounds < 0:
        raise ValueError(f"rounds: expected 0 or more, got {rounds}; give how often the pool is evolved")

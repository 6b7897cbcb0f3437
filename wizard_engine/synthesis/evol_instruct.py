"""Evol-Instruct: instructions made harder round by round, with elimination and a pool.

Source: Xu et al. 2023, arXiv:2304.12244 (operators, elimination, pool); multi-turn rows follow Auto Evol-Instruct
(Zeng et al. 2024, arXiv:2406.00770): every user turn is evolved separately, its answer given in the evolved context.
"""

import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from wizard_engine.agents import prompts
from wizard_engine.agents.calls import AnyAgent, Calls, Limits, OnLength, derive_seed
from wizard_engine.agents.replies import read_equal, read_evolved
from wizard_engine.agents.scheduler import InOrder, Scheduler
from wizard_engine.data.records import Conversation, Message, kept_weights
from wizard_engine.data.rows import row_from_line, row_to_line
from wizard_engine.runtime.spill import Spill

from .elimination import instruction_fault, response_fault
from .pairs import row_spill

OPERATORS = ("constraint", "deepen", "concretise", "steps", "complicate", "breadth")
# Attributes that an evolved row inherits. A breadth evolution has a new topic; the others describe the parent alone.
KEPT_IN_DEPTH = ("source", "topic", "language")
KEPT_IN_BREADTH = ("source", "language")
# Rows worked on for each call that can run at once: more than elsewhere, because a row waits for the evolutions of the
# rows before it to see whether its own is new.
_AHEAD = 16


@dataclass(frozen=True)
class Evolved:
    """Result of a run of Evol-Instruct, kept on disk.

    Attributes:
        made: the evolved rows by round, in the order of their parents.
        eliminated: one object a failed evolution: parent, round, turn, operator, reason, instruction, response.
        statistics: "operators" (operator -> tried, kept, and every reason), "rounds" (per round: pool, kept), "calls".
    """

    made: Spill[Conversation]
    eliminated: Spill[dict[str, Any]]
    statistics: dict[str, Any]


@dataclass
class _Line:
    """A row during one round: `messages` are the finished turns, `is_open` while more may follow."""

    row: Conversation
    turns: list[Message]
    messages: list[Message] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    attempts: list["_Attempt"] = field(default_factory=list)
    is_changed: bool = False
    is_open: bool = True


@dataclass
class _Attempt:
    """One user turn being evolved."""

    turn: int
    operator: str
    parent: str
    evolved: str | None = None
    response: str | None = None
    reason: str | None = None


def evolve_instructions(
    rows: Sequence[Conversation],
    *,
    evolver: AnyAgent,
    answerer: AnyAgent,
    judge: AnyAgent,
    rounds: int = 1,
    operators: Sequence[str] = OPERATORS,
    method: str = "",
    seed: int = 0,
    temperature: float = 0.0,
    limits: Limits | None = None,
    on_length: OnLength = "drop",
    top_p: float = 1.0,
    scheduler: Scheduler | None = None,
    folder: Path | None = None,
) -> Evolved:
    """The evolutions of rows.

    In every round each row of the pool is evolved once, by an operator drawn for the row and the round. A success
    replaces its parent in the pool; after a failure the parent stays for the next round. An evolution fails if its
    instruction is blank, equal to its parent, already known, or has template words; if the judge finds it equal to its
    parent; if its response refuses, is empty or shows a failure (elimination.response_fault); or if a call fails. In a
    multi-turn row, failed turns keep their text, and are answered again if an earlier turn changed. The conversation
    ends before a turn without a good answer.

    An instruction is known if it is in the pool, was made in an earlier round, or was made from an earlier row for the
    same turn of this round. Rows go through a round at the same time; a round begins when the one before has ended.

    Args:
        rows: rows with any number of turns.
        evolver: does task "evolve".   answerer: task "answer".   judge: task "compare".
        method: text of an evolving method (see optimise_method); "" for that of the prompt.
        temperature: of the evolver.
        limits: longest replies.   on_length: "drop" or "keep" answers that were cut.   top_p: of all calls (see Calls).
        scheduler: of the calls; None for one without a ledger.   folder: of temporary files (see runtime.spill).
    Raises:
        ValueError: an unknown operator, or a negative number of rounds.
    """
    _validate(operators, rounds)
    calls = Calls(scheduler, limits=limits, on_length=on_length, top_p=top_p)
    run = _Run(calls, evolver, answerer, judge, tuple(operators), method, seed, temperature)
    return calls.scheduler.run(_evolved(run, rows, rounds, folder))


async def _evolved(run: "_Run", rows: Sequence[Conversation], rounds: int, folder: Path | None) -> Evolved:
    pool: Sequence[Conversation] = rows
    made, eliminated, per_round = row_spill(folder), Spill(folder), []
    turns = max((_num_turns(row) for row in rows), default=0)
    run.known = {_signature(m.content) for row in rows for m in row.messages if m.role == "user"}
    for number in range(1, rounds + 1):
        children: Spill[tuple] = Spill(folder, dump=_to_line, load=_from_line)
        await run.round(pool, number, turns, children)
        for line in _turn_by_turn(children, turns):
            run.count(line, eliminated)
        before = len(made)
        pool = _renewed(run.calls, pool, children, made, folder)
        per_round.append({"pool": len(pool), "kept": len(made) - before})
    statistics = {
        "operators": {name: dict(run.counts[name]) for name in run.operators},
        "rounds": per_round,
        "calls": run.calls.statistics(),
    }
    return Evolved(made, eliminated, statistics)


def _turn_by_turn(children: Spill[tuple], turns: int) -> Iterator[dict[str, Any]]:
    """The attempts of a round: those on first turns in the order of their rows, then those on second ones, ..."""
    for turn in range(turns):
        for _, attempts in children:
            yield from (attempt for attempt in attempts if attempt["turn"] == turn)


def _renewed(
    calls: Calls,
    pool: Sequence[Conversation],
    children: Spill[tuple],
    made: Spill[Conversation],
    folder: Path | None,
) -> Spill[Conversation]:
    """The pool of the next round; the children are added to `made`.

    Answers that were cut are marked here, when all replies of the round are known, whatever order they came in.
    """
    renewed = row_spill(folder)
    for row, (child, _) in zip(pool, children):
        if child is not None:
            marks = calls.marks(*(message.content for message in child.messages if message.role == "assistant"))
            child = child.replace(attributes=child.attributes | marks)
            made.append(child)
        renewed.append(row if child is None else child)
    return renewed


def _to_line(item: tuple[Conversation | None, list[dict[str, Any]]]) -> list[Any]:
    child, attempts = item
    return [None if child is None else row_to_line(child), attempts]


def _from_line(value: list[Any]) -> tuple[Conversation | None, list[dict[str, Any]]]:
    child, attempts = value
    return None if child is None else row_from_line(child), attempts


@dataclass
class _Run:
    """The agents, settings and records of one call of evolve_instructions."""

    calls: Calls
    evolver: AnyAgent
    answerer: AnyAgent
    judge: AnyAgent
    operators: tuple[str, ...]
    method: str
    seed: int
    temperature: float
    known: set[int] = field(default_factory=set)
    counts: dict[str, Counter[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = {name: Counter(tried=0, kept=0) for name in self.operators}

    async def round(self, pool: Sequence[Conversation], number: int, turns: int, children: Spill[tuple]) -> None:
        """Puts the child of each row of the pool, None if no turn was evolved, and its attempts."""
        news = [_News(set()) for _ in range(turns)]

        async def evolved(item: tuple[int, Conversation]) -> tuple[Conversation | None, list[dict[str, Any]]]:
            place, row = item
            line = await self._line(place, row, number, news)
            return self._child(line, number), [self._described(line, attempt, number) for attempt in line.attempts]

        await self.calls.scheduler.rows(
            enumerate(pool),
            evolved,
            children.put,
            desc=f"round {number}",
            total=len(pool),
            # A new instruction, whether it is new, and its answer.
            calls=3 * turns,
            ahead=_AHEAD,
            agents=[self.evolver, self.answerer, self.judge],
        )
        self.known.update(chain.from_iterable(new.kept for new in news))

    async def _line(self, place: int, row: Conversation, number: int, news: Sequence["_News"]) -> _Line:
        """A row with its turns evolved one after another."""
        line = _Line(row, [m for m in row.messages if m.role != "system"])
        line.messages += [m for m in row.messages if m.role == "system"]
        for turn, new in enumerate(news):
            if line.is_open and len(line.turns) > 2 * turn:
                await self._turn(line, turn, number, place, new)
            else:
                new.order.leave(place)
        return line

    async def _turn(self, line: _Line, turn: int, number: int, place: int, new: "_News") -> None:
        attempt = self._attempt(line, turn, number)
        line.attempts.append(attempt)
        await self._evolve(line, attempt, number)
        await new.order.reach(place)
        if attempt.reason is None and self._is_known(attempt.evolved, new):
            attempt.reason = "already known"
        new.seen.add(_signature(attempt.evolved or ""))
        new.order.leave(place)
        if attempt.reason is None:
            await self._compare(line, attempt)
        if attempt.reason is None:
            await self._answer(line, attempt, number)
        await self._settle(line, attempt, number)
        if attempt.reason is None:
            new.kept.append(_signature(attempt.evolved))

    def _attempt(self, line: _Line, turn: int, number: int) -> _Attempt:
        rng = random.Random(derive_seed(self.seed, "operator", line.row.id, turn, number))
        return _Attempt(turn, rng.choice(self.operators), line.turns[2 * turn].content)

    async def _evolve(self, line: _Line, attempt: _Attempt, number: int) -> None:
        """Sets the new instruction and its fault."""
        fields = {"operator": attempt.operator, "method": self.method, "instruction": attempt.parent}
        seed = derive_seed(self.seed, "evolve", number)
        attempt.evolved = await self.calls.ask(
            self.evolver, "evolve", fields, seed, read=read_evolved, temperature=self.temperature, row=line.row.id
        )
        is_made = attempt.evolved is not None
        attempt.reason = instruction_fault(attempt.parent, attempt.evolved) if is_made else "call failed"

    def _is_known(self, text: str, new: "_News") -> bool:
        signature = _signature(text)
        return signature in self.known or signature in new.seen

    async def _compare(self, line: _Line, attempt: _Attempt) -> None:
        fields = {"first": attempt.parent, "second": attempt.evolved}
        is_equal = await self.calls.ask(self.judge, "compare", fields, self.seed, read=read_equal, row=line.row.id)
        if is_equal is not False:
            attempt.reason = "call failed" if is_equal is None else "no information gain"

    async def _answer(self, line: _Line, attempt: _Attempt, number: int) -> None:
        """Sets the response to the new instruction and its fault."""
        attempt.response = await self._response(line, attempt.evolved, number)
        attempt.reason = "call failed" if attempt.response is None else response_fault(attempt.response)

    async def _response(self, line: _Line, instruction: str, number: int) -> str | None:
        context = [*line.messages, Message("user", instruction)]
        seed = derive_seed(self.seed, "answer", number)
        return await self.calls.converse(self.answerer, context, seed, longer=True, row=line.row.id)

    async def _settle(self, line: _Line, attempt: _Attempt, number: int) -> None:
        """Appends the turn, evolved or unchanged, to the line; in a changed context an old turn is answered anew."""
        instruction, answer = attempt.parent, line.turns[2 * attempt.turn + 1].content
        if attempt.reason is None:
            instruction, answer = attempt.evolved, attempt.response
            line.operators.append(attempt.operator)
            line.is_changed = True
        elif line.is_changed:
            answer = await self._response(line, attempt.parent, number)
            if answer is None or response_fault(answer):
                line.is_open = False
                return
        line.messages += [Message("user", instruction), Message("assistant", answer)]

    def _described(self, line: _Line, attempt: _Attempt, number: int) -> dict[str, Any]:
        return {
            "parent": line.row.id,
            "round": number,
            "turn": attempt.turn,
            "operator": attempt.operator,
            "reason": attempt.reason,
            "instruction": attempt.evolved,
            "response": attempt.response,
        }

    def count(self, attempt: dict[str, Any], eliminated: Spill[dict[str, Any]]) -> None:
        """Counts an attempt; a failed one is kept."""
        counts = self.counts[attempt["operator"]]
        counts["tried"] += 1
        counts[attempt["reason"] or "kept"] += 1
        if attempt["reason"] is not None:
            eliminated.append(attempt)

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
        messages = tuple(line.messages)
        return Conversation(messages, attributes, lineage, kept_weights(line.row, messages))


@dataclass
class _News:
    """The instructions made for one turn in one round: those of the rows that passed so far, and those kept."""

    seen: set[int]
    kept: array = field(default_factory=lambda: array("Q"))
    order: InOrder = field(default_factory=InOrder)


def _num_turns(row: Conversation) -> int:
    return sum(message.role != "system" for message in row.messages) // 2


def _signature(text: str) -> int:
    """A number of 64 bits that texts share if they differ in blanks and letter case alone."""
    return int.from_bytes(
        blake2b(prompts.flatten(text).casefold().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    )


def _validate(operators: Sequence[str], rounds: int) -> None:
    unknown = [name for name in operators if name not in prompts.operators("evolve")]
    if unknown or not operators:
        known = ", ".join(prompts.operators("evolve"))
        raise ValueError(f"operators: expected some of {known}, got {', '.join(unknown) or 'none'}; choose from them")
    if rounds < 0:
        raise ValueError(f"rounds: expected 0 or more, got {rounds}; give how often the pool is evolved")

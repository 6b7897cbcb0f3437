"""Auto Evol-Instruct: improves the evolving method by analysis of its failures and selection on a dev set.

Source: Zeng et al. 2024, arXiv:2406.00770, with pool 2,000 rows, mini-batch 10, dev set 50, 10 steps, 5 candidates,
optimizer temperature 0.6, evolver temperature 0; more than about 12 steps make the method worse.
"""

import asyncio
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from wizard_engine.agents import prompts
from wizard_engine.agents.calls import AnyAgent, Calls, Limits, derive_seed
from wizard_engine.agents.replies import read_evolved, read_method, read_reply
from wizard_engine.agents.scheduler import Scheduler
from wizard_engine.data.records import Conversation, Message

from .elimination import detect_failure, instruction_fault

CALL_FAILED = "call failed"
IN_DEPTH = ("constraint", "deepen", "concretise", "steps", "complicate")


@dataclass(frozen=True)
class Optimised:
    """Result of optimise_method.

    Attributes:
        method: text of the method with the lowest failure rate.
        history: one object a step: step, failure_rate (of the method in force after it), reasons, accepted, and the
            candidates with feedback, method, failure_rate and reasons each. Step 0 is the initial method.
        stopped: "no improvement", "no failures" or "step limit".
        statistics: calls by task.
    """

    method: str
    history: list[dict[str, Any]]
    stopped: str
    statistics: dict[str, Any]


def optimise_method(
    rows: Sequence[Conversation],
    *,
    evolver: AnyAgent,
    optimizer: AnyAgent,
    answerer: AnyAgent,
    method: str = "",
    steps: int = 10,
    candidates: int = 5,
    minibatch: int = 10,
    dev_size: int = 50,
    rounds: int = 1,
    operators: Sequence[str] = IN_DEPTH,
    optimizer_temperature: float = 0.6,
    seed: int = 0,
    limits: Limits | None = None,
    top_p: float = 1.0,
    scheduler: Scheduler | None = None,
) -> Optimised:
    """An evolving method with a lower failure rate than the initial one.

    In each step a mini-batch is evolved `rounds` times and answered. The optimizer analyses this trajectory
    `candidates` times and turns each analysis into a new method. The candidate with the lowest failure rate on the dev
    set replaces the method if it fails less often; otherwise the search ends. The failure rate is the fraction of dev
    rows whose response `detect_failure` reports, or that have no evolved instruction (blank, equal to its parent,
    template words). Rows whose calls failed are not in it; they are counted as missing.

    Args:
        rows: their last instructions are used; dev set and mini-batches are drawn from them and never overlap.
        method: the method to start from; "" for prompts.initial_method().
        operators: one is drawn for each row.
        optimizer_temperature: of its analyses and methods, so that candidates differ.
        limits: longest replies.   top_p: of all calls (see Calls).
        scheduler: of the calls; None for one without a ledger.
    Raises:
        ValueError: fewer distinct instructions than dev_size + minibatch, or a size below 1.
    """
    texts = _Instructions.distinct(rows)
    _validate(len(texts), steps, candidates, minibatch, dev_size, rounds)
    order = random.Random(derive_seed(seed, "dev set")).sample(range(len(texts)), len(texts))
    dev, pool = list(texts.chosen(order[:dev_size])), texts.chosen(order[dev_size:])
    calls = Calls(scheduler, limits=limits, top_p=top_p)
    search = _Search(calls, evolver, optimizer, answerer, tuple(operators), seed, optimizer_temperature, rounds)
    sizes = _Sizes(steps, candidates, minibatch)
    return calls.scheduler.run(search.run(method or prompts.initial_method(), dev, pool, sizes))


class _Instructions(Sequence):
    """Instructions of rows, read when they are taken; eight bytes each.

    Args:
        places: of their rows.
    """

    def __init__(self, rows: Sequence[Conversation], places: array) -> None:
        self.rows, self.places = rows, places

    @classmethod
    def distinct(cls, rows: Sequence[Conversation]) -> "_Instructions":
        """Every instruction once, in the order of the rows."""
        places, seen = array("q"), set()
        for place, row in enumerate(rows):
            signature = blake2b(row.instruction.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            if signature not in seen:
                seen.add(signature)
                places.append(place)
        return cls(rows, places)

    def chosen(self, order: Sequence[int]) -> "_Instructions":
        """Some of them, in another order."""
        return _Instructions(self.rows, array("q", (self.places[number] for number in order)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> str:
        return self.rows[self.places[number]].instruction


class _Sizes(NamedTuple):
    steps: int
    candidates: int
    minibatch: int


@dataclass(frozen=True)
class _Search:
    """The agents and settings of one call of optimise_method."""

    calls: Calls
    evolver: AnyAgent
    optimizer: AnyAgent
    answerer: AnyAgent
    operators: tuple[str, ...]
    seed: int
    temperature: float
    rounds: int

    async def run(self, method: str, dev: Sequence[str], pool: Sequence[str], sizes: _Sizes) -> Optimised:
        """The search, step by step."""
        (best,) = await self.measure([method], dev)
        history = [{"step": 0, **_rate(best), "accepted": True, "candidates": []}]
        stopped = "step limit"
        for step in range(1, sizes.steps + 1):
            if not best["failure_rate"]:
                stopped = "no failures"
                break
            batch = random.Random(derive_seed(self.seed, "mini-batch", step)).sample(pool, sizes.minibatch)
            proposals = await self.propose(best["method"], batch, sizes.candidates, step)
            tried = await self.measure([proposal["method"] for proposal in proposals], dev)
            leader = min(tried, key=lambda candidate: candidate["failure_rate"], default=best)
            accepted = leader["failure_rate"] < best["failure_rate"]
            best = leader if accepted else best
            described = [{"feedback": proposal["feedback"], **tries} for proposal, tries in zip(proposals, tried)]
            history.append({"step": step, **_rate(best), "accepted": accepted, "candidates": described})
            if not accepted:
                stopped = "no improvement"
                break
        return Optimised(best["method"], history, stopped, {"calls": self.calls.statistics()})

    async def propose(self, method: str, batch: list[str], candidates: int, step: int) -> list[dict[str, str]]:
        """Distinct new methods, each with the feedback that led to it."""
        text = prompts.trajectory(await asyncio.gather(*(self._case(method, instruction) for instruction in batch)))
        seeds = [derive_seed(self.seed, "optimise", step, number) for number in range(candidates)]
        given = await asyncio.gather(*(self._proposal(method, text, seed) for seed in seeds))
        proposals = {new: feedback for feedback, new in given if new not in (None, method)}
        return [{"method": new, "feedback": feedback} for new, feedback in proposals.items()]

    async def _proposal(self, method: str, trajectory: str, seed: int) -> tuple[str | None, str | None]:
        """A review of the trajectory and the method that follows from it, None where there is none."""
        settings = {"temperature": self.temperature}
        fields = {"method": method, "trajectory": trajectory}
        feedback = await self.calls.ask(
            self.optimizer, "analyse", fields, seed, read=lambda text: read_reply("analyse", text, fields), **settings
        )
        if feedback is None:
            return None, None
        fields = {"method": method, "feedback": feedback}
        return feedback, await self.calls.ask(self.optimizer, "optimise", fields, seed, read=read_method, **settings)

    async def measure(self, methods: Sequence[str], dev: Sequence[str]) -> list[dict[str, Any]]:
        """Failure rate and reasons of each method on the dev set, all at once, with the same draws."""
        reasons = await asyncio.gather(*(self._failure(method, text) for method in methods for text in dev))
        return [
            _candidate(method, reasons[number * len(dev) : (number + 1) * len(dev)])
            for number, method in enumerate(methods)
        ]

    async def _failure(self, method: str, instruction: str) -> str | None:
        """Why a method fails on an instruction; None where it does not."""
        evolved = await self._evolve(method, instruction)
        if evolved is None:
            return CALL_FAILED
        fault = instruction_fault(instruction, evolved)
        if fault is not None:
            return fault
        response = await self.calls.converse(self.answerer, (Message("user", evolved),), self.seed, longer=True)
        return CALL_FAILED if response is None else detect_failure(response)

    async def _case(self, method: str, instruction: str) -> tuple[list[str], str]:
        """The instruction by stage and the response to the last one."""
        stages = [instruction]
        for _ in range(self.rounds):
            stages.append(await self._evolve(method, stages[-1]) or "")
        prompt = (Message("user", stages[-1] or stages[0]),)
        return stages, await self.calls.converse(self.answerer, prompt, self.seed, longer=True) or ""

    async def _evolve(self, method: str, instruction: str) -> str | None:
        """The evolution of an instruction; the operator depends on the instruction alone."""
        fields = {"operator": self._operator(instruction), "method": method, "instruction": instruction}
        return await self.calls.ask(self.evolver, "evolve", fields, self.seed, read=read_evolved)

    def _operator(self, text: str) -> str:
        return random.Random(derive_seed(self.seed, "operator", text)).choice(self.operators)


def _candidate(method: str, reasons: Sequence[str | None]) -> dict[str, Any]:
    """A method with its failure rate over the rows that were measured: a failed call says nothing about a method."""
    failed = Counter(reason for reason in reasons if reason not in (None, CALL_FAILED))
    missing = reasons.count(CALL_FAILED)
    rate = failed.total() / (len(reasons) - missing) if missing < len(reasons) else 1.0
    measured = {"method": method, "failure_rate": rate, "reasons": dict(sorted(failed.items()))}
    return measured | ({"missing": missing} if missing else {})


def _rate(candidate: dict[str, Any]) -> dict[str, Any]:
    return {name: candidate[name] for name in ("failure_rate", "reasons")}


def _validate(rows: int, steps: int, candidates: int, minibatch: int, dev_size: int, rounds: int) -> None:
    sizes = {"candidates": candidates, "minibatch": minibatch, "dev_size": dev_size, "rounds": rounds}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}; give a positive number")
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}; give the step limit")
    if rows < dev_size + minibatch:
        raise ValueError(
            f"rows: expected {dev_size + minibatch} distinct instructions, got {rows}; lower dev_size or minibatch"
        )

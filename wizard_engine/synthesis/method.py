"""Auto Evol-Instruct: improves the evolving method by analysis of its failures and selection on a dev set.

Source: Zeng et al. 2024, arXiv:2406.00770, with pool 2,000 rows, mini-batch 10, dev set 50, 10 steps, 5 candidates,
optimizer temperature 0.6, evolver temperature 0; more than about 12 steps make the method worse.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Agent
from wizard_engine.agents.replies import read_evolved, read_method
from wizard_engine.data.records import Conversation, Message

from .calls import Calls, as_read, derive_seed
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
    evolver: Agent,
    optimizer: Agent,
    answerer: Agent,
    method: str = "",
    steps: int = 10,
    candidates: int = 5,
    minibatch: int = 10,
    dev_size: int = 50,
    rounds: int = 1,
    operators: Sequence[str] = IN_DEPTH,
    optimizer_temperature: float = 0.6,
    seed: int = 0,
    max_tokens: int = 512,
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
    Raises:
        ValueError: fewer distinct instructions than dev_size + minibatch, or a size below 1.
    """
    texts = list(dict.fromkeys(row.instruction for row in rows))
    _validate(len(texts), steps, candidates, minibatch, dev_size, rounds)
    order = random.Random(derive_seed(seed, "dev set")).sample(texts, len(texts))
    calls = Calls(max_tokens=max_tokens)
    search = _Search(calls, evolver, optimizer, answerer, tuple(operators), seed, optimizer_temperature, rounds)
    dev, pool = order[:dev_size], order[dev_size:]
    method = method or prompts.initial_method()
    (best,) = search.measure([method], dev)
    history = [{"step": 0, **_rate(best), "accepted": True, "candidates": []}]
    stopped = "step limit"
    for step in range(1, steps + 1):
        if not best["failure_rate"]:
            stopped = "no failures"
            break
        batch = random.Random(derive_seed(seed, "mini-batch", step)).sample(pool, minibatch)
        proposals = search.propose(best["method"], batch, candidates, step)
        tried = search.measure([proposal["method"] for proposal in proposals], dev)
        leader = min(tried, key=lambda candidate: candidate["failure_rate"], default=best)
        accepted = leader["failure_rate"] < best["failure_rate"]
        best = leader if accepted else best
        described = [{"feedback": proposal["feedback"], **candidate} for proposal, candidate in zip(proposals, tried)]
        history.append({"step": step, **_rate(best), "accepted": accepted, "candidates": described})
        if not accepted:
            stopped = "no improvement"
            break
    return Optimised(best["method"], history, stopped, {"calls": search.calls.statistics()})


@dataclass(frozen=True)
class _Search:
    """The agents and settings of one call of optimise_method."""

    calls: Calls
    evolver: Agent
    optimizer: Agent
    answerer: Agent
    operators: tuple[str, ...]
    seed: int
    temperature: float
    rounds: int

    def propose(self, method: str, batch: list[str], candidates: int, step: int) -> list[dict[str, str]]:
        """Distinct new methods, each with the feedback that led to it."""
        text = prompts.trajectory(self._trajectory(method, batch))
        seeds = [derive_seed(self.seed, "optimise", step, number) for number in range(candidates)]
        feedbacks = self.calls.ask(
            self.optimizer,
            "analyse",
            [{"method": method, "trajectory": text}] * candidates,
            seeds,
            read=as_read,
            temperature=self.temperature,
        )
        analyses = [(feedback, seed) for feedback, seed in zip(feedbacks, seeds) if feedback is not None]
        methods = self.calls.ask(
            self.optimizer,
            "optimise",
            [{"method": method, "feedback": feedback} for feedback, _ in analyses],
            [seed for _, seed in analyses],
            read=lambda reply, _: read_method(reply),
            temperature=self.temperature,
        )
        proposals = {new: feedback for (feedback, _), new in zip(analyses, methods) if new not in (None, method)}
        return [{"method": new, "feedback": feedback} for new, feedback in proposals.items()]

    def measure(self, methods: Sequence[str], dev: Sequence[str]) -> list[dict[str, Any]]:
        """Failure rate and reasons of each method on the dev set, all methods in one batch with the same draws."""
        evolved = self._evolve([(method, text) for method in methods for text in dev])
        parents = [text for _ in methods for text in dev]
        reasons = [CALL_FAILED if new is None else instruction_fault(p, new) for p, new in zip(parents, evolved)]
        asked = [index for index, reason in enumerate(reasons) if reason is None]
        contexts = [(Message("user", evolved[index]),) for index in asked]
        for index, response in zip(asked, self.calls.converse(self.answerer, contexts, self.seed)):
            reasons[index] = CALL_FAILED if response is None else detect_failure(response)
        return [
            _candidate(method, reasons[number * len(dev) : (number + 1) * len(dev)])
            for number, method in enumerate(methods)
        ]

    def _trajectory(self, method: str, batch: list[str]) -> list[tuple[list[str], str]]:
        """The instructions by stage and the response to the last one, for each row of the mini-batch."""
        stages = [[text] for text in batch]
        for _ in range(self.rounds):
            evolved = self._evolve([(method, history[-1]) for history in stages])
            for history, new in zip(stages, evolved):
                history.append(new or "")
        contexts = [(Message("user", history[-1] or history[0]),) for history in stages]
        responses = self.calls.converse(self.answerer, contexts, self.seed)
        return [(history, response or "") for history, response in zip(stages, responses)]

    def _evolve(self, pairs: Sequence[tuple[str, str]]) -> list[str | None]:
        """The evolution of each instruction by its method; the operator depends on the instruction alone."""
        fields = [{"operator": self._operator(text), "method": method, "instruction": text} for method, text in pairs]
        return self.calls.ask(self.evolver, "evolve", fields, self.seed, read=lambda reply, _: read_evolved(reply))

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

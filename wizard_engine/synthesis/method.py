"""Auto Evol-Instruct: improves the evolving method by analysis of its failures and selection on a dev set.

Source: Zeng et al. 2024, arXiv:2406.00770, with pool 2,000 rows, mini-batch 10, dev set 50, 10 steps, 5 candidates,
optimizer temperature 0.6, evolver temperature 0; more than about 12 steps make the method worse.

A method is a text for the evolver: a section of the evolving prompt, or the whole prompt as in the paper (see
prompts.is_whole_prompt). `failure_rate` measures it on a development set; another one replaces it where it is better by
more than chance.
"""

import asyncio
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from wizard_engine.agents import prompts
from wizard_engine.agents.calls import AnyAgent, Calls, Limits, derive_seed
from wizard_engine.agents.replies import read_evolved, read_method, read_reply
from wizard_engine.agents.scheduler import Scheduler
from wizard_engine.data.records import Conversation
from wizard_engine.data.references import reference_of

from .failure_rate import Checks, Measure, Measured, Outcome, chance, is_better, shared_checks
from .failures import Failure, Step

CONFIDENCE = 0.9  # that another method is better, where classes of failure count
IN_DEPTH = ("constraint", "deepen", "concretise", "steps", "complicate")


@dataclass(frozen=True)
class Optimised:
    """Result of optimise_method.

    Attributes:
        method: text of the method in force at the end.
        history: one object a step: step, counts of the method in force after it (Measured.counts: failure_rate, ci95,
            reasons, found_by), accepted, and the candidates with feedback, method, counts and chance each (see
            failure_rate.chance). Step 0 is the initial method.
        stopped: "no improvement", "within noise" (lower rates, all of them explained by chance), "no failures" or
            "step limit".
        statistics: calls by task.
        failures: one object a failure of a method on the development set: step, candidate (None for the initial
            method), class, by, detail, operator, instruction, evolved, response.
    """

    method: str
    history: list[dict[str, Any]]
    stopped: str
    statistics: dict[str, Any]
    failures: list[dict[str, Any]]


def optimise_method(
    rows: Sequence[Conversation],
    *,
    evolver: AnyAgent,
    optimizer: AnyAgent,
    answerer: AnyAgent,
    judge: AnyAgent | None = None,
    method: str = "",
    is_whole: bool = False,
    measure: Measure = "classes",
    confidence: float | None = None,
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
    set replaces the method if it is better by more than chance; otherwise the search ends. Rows whose calls failed are
    in no rate; they are counted as missing. With the measure "classes" the optimizer also sees what was found in the
    cases that it analyses.

    Args:
        rows: their last instructions are used, and their references, else their last answers; dev set and mini-batches
            are drawn from them and never overlap.
        judge: does the task "diagnose", with the measure "classes"; None for what rules and programs find.
        method: the method to start from; "" for prompts.initial_method(), or prompts.whole_prompt().
        is_whole: the method is the whole evolving prompt. A proposal that is none is asked for again.
        measure: what counts as a failure, see failure_rate.
        confidence: that a candidate is better (see failure_rate.is_better); 0: any lower rate counts. None for 0.9
            with "classes", for 0 with "rules".
        operators: one is drawn for each row.
        optimizer_temperature: of its analyses and methods, so that candidates differ.
        limits: longest replies.   top_p: of all calls (see Calls).
        scheduler: of the calls; None for one without a ledger.
    Raises:
        ValueError: fewer distinct instructions than dev_size + minibatch, a size below 1, a confidence outside 0 to 1,
            or a method that is no whole prompt where one is asked for.
    """
    texts = _Instructions.distinct(rows)
    method = method or (prompts.whole_prompt() if is_whole else prompts.initial_method())
    confidence = (CONFIDENCE if measure == "classes" else 0.0) if confidence is None else confidence
    _validate(len(texts), steps, candidates, minibatch, dev_size, rounds)
    _validate_method(method, is_whole, confidence)
    order = random.Random(derive_seed(seed, "dev set")).sample(range(len(texts)), len(texts))
    dev, pool = list(texts.chosen(order[:dev_size])), texts.chosen(order[dev_size:])
    calls = Calls(scheduler, limits=limits, top_p=top_p)
    checks = Checks(calls, measure, answerer, judge, seed)
    settings = _Settings(tuple(operators), seed, optimizer_temperature, rounds, confidence, is_whole)
    search = _Search(calls, evolver, optimizer, checks, settings)
    return calls.scheduler.run(search.run(method, dev, pool, _Sizes(steps, candidates, minibatch)))


class _Given(NamedTuple):
    """An instruction and the answer to it, the one known to be right where there is one."""

    instruction: str
    answer: str


class _Instructions(Sequence):
    """Instructions of rows with their answers, read when they are taken; eight bytes each.

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

    def __getitem__(self, number: int) -> _Given:
        row = self.rows[self.places[number]]
        return _Given(row.instruction, reference_of(row.attributes) or row.answer)


class _Sizes(NamedTuple):
    steps: int
    candidates: int
    minibatch: int


class _Settings(NamedTuple):
    """What a search does not change; see the arguments of optimise_method."""

    operators: tuple[str, ...]
    seed: int
    temperature: float
    rounds: int
    confidence: float
    is_whole: bool


@dataclass(frozen=True)
class _Search:
    """The agents and settings of one call of optimise_method."""

    calls: Calls
    evolver: AnyAgent
    optimizer: AnyAgent
    checks: Checks
    settings: _Settings

    async def run(self, method: str, dev: Sequence[_Given], pool: Sequence[_Given], sizes: _Sizes) -> Optimised:
        """The search, step by step."""
        (best,) = await self.measure([method], dev)
        history = [{"step": 0, **best.counts(), "accepted": True, "candidates": []}]
        failures = _labelled(0, None, best)
        stopped = "step limit"
        for step in range(1, sizes.steps + 1):
            if not best.rate:
                stopped = "no failures"
                break
            batch = random.Random(derive_seed(self.settings.seed, "mini-batch", step)).sample(pool, sizes.minibatch)
            proposals = await self.propose(best.method, batch, sizes.candidates, step)
            tried = await self.measure([new for new, _ in proposals], dev)
            leader = min(tried, key=lambda candidate: candidate.rate, default=best)
            accepted = is_better(leader, best, self.settings.confidence, len(tried))
            described = [_candidate(new, feedback, best) for new, (_, feedback) in zip(tried, proposals)]
            failures += [line for number, new in enumerate(tried) for line in _labelled(step, number, new)]
            is_lower = leader.rate < best.rate
            best = leader if accepted else best
            history.append({"step": step, **best.counts(), "accepted": accepted, "candidates": described})
            if not accepted:
                stopped = "within noise" if is_lower else "no improvement"
                break
        return Optimised(best.method, history, stopped, {"calls": self.calls.statistics()}, failures)

    async def propose(self, method: str, batch: Sequence[_Given], candidates: int, step: int) -> list[tuple[str, str]]:
        """Distinct new methods, each with the feedback that led to it."""
        cases = await asyncio.gather(*(self._case(method, given) for given in batch))
        text = prompts.trajectory([(stages, said) for stages, said, _ in cases], [check for _, _, check in cases])
        seeds = [derive_seed(self.settings.seed, "optimise", step, number) for number in range(candidates)]
        given = await asyncio.gather(*(self._proposal(method, text, seed) for seed in seeds))
        return list({new: feedback for feedback, new in given if new not in (None, method)}.items())

    async def _proposal(self, method: str, trajectory: str, seed: int) -> tuple[str | None, str | None]:
        """A review of the trajectory and the method that follows from it, None where there is none."""
        settings = {"temperature": self.settings.temperature}
        fields = {"method": method, "trajectory": trajectory}
        feedback = await self.calls.ask(
            self.optimizer, "analyse", fields, seed, read=lambda text: read_reply("analyse", text, fields), **settings
        )
        if feedback is None:
            return None, None
        fields = {"method": method, "feedback": feedback}
        return feedback, await self.calls.ask(self.optimizer, "optimise", fields, seed, read=self._read, **settings)

    def _read(self, text: str) -> str | None:
        """The new method; None for one that is no whole prompt where the method is one."""
        method = read_method(text)
        return None if method is None or (self.settings.is_whole and not prompts.is_whole_prompt(method)) else method

    async def measure(self, methods: Sequence[str], dev: Sequence[_Given]) -> list[Measured]:
        """What comes of each method on the dev set, all at once, with the same draws."""
        outcomes = await asyncio.gather(*(self._outcome(method, given) for method in methods for given in dev))
        return [
            Measured(method, tuple(outcomes[number * len(dev) : (number + 1) * len(dev)]))
            for number, method in enumerate(methods)
        ]

    async def _outcome(self, method: str, given: _Given) -> Outcome:
        """What comes of one row under a method."""
        step = await self._step(method, given.instruction, given.answer)
        if step is None:
            return Outcome(Step(given.instruction, ""), None)
        failures = await self.checks.of_text(step)
        if failures:
            return Outcome(step, tuple(failures))
        answered = await self.checks.answered(step)
        if answered is None:
            return Outcome(step, None)
        found = await self.checks.of_response(answered)
        return Outcome(answered, None if found is None else tuple(found))

    async def _case(self, method: str, given: _Given) -> tuple[list[str], str, str]:
        """The instruction by stage, the response to the last one, and what was found at the stages."""
        stages, found, answer = [given.instruction], [], given.answer
        for _ in range(self.settings.rounds):
            step = await self._step(method, stages[-1], answer)
            stages.append(step.child if step else "")
            found.append(await self._found(step))
            # The answer to an evolved instruction is not known.
            answer = ""
        last = Step(stages[-2], stages[-1] or stages[0])
        answered = await self.checks.answered(last)
        return stages, answered.response if answered else "", shared_checks(found)

    async def _found(self, step: Step | None) -> Sequence[Failure]:
        """What is shown to the optimizer of one stage: nothing where the paper's rules alone count."""
        if step is None or self.checks.measure == "rules":
            return ()
        return await self.checks.of_text(step) or await self.checks.of_response(step) or ()

    async def _step(self, method: str, instruction: str, answer: str) -> Step | None:
        """An instruction and its evolution, None where there is none; the operator depends on the instruction alone."""
        operator = self._operator(instruction)
        fields = {"operator": operator, "method": method, "instruction": instruction}
        evolved = await self.calls.ask(self.evolver, "evolve", fields, self.settings.seed, read=read_evolved)
        return None if evolved is None else Step(instruction, evolved, operator, method, answer)

    def _operator(self, text: str) -> str:
        return random.Random(derive_seed(self.settings.seed, "operator", text)).choice(self.settings.operators)


def _candidate(new: Measured, feedback: str, old: Measured) -> dict[str, Any]:
    return {"feedback": feedback, "method": new.method, **new.counts(), "chance": chance(new, old)}


def _labelled(step: int, candidate: int | None, measured: Measured) -> list[dict[str, Any]]:
    """The failures of a method with the place in the search where it was tried."""
    return [{"step": step, "candidate": candidate, **example} for example in measured.examples()]


def _validate_method(method: str, is_whole: bool, confidence: float) -> None:
    if not 0 <= confidence < 1:
        raise ValueError(f"confidence: expected at least 0 and below 1, got {confidence}; give 0.9, or 0 for none")
    if is_whole and not prompts.is_whole_prompt(method):
        line = prompts.load_template("evolve").closing
        raise ValueError(
            f"method: expected a whole prompt, which names the line `{line}`, got {method[:40]!r}; add the sentence "
            "that asks for it, or leave out the whole prompt"
        )


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

"""The failure rate of an evolving method: what is looked at on each row of a development set, and the counts.

    "classes"  text_failures, then the response's failures, then a judge where there is one (see failures.py); a row
               that a program finds at fault costs no call more. A row fails by any class.
    "rules"    the paper's rules alone: `detect_failure` of the response, or no evolved instruction.

A row whose call failed says nothing about a method: it is missing, and in no rate.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from wizard_engine.agents.calls import AnyAgent, Calls
from wizard_engine.agents.replies import read_failures
from wizard_engine.data.proportions import sign_test, wilson_interval
from wizard_engine.data.records import Message

from .elimination import detect_failure, instruction_fault
from .failures import Failure, Step, fields, response_failures, text_failures

Measure = Literal["classes", "rules"]
EXAMPLE_TEXT = 2000  # characters of a text in the files of examples


@dataclass(frozen=True)
class Checks:
    """How the failures of one evolving step are found.

    Attributes:
        judge: does the task "diagnose"; None for programs and rules alone.   seed: of all requests.
    """

    calls: Calls
    measure: Measure
    answerer: AnyAgent
    judge: AnyAgent | None
    seed: int

    async def of_text(self, step: Step) -> list[Failure]:
        """The failures that are seen without a response."""
        if self.measure == "classes":
            return text_failures(step)
        fault = instruction_fault(step.parent, step.child)
        return [Failure(fault, "rules", fault)] if fault else []

    async def answered(self, step: Step) -> Step | None:
        """The step with the response to its child; None where the call failed."""
        said = await self.calls.converse(self.answerer, (Message("user", step.child),), self.seed, longer=True)
        return None if said is None else _with_response(step, said)

    async def of_response(self, step: Step) -> list[Failure] | None:
        """The failures that rules and programs see in the response, else those that the judge sees.

        A step without a response is judged by its texts. None where the judge gave no verdict.
        """
        if self.measure == "rules":
            fault = detect_failure(step.response)
            return [Failure(fault, "rules", fault)] if fault else []
        failures = response_failures(step) if step.response else []
        if failures or self.judge is None:
            return failures
        verdict = await self.calls.ask(self.judge, "diagnose", fields(step), self.seed, read=read_failures)
        return None if verdict is None else [Failure(kind, "judge", reason) for kind, reason in verdict.items()]


class Outcome(NamedTuple):
    """What came of one row: `failures` is None where a call failed, and then nothing is known."""

    step: Step
    failures: tuple[Failure, ...] | None


@dataclass(frozen=True)
class Measured:
    """A method and what came of each row of the development set, in its order."""

    method: str
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> list[bool | None]:
        """Whether each row failed; None where that is unknown."""
        return [None if failures is None else bool(failures) for _, failures in self.outcomes]

    @property
    def rate(self) -> float:
        """Share of the known rows that failed; 1 where none is known."""
        known = [failed for failed in self.failed if failed is not None]
        return sum(known) / len(known) if known else 1.0

    def counts(self) -> dict[str, Any]:
        """Rate, 95 % interval, rows by class (a row counts for each of its classes) and by who found them, missing."""
        known = [failures for _, failures in self.outcomes if failures is not None]
        reasons = Counter(kind for failures in known for kind in {failure.kind for failure in failures})
        found_by = Counter(by for failures in known for by in {failure.by for failure in failures})
        counts = {
            "failure_rate": self.rate,
            "ci95": list(wilson_interval(sum(map(bool, known)), len(known))),
            "reasons": dict(sorted(reasons.items())),
            "found_by": dict(sorted(found_by.items())),
        }
        missing = len(self.outcomes) - len(known)
        return counts | ({"missing": missing} if missing else {})

    def examples(self) -> list[dict[str, Any]]:
        """One object a failure: class, by, detail, operator, instruction, evolved, response."""
        return [
            {
                "class": failure.kind,
                "by": failure.by,
                "detail": failure.detail,
                "operator": step.operator,
                "instruction": step.parent[:EXAMPLE_TEXT],
                "evolved": step.child[:EXAMPLE_TEXT],
                "response": step.response[:EXAMPLE_TEXT],
            }
            for step, failures in self.outcomes
            for failure in failures or ()
        ]


def chance(new: Measured, old: Measured) -> float:
    """Probability that a method as bad as the old one fails less often on as many of the rows that both were tried on.

    See `proportions.sign_test`: rows on which both fail, or none does, say nothing.
    """
    pairs = [(a, b) for a, b in zip(new.failed, old.failed, strict=True) if a is not None and b is not None]
    return sign_test(sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs))


def is_better(new: Measured, old: Measured, confidence: float, tried: int) -> bool:
    """Whether a method replaces another one.

    With a confidence of 0 any lower rate does. Else chance must explain the difference with a probability of at most
    (1 - confidence) / tried: the best of several is looked at (Bonferroni).

    Args:
        tried: methods that the new one is the best of.
    """
    if new.rate >= old.rate:
        return False
    return confidence == 0 or chance(new, old) <= (1 - confidence) / max(1, tried)


def shared_checks(checks: Sequence[Sequence[Failure]]) -> str:
    """What was found at the stages of a case, as one line; "" for nothing."""
    return "; ".join(
        f"stage {stage}: {failure.kind}" + (f" ({failure.detail})" if failure.detail else "")
        for stage, failures in enumerate(checks, start=1)
        for failure in failures
    )


def _with_response(step: Step, response: str) -> Step:
    return Step(step.parent, step.child, step.operator, step.method, step.reference, response)

"""Agents that judge by a row's reference, the answer known to be right: programs, which cost nothing.

They read the reference in the prompt, and look at final answers and written arithmetic alone: they understand no
instruction. A row without a reference, or with one that claims no number or expression, is refused by name.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from wizard_engine.data.equations import found_equations
from wizard_engine.data.final_answers import Claim, is_right, read_claim, same_answer
from wizard_engine.data.latex_answers import is_latex, library
from wizard_engine.data.solution_steps import step_texts

from .missing import NO_REFERENCE, UNREADABLE_REFERENCE
from .program import Program, Refused
from .prompts import flatten

# Scores by whether the result is right, and by its arithmetic: all of it holds, there is none, some does not hold.
# Right answers are at least 2.5 points ahead.
SCORES = {(True, 1): 9.0, (True, 0): 7.0, (True, -1): 5.0, (False, 1): 2.0, (False, 0): 1.5, (False, -1): 1.0}
STATED = 0.5
_WORDS = re.compile(r"\w+")


class Known(NamedTuple):
    """A reference and the number that it claims, None for an expression in LaTeX."""

    text: str
    claim: Claim | None

    def agrees(self, answer: str) -> bool:
        """Whether an answer claims the same."""
        return is_right(read_claim(answer), answer, self.claim, self.text)


def known(reference: str) -> Known:
    """The reference of a prompt's field.

    Raises:
        Refused: there is none, or it cannot be compared with an answer.
    """
    if not reference.strip():
        raise Refused(f"{NO_REFERENCE}: the row has no answer known to be right to compare with")
    claim = read_claim(reference)
    if claim is None and not (is_latex(reference) and library()):
        raise Refused(f"{UNREADABLE_REFERENCE}: {flatten(reference)[-60:]!r} claims no number to compare with")
    return Known(reference, claim)


class Assessed(NamedTuple):
    """An answer by a reference.

    Attributes:
        arithmetic: 1 where all equations in it hold, -1 where one does not, 0 where it has none.
        wrong_step: number of the first step with an equation that does not hold, 0 for none.
        states: whether its last step alone claims the answer.
    """

    is_right: bool
    arithmetic: int
    wrong_step: int
    states: bool

    @property
    def score(self) -> float:
        """From 1 to 10."""
        return SCORES[self.is_right, self.arithmetic] + STATED * self.states

    @property
    def remark(self) -> str:
        """A clause that says why."""
        result = "has the result of the reference" if self.is_right else "has another result than the reference"
        return f"{result}, but the arithmetic of step {self.wrong_step} is wrong" if self.wrong_step else result


def assessed(answer: str, reference: Known) -> Assessed:
    """The answer by the reference: a function of both texts alone."""
    steps = step_texts(answer)
    marks = [arithmetic(step) for step in steps]
    wrong = marks.index(-1) + 1 if -1 in marks else 0
    states = bool(steps) and same_answer(steps[-1], answer)
    return Assessed(reference.agrees(answer), -1 if wrong else max(marks, default=0), wrong, states)


def arithmetic(step: str) -> int:
    """1 where every equation of a step holds, -1 where one does not, 0 where it has none that can be read."""
    verdicts = found_equations(step)
    return 0 if not verdicts else 1 if all(verdicts) else -1


class ReferenceLabeller(Program):
    """Labels steps by their arithmetic, and the one that gives the answer by the reference."""

    def __init__(self, name: str = "reference:labeller") -> None:
        self.name = name

    def do_label(self, *, answer_steps: str, reference: str, **_: object) -> str:
        """A line with a label for each step.

        -1 where an equation does not hold, 1 where all do, 0 without any. The step that gives the answer, the last
        one that claims it alone or else the last of all, is -1 where the answer is not the reference's, else 1.
        """
        right = known(reference)
        steps = [step for step in answer_steps.split("\n") if step.strip()]
        labels = [(mark, _REASONS[mark]) for mark in map(arithmetic, steps)]
        if not steps:
            return ""
        final = _final_step(steps)
        if not right.agrees("\n".join(steps)):
            labels[final] = (-1, "The result is not the reference's.")
        elif labels[final][0] >= 0:
            labels[final] = (1, "The result is the reference's.")
        return "\n".join(f"{number}: {reason} [[{label}]]" for number, (label, reason) in enumerate(labels, start=1))


def _final_step(steps: Sequence[str]) -> int:
    """Place of the last step that alone claims the number of the whole answer, or of the last step."""
    claim = read_claim("\n".join(steps))
    for place in reversed(range(len(steps))) if claim is not None else ():
        own = read_claim(steps[place])
        if own is not None and own.equals(claim):
            return place
    return len(steps) - 1


_REASONS = {1: "The equation holds.", 0: "There is no equation to check.", -1: "The equation does not hold."}


class ReferenceJudge(ReferenceLabeller):
    """Scores answers from 1 to 10 by the reference, equal answers equally and in both orders; labels steps, too."""

    def __init__(self, name: str = "reference:judge") -> None:
        super().__init__(name)

    def do_judge(self, *, answer_a: str, answer_b: str, reference: str, **_: object) -> str:
        """A clause about each answer, and `[[a]] [[b]]`."""
        right = known(reference)
        a, b = assessed(answer_a, right), assessed(answer_b, right)
        return f"Answer A {a.remark}. Answer B {b.remark}.\n[[{a.score:g}]] [[{b.score:g}]]"

    def do_rate(self, *, answer: str, reference: str, **_: object) -> str:
        """A clause about the answer, and `[[x]]`."""
        verdict = assessed(answer, known(reference))
        return f"The answer {verdict.remark}.\n[[{verdict.score:g}]]"

    def do_compare(self, *, first: str, second: str, **_: object) -> str:
        """`Equal` where two instructions have the same words and numbers in the same order; needs no reference."""
        return "Equal" if _words(first) == _words(second) else "Not Equal"

    def do_suggest(self, *, answer: str, reference: str, **_: object) -> str:
        """One sentence about what the writer of the answer should change; it does not give the result away."""
        verdict = assessed(answer, known(reference))
        if verdict.wrong_step:
            return f"Check the arithmetic of step {verdict.wrong_step}."
        if read_claim(answer) is None and not verdict.is_right:
            return "Give the result that is asked for as the answer."
        if not verdict.is_right:
            return "Check what is asked for and which quantities it takes: the result is not right."
        if not verdict.arithmetic:
            return "Write the equation of each step before the answer."
        return "Explain the steps more clearly." if verdict.states else "End with a line that states the answer."


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.casefold())


AGENTS = {"reference:judge": ReferenceJudge, "reference:labeller": ReferenceLabeller}

"""Exact-answer accuracy: the number that an answer claims, compared with that of a reference."""

import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from wizard_engine.agents.missing import Missing
from wizard_engine.data.final_answers import Claim, is_right, read_claim
from wizard_engine.data.latex_answers import is_latex, library
from wizard_engine.data.proportions import wilson_interval

# Share of references that claim something from which on answers are compared with them unasked: of rows of any kind,
# four in ten end in some number.
MOSTLY = 0.9


@dataclass(frozen=True)
class Accuracy:
    """Number and fraction of right answers.

    Attributes:
        total: answers that came.
        unanswered: answers without a number; they count as wrong.
        missing: problems whose answer is Missing; they are in no other number.
        se: standard error sqrt(p (1 - p) / total).
        ci95: Wilson's 95 % interval.
    """

    correct: int
    total: int
    accuracy: float
    se: float
    ci95: tuple[float, float]
    unanswered: int = 0
    missing: int = 0


def accuracy(answers: Sequence[str | Missing], references: Sequence[str]) -> Accuracy:
    """Fraction of answers that claim the number of the reference.

    Args:
        answers: one per problem; a text without a number is wrong, a Missing one is neither right nor wrong.
        references: texts that claim the right number, such as worked solutions; with math-verify also expressions in
            LaTeX.
    Raises:
        ValueError: no answers, another number of references, or a reference without a number.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(
            f"references: expected one per answer and at least one, got {len(references)} for {len(answers)} answers; "
            "give both for the same problems"
        )
    right = [_claimed(reference, f"references[{index}]") for index, reference in enumerate(references)]
    came = [
        (read_claim(answer), answer, claim, reference)
        for answer, claim, reference in zip(answers, right, references)
        if not isinstance(answer, Missing)
    ]
    if not came:
        raise ValueError(f"answers: expected at least one that came, got {len(answers)} missing; ask again")
    marks = [is_right(*pair) for pair in came]
    correct = sum(marks)
    unanswered = sum(pair[0] is None and not mark for pair, mark in zip(came, marks))
    return _accuracy(correct, len(came), unanswered, len(answers) - len(came))


def marks(answers: Sequence[str | None], references: Sequence[str]) -> list[bool | None]:
    """Whether each answer claims the number of its reference, as `accuracy` counts; None for one that did not come."""
    pairs = zip(answers, references, strict=True)
    return [None if a is None else is_right(read_claim(a), a, read_claim(b), b) for a, b in pairs]


def check_reference(reference: str, name: str = "reference") -> None:
    """Raises ValueError unless a reference claims a number, or an expression that can be compared."""
    _claimed(reference, name)


def _claimed(reference: str, name: str) -> Claim | None:
    claim = read_claim(reference)
    if claim is None and not (is_latex(reference) and library()):
        more = "; pip install -e '.[math]' to compare expressions" if is_latex(reference) else ""
        raise ValueError(f"{name}: expected a number, got {reference[-80:]!r}; remove such rows{more}")
    return claim


def accuracy_by(
    answers: Sequence[str | Missing], references: Sequence[str], groups: Sequence[Hashable]
) -> dict[Hashable, Accuracy]:
    """`accuracy` within each group of problems with an answer, in the order in which the groups first appear.

    Raises:
        ValueError: as `accuracy`, or another number of groups than answers.
    """
    if len(groups) != len(answers):
        raise ValueError(
            f"groups: expected one per answer ({len(answers)}), got {len(groups)}; give one for each answer"
        )
    accuracies = {}
    for group in dict.fromkeys(groups):
        chosen = [index for index, other in enumerate(groups) if other == group]
        if all(isinstance(answers[index], Missing) for index in chosen):
            continue
        accuracies[group] = accuracy([answers[index] for index in chosen], [references[index] for index in chosen])
    return accuracies


def _accuracy(correct: int, total: int, unanswered: int, missing: int) -> Accuracy:
    share = correct / total
    se = math.sqrt(share * (1 - share) / total)
    return Accuracy(correct, total, share, se, wilson_interval(correct, total), unanswered, missing)


def are_checkable(references: Sequence[str]) -> bool:
    """Whether nine in ten references or more claim what answers can be compared with."""
    claimed = 0
    for reference in references:
        with suppress(ValueError):
            check_reference(reference)
            claimed += 1
    return claimed >= MOSTLY * len(references) > 0

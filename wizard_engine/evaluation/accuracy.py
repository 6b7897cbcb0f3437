"""Exact-answer accuracy: the number that an answer claims, against the number of a reference."""

import math
import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

# A minus belongs to the number unless something that can be subtracted from stands before it.
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?:(?<![)\]%])[-−–]\s?)?)[$€£¥]?\s?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+,\d{1,2}(?![\d,])|\d*\.\d+|\d+)(?:\s?/\s?(?P<below>\d+)(?!\d))?"
)
_MARKER = re.compile(
    r"(?:####|\bthe (?:final |correct )?answer (?:is|=)|\bla (?:respuesta|solución)(?: final| correcta)? es"
    r"|\b(?:answer|respuesta)\s*[:=](?=[\s*$]*[-−]?\d)|答案(?:是|为|：|:)|\\boxed\s*\{)",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"\n|[.!?。！？](?=\s|$)")


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of all.

    Attributes:
        unanswered: answers that hold no number; they count as wrong.
        se: standard error sqrt(p (1 - p) / total).
        ci95: Wilson's 95 % interval.
    """

    correct: int
    total: int
    accuracy: float
    se: float
    ci95: tuple[float, float]
    unanswered: int = 0


def extract_answer(text: str) -> Fraction | None:
    """The number that an answer claims, exactly, or None where it claims none.

    The last "####", "The answer is", "Answer: 7", "La respuesta es" or \\boxed{} decides: the first number behind it,
    or, where an equation follows ("is 3 + 4 = 7"), the one behind the last "=" of the sentence. A mark without a number
    behind it claims nothing. Without a mark it is the last number of the text. Read are signs, decimals ("3.50"),
    commas between thousands ("1,234") or before one or two decimals ("3,5"), currency signs, fractions ("3/4") and
    full-width digits.
    """
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    marks = list(_MARKER.finditer(text))
    if not marks:
        numbers = list(_NUMBER.finditer(text))
        return _value(numbers[-1]) if numbers else None
    claim = text[marks[-1].end() :].lstrip(" \t\n:=*$")
    end = _CLAUSE_END.search(claim)
    claim = claim[: end.start()] if end else claim
    number = _NUMBER.search(claim.rpartition("=")[2])
    return _value(number) if number else None


def _value(match: re.Match[str]) -> Fraction:
    digits = match["digits"]
    decimal_comma = re.fullmatch(r"\d+,\d{1,2}", digits) is not None
    value = Fraction(Decimal(digits.replace(",", "." if decimal_comma else "")))
    if match["below"] and int(match["below"]):
        value /= int(match["below"])
    return -value if match["sign"] else value


def same_answer(answer: str, reference: str) -> bool:
    """Whether two texts claim the same number; False where either claims none."""
    claimed = extract_answer(answer)
    return claimed is not None and claimed == extract_answer(reference)


def accuracy(answers: Sequence[str], references: Sequence[str]) -> Accuracy:
    """Share of answers that claim the reference's number.

    Args:
        answers: one per problem; a text without a number is wrong.
        references: texts that claim the right number, such as worked solutions.
    Raises:
        ValueError: no answers, another number of references, or a reference without a number.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(
            f"references: expected one per answer and at least one, got {len(references)} for {len(answers)} answers; "
            "give both for the same problems"
        )
    right = [extract_answer(reference) for reference in references]
    if None in right:
        index = right.index(None)
        raise ValueError(f"references[{index}]: expected a number, got {references[index][:80]!r}; leave such rows out")
    claimed = [extract_answer(answer) for answer in answers]
    correct = sum(a is not None and a == b for a, b in zip(claimed, right))
    return _accuracy(correct, len(answers), claimed.count(None))


def accuracy_by(
    answers: Sequence[str], references: Sequence[str], groups: Sequence[Hashable]
) -> dict[Hashable, Accuracy]:
    """`accuracy` within each group of problems, in the order in which the groups first appear.

    Raises:
        ValueError: as `accuracy`, or another number of groups than answers.
    """
    if len(groups) != len(answers):
        raise ValueError(f"groups: expected one per answer ({len(answers)}), got {len(groups)}; give both alike")
    found = {}
    for group in dict.fromkeys(groups):
        chosen = [index for index, own in enumerate(groups) if own == group]
        found[group] = accuracy([answers[index] for index in chosen], [references[index] for index in chosen])
    return found


def _accuracy(correct: int, total: int, unanswered: int) -> Accuracy:
    share = correct / total
    se = math.sqrt(share * (1 - share) / total)
    return Accuracy(correct, total, share, se, wilson_interval(correct, total), unanswered)


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a binomial proportion; (0, 1) without observations. Source: Wilson 1927, JASA 22(158)."""
    if not total:
        return 0.0, 1.0
    share, spread = successes / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)

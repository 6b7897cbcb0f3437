"""Reading the number that an answer claims: one reader for accuracy, judges, labels and the guards of synthesis."""

import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from wizard_engine.runtime.text_lines import LINE_ENDS

from .latex_answers import is_latex, library, same_expression
from .written_numbers import NUMBER, Quantity, find_numbers, normalised, read_quantity

# A digit may stand right before a mark: small models write "= 32The answer is 32."
_START = r"(?<![^\W\d_])"
_MARKER = re.compile(
    r"(?:#{4}[ \t]*(?=[^\w\n]{0,40}\d)"
    rf"|{_START}the (?:[a-z]+ )?answer (?:to [^.!?\n]{{1,80}}? )?(?:is|=|equals|(?:would|should|must) be)"
    rf"|{_START}la (?:respuesta|solución)(?: final| correcta)? es"
    rf"|{_START}(?:answer|respuesta)\s*[:=](?=[\s*_$€£¥(+]*[-−]?[\s$€£¥]?\.?\d)"
    r"|\bfinal answer\b[\s*_:=]*(?=[-−$€£¥]{0,2}\d)"
    r"|(?<![^\n])A:[ \t]*(?=[-−$€£¥]{0,2}\s?\.?\d[^\n]*\s*\Z)"
    r"|答案(?:是|为|：|:)|\\boxed\s*\{)",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(rf"[{LINE_ENDS}]|[.!?。！？](?=\s|$)")
# What stands before or behind a number that is no claim of it: bounds, denials, alternatives, a sum that is not done.
_NO_CLAIM_BEFORE = re.compile(
    r"(?:\b(?:not|between|either|neither|less than|fewer than|more than|greater than|smaller than|at least|at most"
    r"|up to|below|above|under|over|anything but|other than)|n['’]t)\W*$",
    re.IGNORECASE,
)
_NO_CLAIM_BEHIND = re.compile(
    rf"\s*(?:[-−–:]|\bor\b|\bto\b|\bo\b)\s*[$€£¥]?\s?(?:{NUMBER})|\s*[xyzn](?![\w'])|[ \t]*(?!\*\*)[+*/×÷^]",
    re.IGNORECASE,
)
# Several numbers: two variables, or a list in a box, where a factorial may stand too.
_SEVERAL = re.compile(r"\b[a-z]\s*=[^=,;]+(?:[,;]|\band\b)\s*(?:and\s+)?[a-z]\s*=", re.IGNORECASE)
_NO_BOXED_NUMBER = re.compile(rf"(?<![\d.,])(?:{NUMBER})(?:[,;]\s{{1,9}}[-−–+$]?(?:{NUMBER})|\s?!)")
_BEYOND = re.compile(r"\\sqrt|√|\\pi\b|π|\\infty|∞|\\log|\\ln|\\sin|\\cos|\\tan|\\pm|±")
_REFUSES = re.compile(
    r"\b(?:cannot|can't|can not|could not|couldn't|unable to|don't know|do not know|not enough information"
    r"|impossible to (?:say|know|tell|determine)|no idea)\b",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(r"=|\b(?:so|therefore|thus|hence|altogether|in total|the total|the result)\b", re.IGNORECASE)


class Claim(NamedTuple):
    """A number that a text claims; `percent`: it is written with a percent sign."""

    value: Fraction
    percent: bool = False

    def equals(self, other: "Claim") -> bool:
        """Whether both are the same number: 5 % is 0.05, and is 5 where the question asks for per cent."""
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        percent, plain = (self, other) if self.percent else (other, self)
        return percent.value / 100 == plain.value


def read_claim(text: str) -> Claim | None:
    """The exact number that an answer claims, or None.

    The last "####" before a number, "The answer is", "Answer: 7", a last line "A: 7", "La respuesta es" or \\boxed{}
    decides: the first number behind it, or, where an equation follows ("is 3 + 4 = 7"), the one behind the last "=" of
    the sentence. A mark without a number behind it claims nothing. Nor does one with a bound, a denial, a choice or an
    expression that is not worked out ("not 5", "3 or 4", "3 + 4", "2\\sqrt{3}").

    Without a mark the last number counts. A sentence that draws a conclusion ("=", "so", "in total") goes before later
    ones that draw none, and a text that says it does not know claims nothing. Numbers are read as people and models
    write them; see `written_numbers`.
    """
    text = normalised(text)
    marks = list(_MARKER.finditer(text))
    quantity = _marked(text, marks[-1]) if marks else _unmarked(text)
    return None if quantity is None else Claim(quantity.value, quantity.percent)


def extract_answer(text: str) -> Fraction | None:
    """The value of `read_claim`, or None."""
    claim = read_claim(text)
    return None if claim is None else claim.value


def same_answer(answer: str, reference: str) -> bool:
    """Whether two texts claim the same number, or in LaTeX the same expression; False if either claims none."""
    return is_right(read_claim(answer), answer, read_claim(reference), reference)


def is_right(claimed: Claim | None, answer: str, right: Claim | None, reference: str) -> bool:
    """`same_answer` of two texts whose claims are read already.

    Where one of them is an expression in LaTeX and no number, math-verify compares them, if it is installed.
    """
    if claimed is not None and right is not None:
        return claimed.equals(right)
    if (claimed is None and not is_latex(answer)) or (right is None and not is_latex(reference)):
        return False
    return library() is not None and same_expression(answer, reference)


def read_number(text: str) -> Fraction | None:
    """The number that a text is, and nothing else but blanks, emphasis or a full stop; None for other texts."""
    quantity = read_quantity(normalised(text).strip().strip("*_`").strip().removesuffix("."))
    return None if quantity is None else quantity.value


def _marked(text: str, mark: re.Match[str]) -> Quantity | None:
    if mark[0].startswith("\\boxed"):
        claim = _braced(text, mark.end())
        if _NO_BOXED_NUMBER.search(claim):
            return None
    else:
        claim = text[mark.end() :].lstrip(" \t:=*_$" + LINE_ENDS)
        end = _CLAUSE_END.search(claim)
        claim = claim[: end.start()] if end else claim
    if "=" in claim and _SEVERAL.search(claim):
        return None
    claim = claim.rpartition("=")[2]
    if _BEYOND.search(claim):
        return None
    number = next(find_numbers(claim), None)
    if number is None or _NO_CLAIM_BEFORE.search(claim[: number.start]) or _NO_CLAIM_BEHIND.match(claim, number.end):
        return None
    return number


def _braced(text: str, start: int) -> str:
    """What stands from `start` to the brace that closes it, or to the end of the text."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return text[start:]


def _unmarked(text: str) -> Quantity | None:
    """The last number, of the last sentence with a conclusion where a later one has none."""
    numbers = list(find_numbers(text))
    if not numbers or _REFUSES.search(text):
        return None
    ends = [0, *(end.end() for end in _CLAUSE_END.finditer(text)), len(text)]
    for start, end in reversed(list(pairwise(ends))):
        inside = [number for number in numbers if start <= number.start < end]
        # A line without words is a step or a bare result, not a remark that follows the conclusion.
        if inside and (_CONCLUDES.search(text[start:end]) or not re.search(r"[^\W\d_]", text[start:end])):
            return inside[-1]
    return numbers[-1]

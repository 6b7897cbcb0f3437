"""Reading the number that an answer claims."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

# A minus is a sign of the number unless an operand stands before it; then it is a subtraction.
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


def extract_answer(text: str) -> Fraction | None:
    """The exact number that an answer claims, or None.

    The last "####", "The answer is", "Answer: 7", "La respuesta es" or \\boxed{} decides: the first number behind it,
    or, where an equation follows ("is 3 + 4 = 7"), the one behind the last "=" of the sentence. A mark without a number
    behind it claims nothing. Without a mark the last number of the text counts. Accepted are signs, decimals ("3.50"),
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
    """Whether two texts claim the same number; False if either claims none."""
    claimed = extract_answer(answer)
    return claimed is not None and claimed == extract_answer(reference)

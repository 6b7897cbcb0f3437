"""Numbers as people and models write them: groups, decimals, powers of ten, fractions, currency, LaTeX."""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

# Longer digits and larger exponents are no answers, and would take time and memory.
MAX_DIGITS = 400
MAX_EXPONENT = 400

_GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d])|\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+"
_SPACED = r"\d{1,3}(?:[ '’_]\d{3})+(?:[.,]\d+)?(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?!\d)"
_DECIMAL = r"\d+,\d+(?!\d*,\d)|\d*\.\d+|\d+\.(?=\\overline)|\d+"
_DIGITS = rf"(?:{_GROUPED}|{_SPACED}|{_DECIMAL})"
# The plain form, for patterns of other modules that only ask whether a number follows.
NUMBER = r"\d[\d,.]*|\.\d+"
_WHOLE = re.compile(
    # A minus is a sign of the number unless an operand stands before it; then it is a subtraction.
    r"(?<![\w.^])(?<!\d,)(?P<sign>(?:(?<![)\]%])[-−–]\s?)?)(?:(?:US|A|C)?[$€£¥₹]\s?(?P<inner>[-−–]?))?"
    rf"(?P<digits>{_DIGITS})"
    r"(?P<mixed>[ ](?P<over>\d{1,4})/(?P<under>\d{1,4})(?![\d/]))?"
    r"(?P<repeat>\\overline\{\d+\})?"
    r"(?:[eE](?P<power>[-+−]?\d+)(?![\w.])|\s?[×*x·]\s?10\s?(?:\^|\*\*)\s?[{(]?(?P<times>[-+−]?\d+)[)}]?"
    r"|\s?(?:\^|\*\*)\s?[{(]?(?P<raised>[-+−]?\d+)[)}]?)?"
    r"(?:\s?/\s?(?P<below>\d+(?:\.\d+)?)(?!\d))?"
    r"(?P<tail>\s?%|\s?‰|\s?per ?cent\b|\s(?:thousand|million|billion|trillion)\b|k\b)?",
    re.IGNORECASE,
)
_POWERS = {"thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWERS |= {"‰": Fraction(1, 1000)}
# Digits that are no number: versions, clock times, ratios, dates, lists without blanks, pairs in brackets, other bases.
_NO_NUMBER = re.compile(
    r"(?<![\w.,])(?:\d+(?:\.\d+){2,}(?![\d,])(?<!\.\d\d\d)|\d+(?::\d+)+|\d+(?:/\d+){2,}|(?<=[(\[])\d+,\d{1,2}(?=[)\]])"
    r"|\d+(?:,\d{1,2}){2,}(?![\d,])|\d+(?:-\d+){2,}|0[xX][\da-fA-F]+|0[bB][01]+|\d+_(?:\d(?!\d\d)|\{\d+\}))"
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED = re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_EMPHASIS = re.compile(r"(?<!\w)_{1,3}(?=[-−$€£.\d])")
# One star on each side, where it cannot be a product.
_STARRED = re.compile(r"(?<![\w*)\]}])(?<![\d)\]}] )\*([-−–+$€£¥]{0,2}[.\d][^*\n]{0,40}?)\*(?![\w*(\\])(?! [\d(\\])")
_SEPARATORS = str.maketrans("٫٬", ".,")
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_VULGAR = re.compile(r"(\d?)([¼½¾⅐-⅞↉])")

_BLANKS = "\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
_LATEX_BLANK = re.compile(r"\\(?:[,;: >]|quad\b|qquad\b|enspace\b|thinspace\b|medspace\b|thickspace\b)|(?<!\\)~")
_LATEX_GONE = re.compile(
    r"\\!|\\(?:left|right|displaystyle|textstyle|limits|big|Big|bigg|Bigg)(?![A-Za-z])|\\[()\[\]]"
    r"|\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b|\\negthinspace\b"
)
_LATEX_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|operatorname|bf|rm|bm"
    r"|boldsymbol|underline|emph|fbox|hphantom|color\{\w+\})\*?\s*\{([^{}]*)\}"
)
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_LATEX_OVER = re.compile(r"\{([^{}\\]{0,60})\\over(?![A-Za-z])([^{}\\]{0,60})\}")
_LATEX_REPEAT = re.compile(r"\\(?:bar|dot)\s*\{?\s*(\d+)\s*\}?|\\overline\s*\{\s*(\d+)\s*\}")
_LATEX_SIGNS = {"\\times": "×", "\\cdot": "·", "\\div": "÷", "\\%": "%", "\\$": "$", "\\approx": "≈", "\\le": "≤"}
_LATEX_SIGN = re.compile(r"\\(?:times|cdot|div|approx)(?![A-Za-z])|\\[%$]")
_PLAIN_FRACTION = re.compile(r"\d+(?:[.,]\d+)?")


class Quantity(NamedTuple):
    """A number in a text: its value, whether in per cent, and where it stands."""

    value: Fraction
    percent: bool
    start: int
    end: int


def find_numbers(text: str) -> Iterator[Quantity]:
    """Yields the numbers of a text that `normalised` made, in order."""
    barred = [match.span() for match in _NO_NUMBER.finditer(text)]
    for match in _WHOLE.finditer(text):
        if any(start < match.end() and match.start() < end for start, end in barred):
            continue
        value = _value(match)
        if value is not None:
            yield Quantity(value, bool(match["tail"]) and match["tail"].strip()[0] in "%pP", match.start(), match.end())


def read_quantity(text: str) -> Quantity | None:
    """The number that a whole text is, or None."""
    quantity = next(find_numbers(text), None)
    return quantity if quantity is not None and (quantity.start, quantity.end) == (0, len(text)) else None


def normalised(text: str) -> str:
    """The text with one form of blanks, digits and fractions, and without what LaTeX does to a number."""
    if not text.isascii():
        text = _VULGAR.sub(_plain_fraction, text)
        text = _RAISED.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
        text = unicodedata.normalize("NFKC", re.sub(f"[{_BLANKS}]", " ", text)).replace("⁄", "/")
        text = _FOREIGN_DIGIT.sub(lambda match: str(unicodedata.digit(match[0])), text.translate(_SEPARATORS))
    text = _without_latex(text) if "\\" in text or "{,}" in text else text
    text = _STARRED.sub(r"\1", text) if "*" in text else text
    return _EMPHASIS.sub("", text) if "_" in text else text


def _without_latex(text: str) -> str:
    text = _LATEX_GONE.sub("", text.replace("{,}", ","))
    text = _LATEX_SIGN.sub(lambda match: _LATEX_SIGNS[match[0]], _LATEX_BLANK.sub(" ", text))
    for _ in range(4):  # as deep as they stand in each other
        shorter = _LATEX_TEXT.sub(r" \1", text)
        if shorter == text:
            break
        text = shorter
    text = _LATEX_OVER.sub(r"\\frac{\1}{\2}", text)
    text = _LATEX_REPEAT.sub(lambda match: f"\\overline{{{match[1] or match[2]}}}", text)
    return _LATEX_FRACTION.sub(_latex_fraction, text)


def _latex_fraction(match: re.Match[str]) -> str:
    """`a/b` of a fraction of two numbers, with a blank before it behind a digit; other fractions stay."""
    above, below = (re.sub(r"\s", "", part) for part in (match[1] or match[2] or "", match[3] or match[4] or ""))
    sign = "-" if above[:1] in ("-", "−") else ""
    above = above.lstrip("-−")
    if not (_PLAIN_FRACTION.fullmatch(above) and _PLAIN_FRACTION.fullmatch(below)):
        return match[0]
    before = match.string[: match.start()].rstrip()
    return (" " if before[-1:].isdigit() else "") + f"{sign}{above}/{below}"


def _plain_fraction(match: re.Match[str]) -> str:
    written = unicodedata.normalize("NFKC", match[2]).replace("⁄", "/")
    return f"{match[1]} {written}" if match[1] else written


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a number, None for one that is too long, too large or divided by zero."""
    if match.end() - match.start() > MAX_DIGITS:
        return None
    value = _mantissa(match["digits"], match["repeat"])
    if match["mixed"]:
        over, under = int(match["over"]), int(match["under"])
        if not 0 < over < under:
            return None
        value += Fraction(over, under)
    if match["below"]:
        below = Fraction(match["below"])
        if not below:
            return None
        value /= below
    value = _raised(value, match)
    if value is None:
        return None
    word = (match["tail"] or "").strip().lower()
    value *= _POWERS.get(word, 1)
    return -value if bool(match["sign"]) != bool(match["inner"]) else value


def _raised(value: Fraction, match: re.Match[str]) -> Fraction | None:
    ten = match["power"] or match["times"]
    exponent = int((ten or match["raised"] or "0").replace("−", "-"))
    if abs(exponent) > MAX_EXPONENT:
        return None
    if ten:
        return value * Fraction(10) ** exponent
    if not match["raised"]:
        return value
    return None if not value and exponent < 0 else value**exponent


def _mantissa(digits: str, repeat: str | None) -> Fraction:
    """The value of digits: the last comma or point may be the decimal one, others are between groups."""
    digits = re.sub(r"[ '’_]", "", digits)
    if "," in digits and "." in digits:
        decimal = max(digits.rfind(","), digits.rfind("."))
        digits = re.sub(r"[.,]", "", digits[:decimal]) + "." + digits[decimal + 1 :]
    elif digits.count(".") > 1 or re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}", digits):
        digits = re.sub(r"[.,]", "", digits)
    else:
        digits = digits.replace(",", ".")
    value = Fraction(digits if digits[0] != "." else "0" + digits)
    if repeat:
        cycle = re.sub(r"\D", "", repeat)
        places = len(digits.partition(".")[2])
        value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**places)
    return value

"""Checked arithmetic: the <<a+b=c>> annotations of GSM8K solutions, and equations as people write them in a text."""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

from .written_numbers import normalised

ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
ARITHMETIC: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_NUMBER = r"(?:\$\s?)?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d])|\d+(?:\.\d+)?|\.\d+)%?"
_OPERAND = rf"(?:[(-]\s?)*{_NUMBER}(?:\s?\))*"
_EXPRESSION = re.compile(rf"{_OPERAND}(?:\s*[-+*/]\s*{_OPERAND})*")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "∗": "*", "＝": "=", "＋": "+"})
_TIMES = re.compile(r"(?<=[\d)%])\s?[xX]\s?(?=[\d($.])")
# Words behind a number that an operator or the sign of equality follows: "5 apples + 3 apples = 8 apples".
_UNIT = re.compile(r"(?<=[\d)%])\s?([A-Za-z]{2,}(?:\s[A-Za-z]{2,}){0,2})\s?(?=[-+*/=])")
_LIST_MARK = re.compile(r"\s*(?:[-*•]\s+|\(?\d{1,2}[.)]\s+)")
_WORD = re.compile(r"\s?([A-Za-z]{2,})")
# What stands before or behind an equation that is a part of a longer one, which is not read.
_GOES_ON_BEFORE = re.compile(
    r"(?:[-+*/^√=<>!%)\]}~≈\d]|(?<![A-Za-z])[A-Za-z]|\b(?:times|plus|minus|over|by|of|and|from|than|half|per))\s*$",
    re.IGNORECASE,
)
_GOES_ON_BEHIND = re.compile(r"[A-Za-z(^!]|\s*[*/^+×]|\s+-\s|\s+(?:\d|(?:times|plus|minus|over)\b)|\s*[A-Za-z]\b")


def step_label(line: str) -> int:
    """1 when every <<a+b=c>> equation of a line holds, -1 when one does not, 0 when it has none that can be read.

    The right side may be rounded or cut to the decimals it shows (10/3=3.33), an integer must be exact.
    """
    verdicts = [verdict for text in ANNOTATION.findall(line) if (verdict := equation_holds(text)) is not None]
    return 0 if not verdicts else (1 if all(verdicts) else -1)


def found_equations(text: str) -> list[bool]:
    """Whether each equation of numbers in a text is true, in order: "She makes 9 * 2 = $18" is one.

    Numbers are those of `arithmetic`, with the words of units behind them ("5 apples + 3 apples = 8 apples"). Each side
    of "=" is compared with the next one; in a sloppy chain ("16-3 = 13*2 = 26") also with the number that begins it.
    What may be a part of something else ("x + 2 + 3 = 8", "2^3 + 1 = 9"), or needs a change of units ("3 * 20 minutes =
    1 hour"), counts where it is true, and is no equation where it is not.
    """
    verdicts = [equation_holds(annotation) for annotation in ANNOTATION.findall(text)] if "<<" in text else []
    if "=" in text:
        plain = normalised(ANNOTATION.sub("", text)).translate(_SIGNS)
        verdicts += [verdict for line in plain.split("\n") if "=" in line for verdict in _line_verdicts(line)]
    return [verdict for verdict in verdicts if verdict is not None]


def _line_verdicts(line: str) -> Iterator[bool | None]:
    units: set[str] = set()

    def without_unit(match: re.Match[str]) -> str:
        units.update(match[1].lower().split())
        return " "

    mark = _LIST_MARK.match(line)
    line = _UNIT.sub(without_unit, _TIMES.sub("*", line[mark.end() :] if mark else line))
    for left, right in pairwise(_EXPRESSION.finditer(line)):
        if line[left.end() : right.start()].strip() == "=":
            yield _pair_holds(line, left, right, units)


def _pair_holds(line: str, left: re.Match[str], right: re.Match[str], units: set[str]) -> bool | None:
    """Whether two expressions with "=" between them are equal; None where that cannot be said."""
    if not any(_has_operator(side[0]) for side in (left, right)):
        return None
    first = re.match(_OPERAND, right[0])
    sides = [right[0], *([first[0]] if first and first[0] != right[0] else [])]
    verdicts = [verdict for side in sides for verdict in _readings(left[0], side)]
    if any(verdicts):
        return True
    word = _WORD.match(line, right.end())
    is_other_unit = bool(units) and not (word and word[1].lower() in units)
    before = line[max(0, left.start() - 40) : left.start()]
    is_part = _GOES_ON_BEFORE.search(before) or _GOES_ON_BEHIND.match(line, right.end())
    is_signed = left[0][0] == "-" and before.strip()[-1:].isalnum()
    return None if is_part or is_signed or is_other_unit or not verdicts else False


def _readings(left: str, right: str) -> list[bool]:
    """Whether left = right holds, in per cent and in cents too, where the right side is written in them."""
    forms = [right]
    if right.endswith("%"):
        forms.append(right[:-1])
    if "$" in right and "$" not in left:
        forms.append(f"100*({right})")
    return [verdict for form in forms if (verdict := equation_holds(f"{left}={form}")) is not None]


def _has_operator(expression: str) -> bool:
    return re.search(r"[\d)%]\s*[-+*/]", expression) is not None


def equation_holds(text: str) -> bool | None:
    """Whether an equation such as "3*4=12" is true; None when it is no equation of numbers."""
    left, *others = text.split("=")
    if not others:
        return None
    values = [arithmetic(side) for side in (left, *others)]
    if any(value is None for value in values):
        return None
    decimals = len(others[-1].strip().rpartition(".")[2]) if "." in others[-1] else 0
    stated = values[-1]
    slack = (10.0**-decimals if decimals else 0.0) + 1e-9 * max(1.0, abs(stated))
    return all(abs(value - stated) <= slack for value in values)


def arithmetic(text: str) -> float | None:
    """Value of an expression of numbers, + - * / and brackets ("$", "," and "%" as people write them), else None."""
    plain = re.sub(r"[$,_\s]", "", text)
    plain = re.sub(r"(\d+\.?\d*|\.\d+)%", r"(\1/100)", plain)
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain)
    if not re.fullmatch(r"[\d.+\-*/()]{1,200}", plain) or "**" in plain or "//" in plain:
        return None
    try:
        return evaluate(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def evaluate(node: ast.expr) -> float | None:
    """Value of a parsed arithmetic expression, None when it holds anything else."""
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = evaluate(node.operand)
        return value if value is None or isinstance(node.op, ast.UAdd) else -value
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = evaluate(node.left), evaluate(node.right)
        return None if left is None or right is None else ARITHMETIC[type(node.op)](left, right)
    return None

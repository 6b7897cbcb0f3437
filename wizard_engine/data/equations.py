"""Checked arithmetic: the <<a+b=c>> annotations of GSM8K solutions."""

import ast
import operator
import re
from collections.abc import Callable

ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
ARITHMETIC: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def step_label(line: str) -> int:
    """1 when every <<a+b=c>> equation of a line holds, -1 when one does not, 0 when it has none that can be read.

    The right side may be rounded or cut to the decimals it shows (10/3=3.33), an integer must be exact.
    """
    verdicts = [verdict for text in ANNOTATION.findall(line) if (verdict := equation_holds(text)) is not None]
    return 0 if not verdicts else (1 if all(verdicts) else -1)


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

"""Solutions in the styles that natural answers have, and the checks that a program can make on any answer."""

import random
import re
from collections import Counter
from collections.abc import Sequence

from . import vocabulary as words
from .problems import Apply, Equation, Problem, calculate, exactly
from .render import noun_of

STYLES = ("good", "terse", "careless", "wrong", "rambling", "refusal")

_EQUATION = re.compile(r"(?<![0-9])([0-9]{1,6}) *([-+*/]) *([0-9]{1,6}) *= *(-?[0-9]{1,6})(?![0-9])")
_CLAIM = re.compile(r"(?:[Aa]nswer is|respuesta es|####) *(-?[0-9]{1,6})(?![0-9])")
_NUMBER = re.compile(r"-?[0-9]{1,6}(?![0-9])")
_BARE = re.compile(r"\s*-?[0-9]{1,6}\.?\s*")
_ASKS = re.compile(r"please provide|what do you mean", re.IGNORECASE)
_SLIPS = (1, -1, 2, -2, 10, -10)


def solve(problem: Problem, style: str = "good", rng: random.Random | None = None) -> str:
    """An answer to the problem in a style.

    good: one equation a line, then `The answer is N.`; terse: the result alone; careless: one slip of arithmetic that
    is carried on; wrong: another operation, or a statement ignored; rambling: right, with chat around and between the
    steps; refusal: an apology. A problem without an answer is asked back, whatever the style.

    Args:
        rng: source of the choices a style leaves open; needed for every style but good and refusal.
    Raises:
        ValueError: unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style!r}; choose one of them")
    if style == "refusal":
        return words.REFUSAL[problem.language]
    if problem.defect:
        return words.ASK_BACK[problem.language]
    rng = rng or random.Random(0)
    if style == "good":
        return written(problem, problem.equations())
    if style == "terse":
        return terse(problem, problem.value, rng)
    if style == "careless":
        return written(problem, careless_trace(problem, rng))
    if style == "wrong":
        return wrong_solution(problem, rng)
    return rambling(problem, problem.equations(), rng)


def written(problem: Problem, equations: Sequence[Equation], value: int | None = None) -> str:
    """Equations, one a line, and the final line with `value` (by default the last equation's result)."""
    if value is None:
        value = equations[-1].result if equations else problem.value
    return "\n".join([*map(str, equations), words.FINAL[problem.language].format(value)])


def terse(problem: Problem, value: int, rng: random.Random) -> str:
    """The number alone, as a sentence or bare."""
    return words.FINAL[problem.language].format(value) if rng.random() < 0.6 else f"{value}."


def rambling(problem: Problem, equations: Sequence[Equation], rng: random.Random, is_rude: bool = False) -> str:
    """Equations between lines of chat, ended by the final line; about two lines of chat for each equation."""
    language = problem.language
    lines = [rng.choice(words.OPENERS[language]).format(n=noun_of(problem))]
    if is_rude:
        lines.insert(0, words.RUDE_ANSWER[language])
    for index, equation in enumerate(equations):
        if index and rng.random() < 0.7:
            lines.append(rng.choice(words.LINKS[language]))
        lines.append(str(equation))
    if rng.random() < 0.6:
        lines.append(rng.choice(words.CLOSERS[language]))
    value = equations[-1].result if equations else problem.value
    return "\n".join([*lines, words.FINAL[language].format(value)])


def careless_trace(problem: Problem, rng: random.Random) -> list[Equation]:
    """The problem's equations with one slip, carried on; every number stays non-negative."""
    while True:
        slip = rng.randrange(max(1, len(problem.equations())))
        equations = problem.trace(_slipping(slip, rng.choice(_SLIPS)))
        if all(equation.result >= 0 for equation in equations):
            return equations


def _slipping(slip: int, error: int) -> Apply:
    def apply(index: int, operation: str, left: int, right: int) -> tuple[str, int]:
        return operation, calculate(operation, left, right) + (error if index == slip else 0)

    return apply


def wrong_solution(problem: Problem, rng: random.Random) -> str:
    """A solution with a wrong operation or without one of the statements; its result is never the right one."""
    shorter = problem.statements[:1] + problem.statements[2:]
    if len(problem.statements) > 2 and problem.statements[1].kind != "share" and rng.random() < 0.4:
        ignoring = problem.changed(statements=shorter)
        if not ignoring.defect and ignoring.value != problem.value:
            return written(problem, ignoring.equations(), ignoring.value)
    for _ in range(20):
        equations = problem.trace(_mistaking(rng.randrange(len(problem.equations())), rng))
        if equations[-1].result != problem.value and all(equation.result >= 0 for equation in equations):
            return written(problem, equations)
    return words.FINAL[problem.language].format(problem.value + rng.choice((1, 2, 10)))


def _mistaking(wrong: int, rng: random.Random) -> Apply:
    def apply(index: int, operation: str, left: int, right: int) -> tuple[str, int]:
        if index == wrong:
            options = [other for other in "+-" if other != operation and calculate(other, left, right) >= 0]
            operation = rng.choice(options or [operation])
        return exactly(index, operation, left, right)

    return apply


def claimed_answer(text: str) -> int | None:
    """The number that an answer claims: after the last "answer is", else its last number; None without a number."""
    claims = _CLAIM.findall(text) or _NUMBER.findall(text)
    return int(claims[-1]) if claims else None


def states_answer(line: str) -> bool:
    """Whether a line says "the answer is N" in one of the languages."""
    return _CLAIM.search(line) is not None


def asks_back(text: str) -> bool:
    """Whether an answer asks for what the problem leaves out."""
    return _ASKS.search(text) is not None


def check_answer(problem: Problem, text: str) -> bool:
    """Whether an answer claims the right number; for a problem without one, whether it asks back."""
    if problem.defect:
        return asks_back(text)
    return claimed_answer(text) == problem.value


def label_steps(problem: Problem, steps: Sequence[str]) -> list[int]:
    """A label for each step of an answer.

    1: an equation of the problem, arithmetic right (operands of + and * may be swapped, any order), or the right final
    number. -1: wrong arithmetic, an operation that the problem does not have, a broken equation, a wrong final number.
    0: chat, and an equation written more often than the problem needs it. In an answer to a problem that has no number,
    asking back is 1, and any number is -1.
    """
    if problem.defect:
        return [1 if asks_back(step) else -1 if _NUMBER.search(step) else 0 for step in steps]
    left = Counter(equation.canonical() for equation in problem.equations())
    known = set(left)
    return [_label(step, problem.value, left, known) for step in steps]


def _label(step: str, value: int, left: Counter, known: set[tuple]) -> int:
    labels = []
    for match in _EQUATION.finditer(step):
        equation = Equation(int(match[1]), match[2], int(match[3]), int(match[4]))
        canonical = equation.canonical()
        if canonical not in known:
            labels.append(-1)
            continue
        labels.append(1 if left[canonical] > 0 else 0)
        left[canonical] -= 1
    claims = _CLAIM.findall(step) or (_NUMBER.findall(step) if _BARE.fullmatch(step) else [])
    labels += [1 if int(claim) == value else -1 for claim in claims]
    if step.count("=") > sum(1 for _ in _EQUATION.finditer(step)):
        labels.append(-1)
    return min(labels, default=0)

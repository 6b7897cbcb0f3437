"""Word problems as expression trees: statements about one or two people, a question, and the equations that answer it.

The running amount of the main person, an amount of a second person that may be compared with it, and boxes (products
as operands) make trees with shared parts, not only chains. A sound problem keeps every value whole and in 0..49.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from . import vocabulary as words

LARGEST = 49
LARGEST_OPERAND = 20
FACTORS = (2, 3, 4, 5)
LARGEST_EACH = 12
MAX_OPERATIONS = 5
HELD_OUT_SHARE = 8

CHAIN_KINDS = ("gain", "lose", "scale", "share")
COMPARISONS = ("more", "fewer", "times")
OTHER_KINDS = ("other", *COMPARISONS)
KIND_OPERATION = {
    "gain": "+",
    "lose": "-",
    "scale": "*",
    "share": "/",
    "more": "+",
    "fewer": "-",
    "times": "*",
}


class Quantity(NamedTuple):
    """A number (`each` is None), boxes of things (count times each), or an unknown number (`count` is None)."""

    count: int | None
    each: int | None = None


class Statement(NamedTuple):
    """One sentence of a problem; kinds are start, gain, lose, scale, share, other, more, fewer, times."""

    kind: str
    amount: Quantity


class Equation(NamedTuple):
    """`left operation right = result`, as one step of a solution writes it."""

    left: int
    operation: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operation}{self.right}={self.result}"

    def canonical(self) -> tuple:
        """The equation with the operands of + and * in order, so that swapped operands compare equal."""
        left, right = (self.left, self.right)
        if self.operation in "+*" and left > right:
            left, right = right, left
        return (left, self.operation, right, self.result)

    def is_right(self) -> bool:
        """Whether the arithmetic holds."""
        if self.operation == "/":
            return self.right != 0 and self.left == self.right * self.result
        return self.result == calculate(self.operation, self.left, self.right)


def calculate(operation: str, left: int, right: int) -> int:
    """`left operation right`; a division is rounded down, division by zero gives 0."""
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    if operation == "*":
        return left * right
    return left // right if right else 0


# (index of the step, operation, left, right) -> (operation, result); the hook that styles of answers use to err.
Apply = Callable[[int, str, int, int], tuple[str, int]]


def exactly(index: int, operation: str, left: int, right: int) -> tuple[str, int]:
    """The step done right."""
    return operation, calculate(operation, left, right)


@dataclass(frozen=True)
class Problem:
    """A word problem, without its wording.

    Args:
        language: "en" or "es".
        noun: English plural of what is counted (a key of vocabulary.NOUN_TOPIC).
        person: the main person (a name, or "someone"); other: the second person or None.
        statements: a start, then gain / lose / scale, then at most one share or one statement about the other person.
        question: "has" (main person), "other" (second person), "total" (both) or "each" (of the friends).
    """

    language: str
    noun: str
    person: str
    other: str | None
    statements: tuple[Statement, ...]
    question: str

    @property
    def topic(self) -> str:
        """The noun's topic, or "general" for things."""
        return words.NOUN_TOPIC[self.noun]

    @cached_property
    def skeleton(self) -> str:
        """Statements, numbers and question without names, nouns and language."""
        parts = []
        for kind, (count, each) in self.statements:
            number = "?" if count is None else str(count)
            parts.append(f"{kind}:{number}" if each is None else f"{kind}:{number}x{each}")
        return "|".join(parts) + "|" + self.question

    @property
    def key(self) -> str:
        """Canonical identity, free of wording: what is counted, the statements with their numbers, the question."""
        return f"{self.noun}|{self.skeleton}"

    @property
    def is_vague(self) -> bool:
        """Whether a number is missing."""
        return any(statement.amount.count is None for statement in self.statements)

    @cached_property
    def is_held_out(self) -> bool:
        """Whether the problem belongs to the eighth of all problems that is kept for evaluation.

        It depends on the skeleton alone, so no held-out problem is seen with another noun, name or language either. A
        problem with a missing number is none that could be evaluated, so never held out.
        """
        if self.is_vague:
            return False
        digest = hashlib.blake2b(self.skeleton.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0

    def trace(self, apply: Apply = exactly) -> list[Equation]:
        """The equations in order, each computed by `apply`, whose results are carried on. Empty for a vague problem."""
        if self.is_vague:
            return []
        steps: list[Equation] = []

        def step(operation: str, left: int, right: int) -> int:
            operation, result = apply(len(steps), operation, left, right)
            steps.append(Equation(left, operation, right, result))
            return result

        def amount_of(quantity: Quantity) -> int:
            return quantity.count if quantity.each is None else step("*", quantity.count, quantity.each)

        value = other = 0
        for kind, quantity in self.statements:
            operand = amount_of(quantity)
            if kind == "start":
                value = operand
            elif kind in CHAIN_KINDS:
                value = step(KIND_OPERATION[kind], value, operand)
            else:
                other = operand if kind == "other" else step(KIND_OPERATION[kind], value, operand)
        if self.question == "total":
            step("+", value, other)
        return steps

    def equations(self) -> list[Equation]:
        """The expected steps in order; empty for a vague problem."""
        return list(self._equations)

    @cached_property
    def _equations(self) -> list[Equation]:
        return self.trace()

    @cached_property
    def defect(self) -> str:
        """Why the problem has no answer: "vague", "negative", "fraction", "large", or "" for a sound problem."""
        if self.is_vague:
            return "vague"
        for equation in self._equations:
            if equation.result < 0:
                return "negative"
            if not equation.is_right():
                return "fraction"
            if equation.result > LARGEST:
                return "large"
        return ""

    @property
    def value(self) -> int | None:
        """The answer, or None for a problem that has none."""
        if self.defect:
            return None
        return self._equations[-1].result if self._equations else self.statements[0].amount.count

    @cached_property
    def operations(self) -> int:
        """Number of operations, the world's measure of difficulty."""
        boxes = sum(statement.amount.each is not None for statement in self.statements)
        acting = sum(statement.kind in KIND_OPERATION for statement in self.statements)
        return boxes + acting + (self.question == "total")

    @property
    def skill(self) -> str:
        """ "additive", "multiplicative", "comparison", "division", or "mixed" when two of the last three meet."""
        kinds = {statement.kind for statement in self.statements}
        skills = []
        if "scale" in kinds or any(statement.amount.each is not None for statement in self.statements):
            skills.append("multiplicative")
        if kinds & set(COMPARISONS):
            skills.append("comparison")
        if "share" in kinds:
            skills.append("division")
        return skills[0] if len(skills) == 1 else "mixed" if skills else "additive"

    def changed(self, **changes: object) -> "Problem":
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def is_well_formed(self) -> bool:
        """Whether statements, people and question fit together (the problem may still be vague or have a defect)."""
        kinds = [statement.kind for statement in self.statements]
        if not kinds or kinds[0] != "start" or "start" in kinds[1:]:
            return False
        last = kinds[-1]
        if any(kind in OTHER_KINDS or kind == "share" for kind in kinds[:-1]):
            return False
        if (self.other is not None) != (last in OTHER_KINDS) or self.other == self.person:
            return False
        allowed = ("each",) if last == "share" else ("other", "total") if last in COMPARISONS else ("has",)
        if last == "other":
            allowed = ("total",)
        return self.question in allowed and all(_is_amount(*statement) for statement in self.statements)


def _is_amount(kind: str, amount: Quantity) -> bool:
    if kind in ("start", "gain", "lose", "other"):
        return True
    return amount.each is None and amount.count is not None


# Ends of a problem with their cost in operations; the rest of the budget goes to the start and the chain.
_ENDS = (("has", None, 0), ("each", "share", 1), ("total", "other", 1), ("other", "cmp", 1), ("total", "cmp", 2))
_END_WEIGHTS = {1: (60, 9, 9, 22, 0), 2: (45, 9, 12, 19, 15), 3: (45, 9, 12, 16, 18), 4: (45, 9, 12, 16, 18)}


def random_problem(
    rng: random.Random,
    *,
    operations: int,
    language: str = "en",
    topic: str = "market",
    person: str | None = None,
    held_out: bool | None = False,
) -> Problem:
    """A random sound problem.

    Args:
        operations: 1..5, exactly how many operations the problem takes.
        topic: a topic's name; "general" counts things.
        person: the main person; drawn from the names when None.
        held_out: True or False picks the side of the held-out boundary, None takes either.
    Raises:
        ValueError: operations outside 1..5.
    """
    if not 1 <= operations <= MAX_OPERATIONS:
        raise ValueError(f"operations: expected 1..{MAX_OPERATIONS}, got {operations}; ask for fewer or more")
    noun = rng.choice(tuple(words.TOPICS[topic].nouns))
    names = rng.sample(tuple(words.NAMES), 2)
    while True:
        problem = _attempt(rng, operations, language, noun, person or names[0], names[1])
        if problem is None or problem.other == problem.person:
            names = rng.sample(tuple(words.NAMES), 2)
            continue
        if held_out is None or problem.is_held_out == held_out:
            return problem


def _attempt(rng: random.Random, operations: int, language: str, noun: str, person: str, other: str) -> Problem | None:
    question, end, cost = rng.choices(_ENDS, _END_WEIGHTS[min(operations, 4)])[0]
    budget = operations - cost
    boxes_in_other = end == "other" and budget > 0 and rng.random() < 0.3
    budget -= boxes_in_other
    is_boxed = budget > 0 and rng.random() < (0.2 if operations > 1 else 0.12)
    start = random_boxes(rng) if is_boxed else Quantity(rng.randint(2, LARGEST_OPERAND))
    value = start.count * (start.each or 1)
    statements = [Statement("start", start)]
    budget -= is_boxed
    while budget > 0:
        added = random_step(rng, value, budget)
        if added is None:
            return None
        statement, value = added
        budget -= 1 + (statement.amount.each is not None)
        statements.append(statement)
    if end is not None:
        last = _random_end(rng, end, value, boxes_in_other)
        if last is None:
            return None
        statements.append(last)
    second = other if end in ("other", "cmp") else None
    problem = Problem(language, noun, person, second, tuple(statements), question)
    return problem if not problem.defect else None


def random_boxes(rng: random.Random, largest: int = LARGEST) -> Quantity | None:
    """Boxes (2..5 of 2..12 each) whose product is at most `largest`, or None if there are none."""
    if largest < 4:
        return None
    count = rng.choice([factor for factor in FACTORS if factor * 2 <= largest])
    return Quantity(count, rng.randint(2, min(LARGEST_EACH, largest // count)))


def random_step(
    rng: random.Random, value: int, budget: int = 1, kinds: tuple[str, ...] = ("gain", "lose", "scale")
) -> tuple[Statement, int] | None:
    """A statement that changes a running `value` and the value after it, at a cost of at most `budget` operations."""
    kind = rng.choices(kinds, [1 if kind == "scale" else 4 for kind in kinds])[0]
    if kind == "scale":
        factors = [factor for factor in FACTORS if factor * value <= LARGEST and 2 <= value <= LARGEST_OPERAND]
        if not factors:
            return None
        factor = rng.choice(factors)
        return Statement("scale", Quantity(factor)), value * factor
    room = LARGEST - value if kind == "gain" else value - 1
    amount = random_boxes(rng, room) if budget > 1 and rng.random() < 0.35 else None
    if amount is None:
        if room < 1:
            return None
        amount = Quantity(rng.randint(1, min(LARGEST_OPERAND, room)))
    size = amount.count * (amount.each or 1)
    return Statement(kind, amount), value + size if kind == "gain" else value - size


def random_comparison(rng: random.Random, value: int, kinds: tuple[str, ...] = COMPARISONS) -> Statement | None:
    """A comparison of the second person with a main person who has `value`, or None if the drawn kind does not fit."""
    kind = rng.choice(kinds)
    if kind == "times":
        factors = [factor for factor in FACTORS if factor * value <= LARGEST and 2 <= value <= LARGEST_OPERAND]
        return Statement("times", Quantity(rng.choice(factors))) if factors else None
    room = LARGEST - value if kind == "more" else value - 1
    return Statement(kind, Quantity(rng.randint(2, min(LARGEST_OPERAND, room)))) if room >= 2 else None


def _random_end(rng: random.Random, end: str, value: int, is_boxed: bool) -> Statement | None:
    if end == "cmp":
        return random_comparison(rng, value)
    if end == "share":
        friends = [count for count in FACTORS if value % count == 0 and 1 < value // count <= LARGEST_OPERAND]
        return Statement("share", Quantity(rng.choice(friends))) if friends else None
    return Statement("other", random_boxes(rng) if is_boxed else Quantity(rng.randint(2, LARGEST_OPERAND)))

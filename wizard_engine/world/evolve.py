"""Evolving problems: the in-depth and in-breadth operators on parsed problems, and the ways in which evolving fails.

`evolve` is always right. `flawed` fails as language models do, at rates that depend on the rules in the method's text.
"""

import random
import re
from collections.abc import Mapping

from wizard_engine.agents import prompts

from . import vocabulary as words
from .corpus import TOPIC_SHARES, draw, make_vague
from .parse import parse
from .problems import (
    FACTORS,
    LARGEST,
    LARGEST_EACH,
    LARGEST_OPERAND,
    MAX_OPERATIONS,
    OTHER_KINDS,
    Problem,
    Quantity,
    Statement,
    random_boxes,
    random_comparison,
    random_problem,
    random_step,
)
from .render import render

OPERATORS = ("constraint", "deepen", "concretise", "steps", "complicate", "breadth")
NUMBERED = re.compile(r"^\s*(\d+)\.\s?(.*)$")
TRIES = 24
JUMP = 3  # operations more at once than a reader takes for one change
HEADINGS = ("#Rewritten Prompt#: ", "#Given Prompt#: ")

# Failure class -> the rule that prevents it, as it may stand in a method.
RULES = {
    "same": "add at least one operation",
    "heading": "do not repeat the heading",
    "vague": "keep the question answerable",
    "impossible": "keep every number below 50",
    "language": "keep the language",
    "jump": "change one thing only",
}
FAILURE_RATES = {"same": 0.12, "heading": 0.05, "vague": 0.08, "impossible": 0.10, "language": 0.04, "jump": 0.06}
RULE_EFFECT = 0.15
LONGEST_METHOD = 11  # lines; each line more, and each line said twice, brings back "same" failures
OVERLOAD = 0.10


def evolve(problem: Problem, operator: str, rng: random.Random) -> Problem | None:
    """The problem made richer by an operator; sound, outside the held-out space, at most five operations.

    constraint: some are taken away at one more point; deepen: asks about a second person, or about both; concretise:
    fills in general words and a missing number; steps: one more statement; complicate: a number becomes boxes; breadth:
    another problem of the same size on a rarer topic.

    Returns:
        The new problem, or None if the operator finds nothing to change.
    Raises:
        ValueError: unknown operator.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r}; choose one of them")
    if operator != "breadth" and problem.defect and not (operator == "concretise" and problem.is_vague):
        return None
    for _ in range(TRIES):
        changed = _CHANGES[operator](problem, rng)
        if changed is not None and is_usable(changed) and changed != problem:
            return changed
    return None


def is_usable(problem: Problem) -> bool:
    """Whether a problem is sound, small enough and not held out."""
    return not problem.defect and problem.operations <= MAX_OPERATIONS and not problem.is_held_out


def evolve_any(problem: Problem, operator: str, rng: random.Random) -> Problem | None:
    """`evolve` with the operator, or with steps or complicate where the operator finds nothing to change."""
    for attempt in dict.fromkeys((operator, "steps", "complicate")):
        changed = evolve(problem, attempt, rng)
        if changed is not None:
            return changed
    return None


def failure_rates(method: str, rates: Mapping[str, float] = FAILURE_RATES) -> dict[str, float]:
    """Rate of each failure class under a method.

    A rule takes most of its class away; an overloaded method (too long, or repeating itself) evolves less often.
    """
    text = method.lower()
    method_rates = {kind: rate * (RULE_EFFECT if RULES[kind] in text else 1.0) for kind, rate in rates.items()}
    lines = [line.lower().strip(" .-*0123456789") for line in method_rules(method) if line.strip()]
    excess = max(0, len(lines) - LONGEST_METHOD) + len(lines) - len(set(lines))
    method_rates["same"] = min(0.7, method_rates["same"] + OVERLOAD * excess)
    return method_rates


def method_rules(method: str) -> list[str]:
    """The lines of a method; of a whole prompt the numbered ones."""
    lines = method.splitlines()
    return [line for line in lines if NUMBERED.match(line)] if prompts.is_whole_prompt(method) else lines


def evolved_text(
    instruction: str, operator: str, rng: random.Random, *, method: str = "", rates: Mapping[str, float] = FAILURE_RATES
) -> str:
    """The evolved instruction, with the failures of `failure_rates(method, rates)`.

    The same generator meets the same failure under every method that has no rule against it, so methods can be compared
    on few cases. Text that is not a problem of the world is unchanged.
    """
    problem = parse(instruction)
    if problem is None:
        return instruction
    failure = _failure(method, rates, rng)
    changed = evolve_any(problem, operator, rng)
    if failure == "same" or changed is None:
        return instruction if rng.random() < 0.5 else render(problem, rng)
    return flawed(changed, failure, rng)


def _failure(method: str, rates: Mapping[str, float], rng: random.Random) -> str:
    """The failure that happens, or "": first as without rules, then prevented by a rule, then caused by overload."""
    natural = draw({**rates, "": max(0.0, 1 - sum(rates.values()))}, rng)
    prevented, overloaded = rng.random(), rng.random()
    method_rates = failure_rates(method, rates)
    if natural not in ("", "same") and prevented * rates[natural] < method_rates[natural]:
        return natural
    if natural == "same":
        return natural if prevented * rates["same"] < method_rates["same"] else ""
    spare = 1 - rates["same"]
    return "same" if overloaded * spare < method_rates["same"] - rates["same"] else ""


def flawed(problem: Problem, failure: str, rng: random.Random) -> str:
    """Text of an evolved problem with a failure: heading, vague, impossible, language, jump, or "" for none."""
    if failure == "vague":
        problem = make_vague(problem, rng)
    elif failure == "impossible":
        problem = _impossible(problem, rng) or problem
    elif failure == "language":
        problem = problem.changed(language="es" if problem.language == "en" else "en")
    elif failure == "jump":
        problem = _jump(problem, rng) or problem
    return (rng.choice(HEADINGS) if failure == "heading" else "") + render(problem, rng)


def insert(problem: Problem, index: int, statement: Statement) -> Problem:
    """The problem with one more statement before position `index`."""
    return problem.changed(statements=(*problem.statements[:index], statement, *problem.statements[index:]))


def chain_end(problem: Problem) -> int:
    """Position after the main person's running statements: where a share or the second person begins."""
    last = problem.statements[-1].kind
    return len(problem.statements) - (last == "share" or last in OTHER_KINDS)


def value_at(problem: Problem, index: int) -> int:
    """The main person's amount before statement `index` (at least 1, at most `chain_end`)."""
    head = problem.changed(statements=problem.statements[:index], other=None, question="has")
    equations = head.equations()
    return equations[-1].result if equations else head.statements[0].amount.count


def _constraint(problem: Problem, rng: random.Random) -> Problem | None:
    index = rng.randint(1, chain_end(problem))
    step = random_step(rng, value_at(problem, index), kinds=("lose",))
    return insert(problem, index, step[0]) if step else None


def _steps(problem: Problem, rng: random.Random) -> Problem | None:
    index = chain_end(problem)
    step = random_step(rng, value_at(problem, index))
    return insert(problem, index, step[0]) if step else None


def _deepen(problem: Problem, rng: random.Random) -> Problem | None:
    if problem.question == "other":
        return problem.changed(question="total")
    if problem.question != "has":
        return None
    person = rng.choice([name for name in words.NAMES if name != problem.person])
    if rng.random() < 0.3:
        added: Statement | None = Statement("other", Quantity(rng.randint(2, LARGEST_OPERAND)))
        question = "total"
    else:
        added = random_comparison(rng, problem.value)
        question = "other"
    return insert(problem, len(problem.statements), added).changed(other=person, question=question) if added else None


def _concretise(problem: Problem, rng: random.Random) -> Problem | None:
    noun, person, statements = problem.noun, problem.person, problem.statements
    if noun == words.THINGS:
        noun = rng.choice(tuple(words.TOPICS[rng.choice(words.TOPIC_NAMES)].nouns))
    if person == words.SOMEONE:
        person = rng.choice([name for name in words.NAMES if name != problem.other])
    if problem.is_vague:
        statements = tuple(
            statement._replace(amount=_filled(statement.amount, rng)) if statement.amount.count is None else statement
            for statement in statements
        )
    return problem.changed(noun=noun, person=person, statements=statements)


def _filled(amount: Quantity, rng: random.Random) -> Quantity:
    return (
        Quantity(rng.randint(2, LARGEST_OPERAND)) if amount.each is None else Quantity(rng.choice(FACTORS), amount.each)
    )


def _complicate(problem: Problem, rng: random.Random) -> Problem | None:
    plain = [
        index
        for index, (kind, amount) in enumerate(problem.statements)
        if kind in ("start", "gain", "lose", "other") and amount.each is None
    ]
    if not plain:
        return None
    index = rng.choice(plain)
    number = problem.statements[index].amount.count
    factors = [k for k in FACTORS if number % k == 0 and 2 <= number // k <= LARGEST_EACH]
    boxes = Quantity(factor := rng.choice(factors), number // factor) if factors else random_boxes(rng)
    statements = list(problem.statements)
    statements[index] = statements[index]._replace(amount=boxes)
    return problem.changed(statements=tuple(statements))


def _breadth(problem: Problem, rng: random.Random) -> Problem | None:
    rarity = {name: 1 / TOPIC_SHARES[name] for name in words.TOPIC_NAMES if name != problem.topic}
    operations = min(max(1, problem.operations), MAX_OPERATIONS)
    return random_problem(rng, operations=operations, language=problem.language, topic=draw(rarity, rng))


_CHANGES = {
    "constraint": _constraint,
    "deepen": _deepen,
    "concretise": _concretise,
    "steps": _steps,
    "complicate": _complicate,
    "breadth": _breadth,
}


def _impossible(problem: Problem, rng: random.Random) -> Problem | None:
    """The problem with one number that makes its result negative, broken or too large."""
    for _ in range(TRIES):
        statements = list(problem.statements)
        index = rng.randrange(len(statements))
        kind, amount = statements[index]
        number = rng.choice((7, 9)) if kind in ("share", "scale", "times") else rng.randint(LARGEST // 2, LARGEST)
        statements[index] = Statement(kind, Quantity(number, amount.each))
        changed = problem.changed(statements=tuple(statements))
        if changed.defect and not changed.is_held_out:
            return changed
    return None


def _jump(problem: Problem, rng: random.Random) -> Problem | None:
    """The problem with several more steps at once."""
    for _ in range(4 * TRIES):
        changed: Problem | None = problem
        for _ in range(JUMP - 1):
            changed = _steps(changed, rng) if changed is not None else None
        if changed is not None and not changed.defect and not changed.is_held_out:
            return changed
    return None


def failure_of(before: str, before_problem: Problem | None, after: str, after_problem: Problem | None) -> str:
    """The failure class that a reader sees in one evolving step, or "" for none.

    Args:
        before, after: the texts; before_problem, after_problem: what they parse to.
    """
    if "#" in after:
        return "heading"
    if before_problem is None:
        return "same" if before == after else ""
    if after_problem is None or after_problem.is_vague:
        return "vague"
    if after_problem.defect:
        return "impossible"
    if after_problem.language != before_problem.language:
        return "language"
    if is_same(before_problem, after_problem):
        return "same"
    return "jump" if after_problem.operations >= before_problem.operations + JUMP else ""


def is_same(first: Problem, second: Problem) -> bool:
    """Whether two problems ask for the same: equal statements and question, and the second is no more concrete."""
    is_filled = (first.noun == words.THINGS) > (second.noun == words.THINGS)
    is_named = (first.person == words.SOMEONE) > (second.person == words.SOMEONE)
    return first.skeleton == second.skeleton and not is_filled and not is_named

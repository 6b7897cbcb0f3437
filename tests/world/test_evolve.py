"""Evolving: each operator's promised change, the failures and the rules against them."""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wizard_engine.agents import prompts
from wizard_engine.world import vocabulary as words
from wizard_engine.world.corpus import make_vague
from wizard_engine.world.evolve import (
    FAILURE_RATES,
    OPERATORS,
    RULES,
    evolve,
    evolved_text,
    failure_of,
    failure_rates,
    flawed,
    is_same,
)
from wizard_engine.world.parse import parse
from wizard_engine.world.problems import Problem, random_problem
from wizard_engine.world.render import render

from .drawn import problems, seeds


def kinds(problem: Problem) -> list[str]:
    return [statement.kind for statement in problem.statements]


def boxes(problem: Problem) -> int:
    return sum(statement.amount.each is not None for statement in problem.statements)


def keeps_its_promise(operator: str, before: Problem, after: Problem) -> bool:
    if operator == "breadth":
        return after.topic not in (before.topic, words.GENERAL) and after.operations == before.operations
    if operator == "concretise":
        is_named = after.person in words.NAMES and after.noun != words.THINGS
        return is_named and kinds(after) == kinds(before) and after != before
    if after.operations != before.operations + 1 or after.noun != before.noun:
        return False
    if operator == "constraint":
        return kinds(after).count("lose") == kinds(before).count("lose") + 1
    if operator == "steps":
        return len(after.statements) == len(before.statements) + 1 and after.question == before.question
    if operator == "complicate":
        return kinds(after) == kinds(before) and boxes(after) == boxes(before) + 1
    return after.question != before.question and after.other is not None


@given(problem=problems(), operator=st.sampled_from(OPERATORS), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_evolve_parses_and_keeps_its_promise(problem: Problem, operator: str, seed: int):
    changed = evolve(problem, operator, random.Random(seed))
    assume(changed is not None)
    assert parse(render(changed, random.Random(seed))) == changed
    assert changed.defect == "" and not changed.is_held_out and changed.operations <= 5
    assert changed.language == problem.language
    assert keeps_its_promise(operator, problem, changed)


@pytest.mark.parametrize("operator", OPERATORS)
def test_evolve_finds_a_change_for_most_problems(operator: str):
    rng = random.Random(2)
    made = [
        random_problem(
            rng,
            operations=1 + i % 2,
            topic=words.GENERAL if operator == "concretise" else "school",
        )
        for i in range(100)
    ]
    evolved = [evolve(problem, operator, rng) for problem in made]
    assert sum(changed is not None for changed in evolved) > 60


def test_concretise_fills_a_missing_number_and_general_words():
    text = "Someone has some things. Someone loses 2 of them. How many things does someone have now?"
    problem = parse(text)
    filled = evolve(problem, "concretise", random.Random(0))
    assert filled.defect == "" and filled.person in words.NAMES and filled.topic != words.GENERAL
    assert evolve(problem, "steps", random.Random(0)) is None


def test_evolve_refuses_unknown_operators():
    with pytest.raises(ValueError, match="operator: expected one of constraint"):
        evolve(random_problem(random.Random(0), operations=1), "shorten", random.Random(0))


def test_operators_are_those_of_the_prompt():
    assert prompts.operators("evolve") == OPERATORS


@given(problem=problems(st.integers(1, 3)), failure=st.sampled_from([*RULES, ""]), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_flawed_makes_the_failure_that_failure_of_finds(problem: Problem, failure: str, seed: int):
    rng = random.Random(seed)
    before = render(problem, rng)
    changed = evolve(problem, "steps", rng)
    assume(changed is not None)
    after = render(problem, rng) if failure == "same" else flawed(changed, failure, rng)
    parsed = parse(after)
    failure_kind = failure_of(before, problem, after, parsed)
    assert failure_kind == failure or (failure == "jump" and failure_kind == "" and problem.question == "each")
    assert parsed is None or not parsed.is_held_out


def share_of_failures(method: str) -> dict[str, float]:
    rng = random.Random(4)
    counts: dict[str, float] = dict.fromkeys([*RULES, ""], 0)
    for i in range(1500):
        problem = random_problem(rng, operations=1 + i % 3, topic=words.TOPIC_NAMES[i % 8])
        text = evolved_text(render(problem), OPERATORS[i % 6], rng, method=method)
        counts[failure_of(render(problem), problem, text, parse(text))] += 1 / 1500
    return counts


def test_evolved_text_fails_at_the_stated_rates_and_rules_prevent_it():
    plain, ruled = share_of_failures(""), share_of_failures(". ".join(RULES.values()))
    assert all(abs(plain[kind] - rate) < 0.035 for kind, rate in FAILURE_RATES.items())
    assert ruled[""] > 0.85 > plain[""] + 0.2
    one = share_of_failures(RULES["impossible"])
    assert one["impossible"] < 0.04 < plain["impossible"] and abs(one["vague"] - plain["vague"]) < 0.03


def test_evolved_text_differs_only_where_a_rule_prevents_a_failure():
    texts = [render(random_problem(random.Random(i), operations=1)) for i in range(150)]

    def failures(method: str) -> list[str]:
        evolved = [evolved_text(text, "steps", random.Random(i), method=method) for i, text in enumerate(texts)]
        return [failure_of(a, parse(a), b, parse(b)) for a, b in zip(texts, evolved, strict=True)]

    plain, ruled = failures("be creative"), failures(RULES["vague"])
    assert plain == failures("")
    assert all(a == b or (a == "vague" and b == "") for a, b in zip(plain, ruled, strict=True))
    assert ruled.count("vague") < plain.count("vague")


def test_failure_rates_rise_again_for_an_overloaded_method():
    rules = list(RULES.values())
    assert sum(failure_rates("\n".join(rules)).values()) < 0.1
    assert failure_rates("\n".join(rules * 2))["same"] > failure_rates("\n".join(rules))["same"] + 0.3
    assert failure_rates(prompts.initial_method())["same"] == FAILURE_RATES["same"]


@given(problem=problems(), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_is_same_looks_through_wording_and_names(problem: Problem, seed: int):
    assume(problem.person in words.NAMES and problem.noun != words.THINGS)
    renamed = problem.changed(person="Rosa" if problem.other != "Rosa" else "Mia")
    assert is_same(problem, renamed)
    assert not is_same(problem, make_vague(problem, random.Random(seed)))
    assert not is_same(problem.changed(person=words.SOMEONE), problem)

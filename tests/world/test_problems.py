"""Problems: trees, equations, values, identity."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.world import vocabulary as words
from wizard_engine.world.problems import FACTORS, LARGEST, Problem, Quantity, Statement, random_problem

from .drawn import problems

START = Statement("start", Quantity(12))
BOXES = Statement("gain", Quantity(3, 4))
LOSE = Statement("lose", Quantity(5))


def tom(*statements: Statement, question: str = "has", other: str | None = None) -> Problem:
    return Problem("en", "apples", "Tom", other, statements, question)


def test_equations_of_a_hand_worked_tree():
    problem = tom(START, BOXES, LOSE, Statement("more", Quantity(6)), question="total", other="Ana")
    assert list(map(str, problem.equations())) == ["3*4=12", "12+12=24", "24-5=19", "19+6=25", "19+25=44"]
    assert (problem.value, problem.operations, problem.skill) == (44, 5, "mixed")


@pytest.mark.parametrize(
    ("statement", "question", "value"),
    [
        (Statement("share", Quantity(4)), "each", 3),
        (Statement("scale", Quantity(2)), "has", 24),
        (Statement("fewer", Quantity(5)), "other", 7),
        (Statement("times", Quantity(3)), "other", 36),
        (Statement("other", Quantity(2, 9)), "total", 30),
    ],
)
def test_value_of_each_kind(statement: Statement, question: str, value: int):
    other = "Ana" if question in ("other", "total") else None
    problem = tom(START, statement, question=question, other=other)
    assert problem.is_well_formed()
    assert problem.value == value


@pytest.mark.parametrize(
    ("statements", "defect"),
    [
        ((START, Statement("lose", Quantity(None))), "vague"),
        ((START, Statement("lose", Quantity(13))), "negative"),
        ((START, Statement("share", Quantity(5))), "fraction"),
        ((START, Statement("scale", Quantity(9))), "large"),
    ],
)
def test_defect_names_why_there_is_no_answer(statements: tuple, defect: str):
    problem = tom(*statements, question="each" if statements[1].kind == "share" else "has")
    assert problem.defect == defect
    assert problem.value is None


@given(problem=problems())
@settings(max_examples=50, deadline=None)
def test_random_problem_is_sound_and_within_bounds(problem: Problem):
    assert problem.is_well_formed()
    assert problem.defect == "" and not problem.is_held_out
    assert all(0 <= equation.result <= LARGEST and equation.is_right() for equation in problem.equations())
    assert len(problem.equations()) == problem.operations
    assert all(kind not in ("share", "scale", "times") or n.count in FACTORS for kind, n in problem.statements)


@given(operations=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_random_problem_has_the_operations_asked_for(operations: int, seed: int):
    problem = random_problem(random.Random(seed), operations=operations, held_out=None)
    assert problem.operations == operations


@pytest.mark.parametrize("operations", [0, 6])
def test_random_problem_refuses_other_sizes(operations: int):
    with pytest.raises(ValueError, match=r"operations: expected 1\.\.5"):
        random_problem(random.Random(0), operations=operations)


@given(problem=problems(), noun=st.sampled_from(tuple(words.NOUN_TOPIC)))
@settings(max_examples=50, deadline=None)
def test_held_out_side_does_not_depend_on_words(problem: Problem, noun: str):
    reworded = problem.changed(noun=noun, language="es", person="Hugo" if problem.other != "Hugo" else "Leo")
    assert reworded.is_held_out == problem.is_held_out
    assert (reworded.key == problem.key) == (noun == problem.noun)


def test_held_out_share_is_an_eighth():
    rng = random.Random(5)
    drawn = {random_problem(rng, operations=3, held_out=None) for _ in range(4000)}
    share = sum(problem.is_held_out for problem in drawn) / len(drawn)
    assert abs(share - 1 / 8) < 0.02


def test_skills_cover_all_kinds():
    rng = random.Random(0)
    skills = {random_problem(rng, operations=1 + i % 4).skill for i in range(800)}
    assert skills == {"additive", "multiplicative", "comparison", "division", "mixed"}

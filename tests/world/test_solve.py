"""Solutions and what is checked in them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.solution_steps import step_texts
from wizard_engine.world.parse import parse
from wizard_engine.world.problems import Problem
from wizard_engine.world.solve import STYLES, check_answer, claimed_answer, label_steps, solve

from .drawn import problems, seeds

PROBLEM = parse("Tom has 12 apples. He buys 3 bags with 4 apples each. He sells 5. How many apples does Tom have now?")


def test_good_solution_of_a_hand_worked_problem():
    assert solve(PROBLEM) == "3*4=12\n12+12=24\n24-5=19\nThe answer is 19."
    assert solve(PROBLEM.changed(language="es")).endswith("\nLa respuesta es 19.")


@given(problem=problems())
@settings(max_examples=50, deadline=None)
def test_good_solution_is_right_in_every_step(problem: Problem):
    answer = solve(problem)
    assert check_answer(problem, answer)
    assert label_steps(problem, step_texts(answer)) == [1] * (problem.operations + 1)


@given(problem=problems(), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_styles_keep_their_promises(problem: Problem, seed: int):
    answers = {style: solve(problem, style, random.Random(seed)) for style in STYLES}
    labels = {style: label_steps(problem, step_texts(answer)) for style, answer in answers.items()}
    assert check_answer(problem, answers["terse"]) and labels["terse"] == [1]
    assert -1 in labels["careless"]
    assert not check_answer(problem, answers["wrong"]) and -1 in labels["wrong"]
    assert check_answer(problem, answers["rambling"]) and set(labels["rambling"]) == {0, 1}
    assert labels["rambling"].count(1) == problem.operations + 1
    assert len(answers["rambling"]) > len(answers["good"])
    assert not check_answer(problem, answers["refusal"]) and labels["refusal"] == [0]
    assert all(claimed_answer(answer) >= 0 for style, answer in answers.items() if style != "refusal")


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (["4*3=12", "12+12=24", "24-5=19", "19."], [1, 1, 1, 1]),
        (["24-5=19", "3 * 4 = 12"], [1, 1]),
        (["3*4=13", "13+12=25"], [-1, -1]),
        (["3+4=7"], [-1]),
        (["5-24=19"], [-1]),
        (["3*4=12", "3*4=12"], [1, 0]),
        (["3*4=", "=", "3*4=12=12"], [-1, -1, -1]),
        (["Let me think.", "The answer is 18."], [0, -1]),
        (["3*4=12 and so the answer is 12."], [-1]),
        (["12"], [-1]),
        ([], []),
    ],
)
def test_label_steps_by_hand(steps: list[str], labels: list[int]):
    assert label_steps(PROBLEM, steps) == labels


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("The answer is 19.", 19),
        ("19.", 19),
        ("The answer is 7. The answer is 19.", 19),
        ("It was 3. #### 19", 19),
        ("The answer is 19. I had 2 tries.", 19),
        ("12+7=19", 19),
        ("La respuesta es 19.", 19),
        ("The answer is -3.", -3),
        ("The answer is nineteen.", None),
        ("", None),
    ],
)
def test_claimed_answer_reads_the_last_claim(text: str, claim: int | None):
    assert claimed_answer(text) == claim


def test_problem_without_answer_is_asked_back():
    vague = parse("Tom has some apples. He sells 5. How many apples does Tom have now?")
    answer = solve(vague)
    assert "please provide" in answer.lower()
    assert check_answer(vague, answer) and not check_answer(vague, "The answer is 5.")
    assert label_steps(vague, [answer, "9-5=4", "Well."]) == [1, -1, 0]


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style: expected one of good"):
        solve(PROBLEM, "brilliant")


@given(text=st.text(max_size=60))
@settings(max_examples=50, deadline=None)
def test_checks_take_any_text(text: str):
    assert check_answer(PROBLEM, text) in (True, False)
    assert set(label_steps(PROBLEM, [text])) <= {1, 0, -1}

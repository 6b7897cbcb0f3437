"""Answer extraction and exact-answer accuracy."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine import world
from wizard_engine.data.final_answers import extract_answer, same_answer
from wizard_engine.data.proportions import wilson_interval
from wizard_engine.data.records import read_rows
from wizard_engine.evaluation.accuracy import accuracy, accuracy_by


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3*4=12\n12+7=19\nThe answer is 19.", 19),
        ("La respuesta es 7.", 7),
        ("La respuesta final es: 3,5", Fraction(7, 2)),
        ("#### 1,234", 1234),
        ("#### -12", -12),
        ("The answer is $1,234,567.50.", Fraction("1234567.5")),
        ("The answer is 3 + 4 = 7. I checked it 2 times.", 7),
        ("The answer is 19. I checked it 2 times.", 19),
        ("The answer is:\n\n**42**", 42),
        ("The answer is 8.\nWait. The answer is 9.", 9),
        ("\\boxed{-3/4}", Fraction(-3, 4)),
        ("Answer: 5 apples", 5),
        ("Answer: first we add.\n2+3=5, then 5+1=6", 6),
        ("答案是１２。", 12),
        ("24-5=19", 19),
        ("so 24-5", 5),
        ("so (20+4)-5", 5),
        ("It fell to -5 degrees", -5),
        ("It fell to −5 degrees", -5),
        ("a top-10 list", 10),
        ("x .5 and 0.25", Fraction(1, 4)),
        ("19.", 19),
        ("The answer is unknown, though 3 is close.\nWe saw 4.", 3),
        ("The answer is not known. 3+4", None),
        ("Sorry, I cannot help with that.", None),
        ("", None),
    ],
)
def test_extract_answer_of_typical_texts(text, expected):
    assert extract_answer(text) == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}"]))
def test_extract_answer_reads_what_was_written(number, form):
    for text in ("The answer is {}.", "#### {}", "La respuesta es {}.", "so we get 1 and 2 and {}"):
        assert extract_answer(text.format(form.format(number))) == number


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_extract_answer_takes_any_text(text):
    assert extract_answer(text) is None or isinstance(extract_answer(text), Fraction)


def test_extract_answer_agrees_with_the_world():
    for row in world.held_out(150, seed=3):
        problem = world.parse(row.instruction)
        assert extract_answer(row.answer) == problem.value
        for style in ("terse", "rambling", "wrong", "careless", "refusal"):
            text = world.solve(problem, style)
            assert (extract_answer(text) == problem.value) == world.check_answer(problem, text), text


def test_extract_answer_of_gsm8k_references(shared_data):
    rows = read_rows(shared_data / "gsm8k" / "test.jsonl")
    answers = [row.answer for row in rows]
    assert accuracy(answers, answers).accuracy == 1.0
    assert extract_answer(answers[0]) == 18


def test_same_answer_ignores_form_and_never_matches_nothing():
    assert same_answer("The answer is 3.50.", "#### 3.5") and not same_answer("3", "4")
    assert not same_answer("none", "none")


def test_accuracy_counts_error_and_unanswered():
    result = accuracy(["5", "The answer is 6.", "no idea", "8"], ["#### 5", "#### 6", "#### 7", "#### 9"])
    assert (result.correct, result.total, result.accuracy, result.unanswered) == (2, 4, 0.5, 1)
    assert result.se == pytest.approx(0.25)
    assert result.ci95[0] < 0.5 < result.ci95[1]


def test_accuracy_by_group_sums_to_the_whole():
    answers, references, groups = ["1", "2", "3", "5"], ["1", "2", "4", "5"], ["a", "b", "a", "b"]
    accuracies = accuracy_by(answers, references, groups)
    assert list(accuracies) == ["a", "b"]
    assert (accuracies["a"].correct, accuracies["b"].correct) == (1, 2)
    assert sum(group.total for group in accuracies.values()) == 4


@pytest.mark.parametrize(
    ("answers", "references", "message"),
    [
        ([], [], "at least one"),
        (["1"], ["1", "2"], "one per answer"),
        (["1"], ["none"], r"references\[0\]: expected a number"),
    ],
)
def test_accuracy_refuses_bad_arguments(answers, references, message):
    with pytest.raises(ValueError, match=message):
        accuracy(answers, references)


def test_wilson_interval_by_hand_and_at_the_ends():
    # p = 8/10, z = 1.96: (0.8 + 0.19207 -+ 0.3397...) / 1.38415
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(20, 20)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0) and math.isclose(sum(wilson_interval(5, 10)), 1.0)

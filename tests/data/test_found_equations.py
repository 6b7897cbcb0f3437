"""Equations in running text: read as people and models write them, and never called wrong by half."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.equations import ANNOTATION, found_equations, step_label
from wizard_engine.data.text_files import read_objects

RIGHT = (
    "She makes 9 * 2 = $18 every day.",
    "16 - 3 - 4 = 9",
    "It takes 2/2=1 bolt.",
    "80,000+50,000=$130,000",
    "3 × 4 = 12",
    "3 x 4 = 12",
    "6 ÷ 2 = 3",
    "7 − 2 = 5",
    "5 apples + 3 apples = 8 apples",
    "3 * 25 cents = $0.75",
    "18 = 9*2",
    "10/3=3.33",
    "100*20% = 20",
    "5/20*100=25%",
    "5/20=25%",
    r"\(3 \times 4 = 12\)",
    r"$\frac{1}{2} \times 10 = 5$",
    "-3+5=2",
    "**3 + 4 = 7**",
    "(3+4)*2 = 14",
    "16 - 3 = <<16-3=13>>13 eggs",
    "a total of 3 + 4 = 7",
)
WRONG = (
    "So 9 * 2 = $19 every day.",
    "16 - 3 - 4 = 8",
    "3 x 4 = 13",
    "10/3=3",
    "5 apples + 3 apples = 9 apples",
    r"$\frac{1}{2} \times 10 = 6$",
    "The price is $5 - $2 = $4.",
    "Total: 3+4+5 = 13",
    "- 3 + 4 = 8 eggs",
    "2) 3 + 4 = 8",
    "(3+4)*2 = 15.",
    "16 - 3 = <<16-3=12>>12 eggs",
)
# Parts of something else, other units, expressions that are no arithmetic, and no equation at all.
UNREAD = (
    "x + 2 = 8",
    "x - 2 + 3 = 8",
    "2x = 6",
    "2^3 + 1 = 9",
    "f(3) + 2 = 7",
    "5! + 1 = 121",
    "9(8)-5=67",
    "10 * 1 1/2 = 15",
    "3 times 4 + 2 = 14",
    "20% of 50 + 3 = 13",
    "3 * 20 minutes = 1 hour",
    "12*3 + = 36",
    "total = 13",
    "5 = 5",
    "She has 7 eggs.",
    "",
    "=",
    "1/0 = 3",
)


@pytest.mark.parametrize("text", RIGHT)
def test_true_equations_are_found(text):
    assert found_equations(text) and all(found_equations(text))


@pytest.mark.parametrize("text", WRONG)
def test_wrong_equations_are_found(text):
    assert False in found_equations(text)


@pytest.mark.parametrize("text", UNREAD)
def test_what_cannot_be_said_is_not_said(text):
    assert found_equations(text) == []


def test_every_equation_of_a_text_counts_in_order():
    assert found_equations("3+4 = 7, 8 + 2 = 11\nso 2*2 = 4. 16-3 = 13*2 = 26") == [True, False, True, True, True]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 999), min_size=2, max_size=3),
    st.lists(st.sampled_from("+-*"), min_size=3, max_size=3),
    st.integers(-3, 3),
    st.sampled_from(("{} = {}", "So she pays {}=${} in all.", "- {} = {} eggs.", "{}\t=\t{}")),
)
def test_an_equation_is_right_exactly_where_its_sides_are_equal(numbers, operators, off, form):
    left = str(numbers[0]) + "".join(f" {operator} {number}" for operator, number in zip(operators, numbers[1:]))
    right = eval(left) + off
    shown = form.format(left, right).replace("$-", "-$")
    assert found_equations(shown) in ([off == 0], [] if off else [True])


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="0123456789+-*/=()$%,. xab\n", max_size=60))
def test_any_text_is_read_without_an_error(text):
    assert set(found_equations(text)) <= {True, False}


@pytest.mark.parametrize("text", ["1+" * 20000, "(" * 40000, "1 " * 20000 + "=", "1=" * 20000, "3 a" * 10000 + "=1"])
def test_long_texts_take_no_long_time(text):
    began = time.perf_counter()
    found_equations(text)
    assert time.perf_counter() - began < 3


def test_reading_agrees_with_the_annotations_of_real_solutions(shared_data):
    seen = {}
    for _, record in read_objects(shared_data / "gsm8k" / "model_solutions.jsonl")[:60]:
        for line in record["175b_verification"]["solution"].split("\n"):
            verdicts = found_equations(ANNOTATION.sub("", line))
            key = step_label(line), 0 if not verdicts else 1 if all(verdicts) else -1
            seen[key] = seen.get(key, 0) + 1
    right, total = seen[1, 1], sum(count for (label, _), count in seen.items() if label == 1)
    assert right > 0.85 * total and seen.get((1, -1), 0) < 0.05 * total

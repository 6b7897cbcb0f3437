"""The one reader of numbers: as people and models write them, in LaTeX, and never right by accident."""

import random
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine import world
from wizard_engine.agents.replies import read_labels, read_ranking, read_scores
from wizard_engine.data import latex_answers
from wizard_engine.data.final_answers import extract_answer, read_number, same_answer
from wizard_engine.data.records import read_rows
from wizard_engine.evaluation.accuracy import accuracy

WRITTEN = {
    "1 234,5": Fraction("1234.5"),
    "1\u202f234,5": Fraction("1234.5"),
    "1\u00a0234": 1234,
    "1.234,50": Fraction("1234.5"),
    "1.234.567": 1234567,
    "1,234,567.5": Fraction("1234567.5"),
    "12,34,567": 1234567,
    "1'234.5": Fraction("1234.5"),
    "1_000": 1000,
    "-0.5": Fraction(-1, 2),
    "−0,5": Fraction(-1, 2),
    "0,125": Fraction(1, 8),
    ".5": Fraction(1, 2),
    "5 %": 5,
    "5%": 5,
    "5 percent": 5,
    "$12": 12,
    "-$12": -12,
    "$-12": -12,
    "US$ 12": 12,
    "12 €": 12,
    "1.2e3": 1200,
    "1.2E-3": Fraction("0.0012"),
    "1.2 × 10^3": 1200,
    "1.2*10^3": 1200,
    "1.2 × 10³": 1200,
    "2^10": 1024,
    "3/4": Fraction(3, 4),
    "1 1/2": Fraction(3, 2),
    "½": Fraction(1, 2),
    "1½": Fraction(3, 2),
    "5 apples": 5,
    "5kg": 5,
    "5 m²": 5,
    "1.5 million dollars": 1500000,
    "**42**": 42,
    "__42__": 42,
    "`42`": 42,
    "１２": 12,
    "٣٫٥": Fraction(7, 2),
    "١٬٢٣٤": 1234,
    "*42*": 42,
    "5k": 5000,
    "5 ‰": Fraction(1, 200),
    "4 (four)": 4,
    "approximately 5": 5,
    "x = 5": 5,
}
LATEX = {
    r"\frac{3}{4}": Fraction(3, 4),
    r"\dfrac{-3}{4}": Fraction(-3, 4),
    r"-\tfrac34": Fraction(-3, 4),
    r"1\frac{1}{2}": Fraction(3, 2),
    r"\frac{1{,}000}{3}": Fraction(1000, 3),
    r"12{,}345": 12345,
    r"12,\!345": 12345,
    r"12\,345": 12345,
    r"5\text{ apples}": 5,
    r"\text{5 apples}": 5,
    r"\mathbf{7}": 7,
    r"\$5.00": 5,
    r"5\%": 5,
    r"90^\circ": 90,
    r"90^{\circ}": 90,
    r"1.2\times 10^{3}": 1200,
    r"10^{-2}": Fraction(1, 100),
    r"0.\overline{3}": Fraction(1, 3),
    r"0.1\overline{6}": Fraction(1, 6),
    r"\left(\frac{1}{3}\right)": Fraction(1, 3),
    r"x = 5": 5,
    r"{3 \over 4}": Fraction(3, 4),
    r"\frac{ 3 }{ 4 }": Fraction(3, 4),
}
# A number stands in each, and nobody claims it.
NO_CLAIMS = [
    "The answer is not 5.",
    "The answer isn't 5.",
    "The answer is 3 or 4.",
    "The answer is between 3 and 5.",
    "The answer is at least 5.",
    "The answer is 3 + 4.",
    "The answer is 1,2,3.",
    "The answer is 3:45.",
    "The answer is 2x + 1.",
    "The answer is 3/0.",
    "The answer is 1e999999999.",
    "The answer is 1.2.3",
    r"\boxed{2\sqrt{3}}",
    r"\boxed{3\pi}",
    r"\boxed{(1,2)}",
    r"\boxed{A}",
    r"\boxed{(3, 4)}",
    r"\boxed{3, 4}",
    r"\boxed{5!}",
    r"\boxed{10_2}",
    "The answer is 0x10.",
    "The answer is 2 * 3.",
    "The answer is x = 5, y = 3.",
    "The answer is x = 5 and y = 3.",
    "I cannot determine this. There are 18 ducks.",
    "I don't know; chapter 18 may help.",
    "1/" + "9" * 5000,
    "9" * 100_000,
]


@pytest.mark.parametrize("text", WRITTEN)
def test_numbers_are_read_as_people_write_them(text):
    assert extract_answer(f"The answer is {text}.") == WRITTEN[text]
    assert extract_answer(f"We add 7.\nSo it is {text}") == WRITTEN[text]
    assert extract_answer(f"The answer is: **{text}**\nI am 99 % sure.") == WRITTEN[text]


@pytest.mark.parametrize("text", LATEX)
def test_numbers_are_read_as_models_write_them_in_latex(text):
    for said in (r"So it is $\boxed{%s}$. This took 9 steps.", r"The answer is \(%s\).", r"The answer is $%s$."):
        assert extract_answer(said % text) == LATEX[text], said


# Catches: a sign of an exponent that is any character between plus and minus.
@pytest.mark.parametrize("text", ["5e[0]", "5e;0", "5eA1", "5e/1"])
def test_an_exponent_has_a_sign_or_none(text):
    assert extract_answer(f"The answer is {text}.") in (5, None)
    assert extract_answer("The answer is 5e+1.") == 50 and extract_answer("The answer is 5e−1.") == Fraction(1, 2)


# Catches: a mark that needs a blank before it, which a small model leaves out; the number before it would count.
@pytest.mark.parametrize(
    "text",
    [
        "17. ¿Qué números más shells32La respuesta es 32.",
        "12+7=19\n4 shells32The answer is 32.",
        "17\nApples 5Answer: 32",
        "__The answer is 32__",
    ],
)
def test_a_mark_may_stand_right_behind_a_digit(text):
    assert extract_answer(text) == 32


# Catches: a pattern that goes over the rest of the text from each place of it.
@pytest.mark.parametrize(
    ("start", "unit"),
    [("", "#### "), (r"\boxed{", "1"), (r"\boxed{", " \n"), (r"\boxed{", r"\,"), ("", r"{3 \over "), ("", r"\frac{ ")],
)
def test_long_texts_are_read_in_linear_time(start, unit):
    began = time.process_time()
    extract_answer(start + unit * (60_000 // len(unit)))
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", NO_CLAIMS)
def test_a_number_that_nobody_claims_is_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So the total is 18 dollars. She sells them 7 days a week.", 18),
        ("12+7=19. I checked it 2 times.", 19),
        ("#### Step 2: add\nSo it is 18.", 18),
        ("12+7=19\n20", 20),
        ("The answer to question 3 is 18.", 18),
        ("**Answer:** 42", 42),
        ("Final Answer\n42", 42),
        ("The answer is 7.\u2028It has 2 digits", 7),
    ],
)
def test_a_remark_or_a_heading_is_no_answer(text, expected):
    assert extract_answer(text) == expected


def test_equal_numbers_are_equal_however_they_are_written():
    forms = ["#### 0.05", "The answer is 5 %.", r"\boxed{\frac{1}{20}}", r"\boxed{5\%}", "The answer is 0,05", "5e-2"]
    assert all(same_answer(a, b) for a in forms for b in forms)
    assert same_answer("5 %", "#### 5") and not same_answer("5 %", "#### 500") and not same_answer("0.05", "#### 5")


GROUPS = {"plain": "", "comma": ",", "blank": " ", "thin": "\u2009", "latex": "{,}", "apostrophe": "'"}


@settings(max_examples=50, deadline=None)
@given(
    st.decimals(-(10**9), 10**9, places=2, allow_nan=False),
    st.sampled_from(sorted(GROUPS)),
    st.sampled_from(["", "$", "€ "]),
    st.sampled_from(["", "%", " apples", r"\text{ km}", "."]),
)
def test_generated_numbers_are_read_in_every_form(number, group, before, behind):
    digits = f"{abs(number):,.2f}".replace(",", GROUPS[group])
    text = ("-" if number < 0 else "") + before + digits + behind
    assert extract_answer(f"The answer is {text}") == Fraction(number)
    assert extract_answer(rf"so \boxed{{{text}}}") == Fraction(number)


@settings(max_examples=50, deadline=None)
@given(st.integers(-999, 999), st.integers(1, 999), st.sampled_from([r"\frac{%d}{%d}", r"\dfrac{%d}{%d}", "%d/%d"]))
def test_generated_fractions_equal_their_values_and_nothing_else(above, below, form):
    text = rf"\boxed{{{form % (above, below)}}}"
    assert extract_answer(text) == Fraction(above, below)
    assert same_answer(text, f"#### {above}") == (below == 1 or above == 0)


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("0123456789.,'_-−+/*^e%$€ \n{}()[]\\fracboxedtimes10x=#½²"), max_size=60))
def test_any_text_is_read_without_an_error_or_a_huge_number(text):
    value = extract_answer(f"The answer is {text}")
    assert value is None or (abs(value.numerator) < 10**1000 and value.denominator < 10**1000)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 20), st.sampled_from(["[[{}]]", "[[ {} ]]", "[[{}/10]]", "[[{}.0]]", "[[{},0]]", "[[**{}**]]"]))
def test_judges_and_labels_use_the_same_reader(number, form):
    half = Fraction(number, 2)
    written = form.format(number // 2)
    assert read_scores(f"fine {written}", 1) == (float(number // 2),)
    assert read_scores(f"[[{float(half)}]] see [[this]]", 1) == (float(half),)
    assert read_ranking(f"1: {float(half)}/10\u20282. {number // 2}", 2) == (float(half), float(number // 2))


def test_scores_and_labels_that_say_something_else_are_unreadable():
    assert read_scores("[[7]] or so, [[8 or 9]]", 1) is None and read_scores("[[8 apples]]", 1) is None
    assert read_labels("1\r\n−1\x0b+1\u20280", 4) == (1, -1, 1, 0)
    assert read_labels("Step 1: 1\nStep 2: -1", 2) == (1, -1) and read_labels("1. 1\n3. 0", 2) is None
    assert read_labels("1.0\n2", 2) is None and read_labels("1 0 2", 2) is None
    assert read_number(" **7,5** ") == Fraction(15, 2) and read_number("7 8") is None and read_number("") is None


def test_the_library_reads_numbers_as_we_do():
    library = pytest.importorskip("math_verify")
    numbers = ["12", "0.5", "-3", "1234.5", r"\frac{3}{4}", r"-\frac{7}{2}", r"\dfrac{1}{3}", r"12,\!345", "1,234"]
    numbers += [r"5\%", r"\$5", r"1\frac{1}{2}", r"1.2\times 10^{3}", r"5\text{ apples}", r"12{,}345", "0.05", ".75"]
    parsed = {text: library.parse(rf"$\boxed{{{text}}}$") for text in numbers}
    for text in numbers:
        for other in numbers:
            ours = same_answer(rf"\boxed{{{text}}}", rf"\boxed{{{other}}}")
            assert library.verify(parsed[text], parsed[other]) == ours, (text, other)


def test_expressions_are_compared_by_the_library_where_it_is_installed():
    references = ["#### 4", r"\boxed{2\sqrt{3}}"]
    if latex_answers.library() is None:
        with pytest.raises(ValueError, match=r"references\[1\]: expected a number.*pip install -e '.\[math\]'"):
            accuracy(["4", "4"], references)
        with pytest.raises(ValueError, match="answers in LaTeX: expected math-verify"):
            latex_answers.same_expression("a", "b")
        return
    result = accuracy([r"\boxed{\sqrt{16}}", r"so $\sqrt{12}$"], references)
    assert (result.correct, result.unanswered) == (2, 0)
    assert not same_answer(r"\boxed{2\sqrt{5}}", references[1]) and not same_answer("2 and 3", references[1])


def test_real_references_are_read_as_the_library_reads_them(shared_data):
    library = pytest.importorskip("math_verify")
    for row in read_rows(shared_data / "gsm8k" / "test.jsonl")[:60]:
        last = row.answer.rpartition("####")[2].strip()
        assert library.verify(library.parse(f"${last}$"), library.parse(f"${extract_answer(row.answer)}$"))


def test_the_world_is_read_as_before():
    """Answers of the world's programs, cut anywhere and without their mark: the last number, as the world reads it."""
    rng = random.Random(1)
    for row in world.held_out(60, seed=9):
        problem = world.parse(row.instruction)
        for style in ("good", "terse", "wrong", "careless", "rambling"):
            text = world.solve(problem, style, rng)
            text = text[: rng.randrange(1, len(text) + 1)]
            if not re.search(r"answer is|respuesta es|\d-\d*=?$", text):
                assert extract_answer(text) == world.claimed_answer(text), text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two cannot come.\n24 - 10 = 14\nA: 14", 14),
        ("So 13 + 3 = 16 sing, and 4 do not.\nA: 16\n", 16),
        ("Q: How much is it?\nA: $1,000.50", Fraction("1000.5")),
        ("A: 3 + 4 = 7", 7),
        ("A: 3 or 4", None),
        ("A: 14\nB: 15", 15),
    ],
)
def test_a_last_line_in_the_form_of_questions_and_answers_decides(text, expected):
    assert extract_answer(text) == expected

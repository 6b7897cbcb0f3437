"""Words: case, width and punctuation do not count; numbers and CJK characters do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wizard_engine.curation.words import PATTERNS, words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Tom's 3 apples, cost $4.50!", ["tom", "s", "3", "apples", "cost", "4.50"]),
        ("它有3个苹果。", ["它", "有", "3", "个", "苹", "果"]),
        ("ＡＢＣ １２", ["abc", "12"]),
        ("x2 3rd 1,000.", ["x", "2", "3", "rd", "1,000"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("¿Cuántos años?", ["cuántos", "años"]),
        ("?! ...", ["?!", "..."]),
        ("a_b", ["a", "b"]),
        ("  ", []),
    ],
)
def test_words_of_scripts(text, expected):
    assert words(text) == expected


def test_words_operators_before_numbers():
    assert words("3 + 4*-5 = x - y", operators=True) == ["3", "+", "4", "-", "5", "x", "y"]
    assert words("3 + 4") == ["3", "4"]


@given(st.text(st.characters(max_codepoint=127), max_size=40), st.booleans())
def test_words_of_ascii_text_are_those_of_the_general_pattern(text, operators):
    assert words(text + " é", operators=operators)[:-1] == PATTERNS[True, operators].findall(text.lower())


@given(st.text(max_size=40))
def test_words_hold_no_blanks_and_are_empty_only_for_blank_text(text):
    split = words(text, operators=True)
    assert all(token and not token.isspace() for token in split)
    assert bool(split) == bool(text.strip())

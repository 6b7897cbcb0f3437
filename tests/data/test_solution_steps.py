"""The step rule: one step a line, or one step a sentence on a single line."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.solution_steps import split_steps, step_texts


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("3*4=12\n12+12=24\nThe answer is 24.", ["3*4=12", "12+12=24", "The answer is 24."]),
        (
            'First. Then 3.5 more! Is it 4? "Yes." The answer is 24.',
            ["First.", "Then 3.5 more!", "Is it 4?", '"Yes."', "The answer is 24."],
        ),
        ("  a. b \n\n  c \r\n", ["a. b", "c"]),
        ("\n\nOne line. Two.\n", ["One line.", "Two."]),
        ("首先算三。然后算四。答案是七。", ["首先算三。", "然后算四。", "答案是七。"]),
        ("19.", ["19."]),
        ("", []),
        (" \n\t\n ", []),
    ],
)
def test_split_steps_follows_the_rule(text, steps):
    assert step_texts(text) == steps


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(["a.", " b", "。", "\n", "\u2028", "?) ", "3=3"])).map("".join)))
def test_split_steps_covers_everything_but_blanks(text):
    spans = split_steps(text)
    kept = "".join(text[start:end] for start, end in spans)
    assert [c for c in kept if not c.isspace()] == [c for c in text if not c.isspace()]
    assert all(text[start:end] == text[start:end].strip() and start < end for start, end in spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))

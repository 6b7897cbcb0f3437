"""What judges are told: criteria by a row's attributes, else by what the analysis finds in its text, and references."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.agents import prompts
from wizard_engine.agents.aids import aids, read_attributes
from wizard_engine.data.records import Message


def chat(*turns):
    return tuple(Message(("user", "assistant")[place % 2], turn) for place, turn in enumerate(turns))


# Case: rows of other files name neither category nor skill, and had general criteria whatever they asked for.
ASKED = {
    "writing": [
        "Write a short story about a lighthouse.",
        "Act as a pirate and greet me.",
        "Rewrite this more politely: go",
    ],
    "coding": ["Write a Python function that sorts a list.", "Fix this code:\n```\nx = = 1\n```", "用代码实现快速排序"],
    "math": ["Tom has 3 apples and buys 4 more. How many apples does he have?", "What is 12 * 7 plus 3 in total?"],
    "reasoning": ["Why does ice float?", "Compare the two plans and deduce which one fails."],
    "multilingual": ["Translate 'good morning' to French.", "Traduce al inglés: hola", "翻译：你好"],
    "": ["What is a photon?", "Who was the first king of Rome?", "Hm."],
}


@pytest.mark.parametrize(("criteria", "text"), [(kind, text) for kind, texts in ASKED.items() for text in texts])
def test_criteria_of_rows_without_a_skill_are_those_of_their_text(criteria, text):
    for attributes in (None, {}, {"topic": "x"}, {"skill": ""}):
        assert aids(attributes, chat(text)) == {"criteria": criteria, "reference": ""}


def test_the_last_turn_decides_and_then_the_first():
    code, photon = "Write a Python function that sorts a list.", "What is a photon?"
    assert aids({}, chat(code, "def f(): ...", photon))["criteria"] == "coding"
    assert aids({}, chat(photon, "A quantum.", code))["criteria"] == "coding"
    assert aids({}, chat(code, "def f(): ...", "Translate the comments to German."))["criteria"] == "multilingual"
    call = '{"name": "weather", "arguments": {"town": "Rome"}}'
    assert aids({}, chat("Is it warm in Rome?", call, "And in Oslo?"))["criteria"] == "agent"


@pytest.mark.parametrize("name", ["category", "skill"])
def test_what_a_row_says_of_itself_goes_before_its_text(name):
    code = chat("Write a Python function that sorts a list.")
    assert aids({name: "division"}, code)["criteria"] == "math"
    assert aids({name: "sorting pebbles"}, code)["criteria"] == "", "a kind without criteria of its own"
    assert aids({"language": "de"}, code)["criteria"] == "coding"
    assert aids({"language": "de"}, chat("Was ist ein Photon?"))["criteria"] == "multilingual"
    assert aids({"reference": "5", name: "math"}, code) == {"criteria": "math", "reference": "5"}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(max_size=60), min_size=1, max_size=4),
    st.dictionaries(
        st.sampled_from(["category", "skill", "language", "reference", "x"]),
        st.none() | st.text(max_size=12) | st.lists(st.text(max_size=5)) | st.integers(),
    ),
)
def test_any_row_has_criteria_that_the_prompt_knows(turns, attributes):
    told = aids(attributes, chat(*turns))
    assert told == aids(read_attributes(attributes), chat(*turns))
    prompts.render("judge", instruction=turns[-1], answer_a="a", answer_b="b", **told)

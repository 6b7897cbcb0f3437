"""Formats that people have: what each becomes, and that no field vanishes without a word."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.chat import CHAT_ATOMS, encode_conversation, encode_preference
from wizard_engine.data.records import (
    Conversation,
    Message,
    Preference,
    conversation,
    kept_weights,
    read_rows,
    write_rows,
)
from wizard_engine.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["who are you?", "a pirate. a program."] * 4, vocab_size=400, atoms=CHAT_ATOMS)
USER, RIGHT, WRONG = Message("user", "Who?"), "A pirate.", "A program."
SYSTEM = Message("system", "Speak like a pirate.")


def said(role, content, **fields):
    return {"role": role, "content": content, **fields}


def human(text):
    return {"from": "human", "value": text}


def save(path, *records):
    path = path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path, record, **options):
    (row,) = read_rows(save(path, record), **options)
    return row


TALK = [
    said("user", "Who?"),
    said("assistant", "It is Lyon.", weight=0),
    said("user", "Sure?"),
    said("assistant", "Paris"),
]
ASKED = [said("user", "Who?")]


def answered(text, *before):
    return [*before, said("assistant", text)]


PAIRS = {
    "texts": {"prompt": "Who?", "chosen": RIGHT, "rejected": WRONG},
    "prompt apart": {"prompt": ASKED, "chosen": answered(RIGHT), "rejected": answered(WRONG)},
    "prompt text apart": {"prompt": "Who?", "chosen": answered(RIGHT), "rejected": answered(WRONG)},
    "prompt inside": {"chosen": answered(RIGHT, *ASKED), "rejected": answered(WRONG, *ASKED)},
    "UltraFeedback": {
        "prompt": "Who?",
        "prompt_id": "7",
        "chosen": answered(RIGHT, *ASKED),
        "rejected": answered(WRONG, *ASKED),
        "messages": answered(RIGHT, *ASKED),
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "one message each": {"prompt": ASKED, "chosen": said("assistant", RIGHT), "rejected": said("assistant", WRONG)},
    "ShareGPT": {"conversations": [human("Who?")], "chosen": {"from": "gpt", "value": RIGHT}, "rejected": WRONG},
    "Alpaca": {"instruction": "Who?", "input": "", "chosen": RIGHT, "rejected": WRONG},
    "Alpaca list": {"instruction": "Who?", "input": "", "output": [RIGHT, WRONG]},
    "Orca": {"question": "Who?", "chosen": RIGHT, "rejected": WRONG},
    "HH": {"chosen": f"\n\nHuman: Who?\n\nAssistant: {RIGHT}", "rejected": f"\n\nHuman: Who?\n\nAssistant: {WRONG}"},
}


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_pair_of_every_format_is_the_same_row_and_a_system_column_comes_first(tmp_path, name, system):
    row = read(tmp_path, PAIRS[name] | ({"system": SYSTEM.content} if system else {"system": None}), kind="preference")
    assert (row.prompt, row.chosen, row.rejected) == ((*[SYSTEM] * system, USER), RIGHT, WRONG)
    expected = {"prompt_id": "7", "score_chosen": 8.5, "score_rejected": 3.0} if name == "UltraFeedback" else {}
    assert {key: value for key, value in row.attributes.items() if key != "source"} == expected
    chosen, _ = encode_preference(TOKENIZER, row)
    assert (SYSTEM.content in TOKENIZER.decode(chosen.tokens.tolist())) is system


def test_pair_of_several_turns_keeps_them_and_continues_the_prompt(tmp_path):
    turns = (USER, Message("assistant", "Guess."), Message("user", "No."))
    spoken = "\n\nHuman: Who?\n\nAssistant: Guess.\n\nHuman: No.\n\nAssistant: "
    inside = [said(*turn) for turn in turns]
    for record in (
        {"chosen": spoken + RIGHT, "rejected": spoken + WRONG},
        {"chosen": answered(RIGHT, *inside), "rejected": answered(WRONG, *inside)},
        {"prompt": ASKED, "chosen": answered(RIGHT, *inside[1:]), "rejected": answered(WRONG, *inside[1:])},
        {"prompt": [said(*SYSTEM), *ASKED], "chosen": answered(RIGHT, *inside), "rejected": answered(WRONG, *inside)},
    ):
        row = read(tmp_path, record)
        assert [m for m in row.prompt if m.role != "system"] == list(turns) and row.rejected == WRONG
        assert (row.prompt[0] == SYSTEM) is ("prompt" in record and len(record["prompt"]) == 2)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": "Hello"}, "chosen: expected a column prompt beside it, a list of messages, or text that begins"),
        ({"chosen": "\n\nHuman: Other?\n\nAssistant: x"}, "rejected: expected the turns of chosen"),
        ({"chosen": None}, "chosen: expected text, a message or a list of messages, got no such field, or null"),
        ({"prompt": "Else?", "chosen": answered("x", *ASKED)}, "chosen: expected a list of messages that begins with"),
        ({"prompt": ASKED, "chosen": ASKED}, "chosen: expected the last turn to be 'assistant', got 'user'"),
        ({"prompt": ASKED, "chosen": []}, "chosen: expected the last turn to be 'assistant', got 'no turns'"),
        ({"prompt": ASKED, "chosen": answered("x"), "tools": "[{}]"}, "tools: expected no such field"),
        ({"prompt": ASKED, "chosen": [said("assistant", "x", weight=0)]}, "chosen[0].weight: expected no such field"),
        (
            {"prompt": [said("user", "a"), said("assistant", "b", weight=1)], "chosen": "x"},
            "prompt[1].weight: expected no",
        ),
        ({"instruction": "a", "output": ["x"], "rejected": None}, "output: expected a text, or [chosen, rejected]"),
        ({"instruction": "a", "chosen": "x", "history": [["a", 3]]}, "history[0]: expected [question, answer]"),
        (
            {"prompt": [said("system", "a"), *ASKED], "chosen": "x", "system": "b"},
            "system: expected the system message of",
        ),
        ({"prompt": "a", "chosen": "x", "system": 3}, "system: expected text, got int 3"),
    ],
)
def test_pair_that_is_none_names_the_field(tmp_path, change, reason):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, {"rejected": PAIRS["HH"]["rejected"]} | change)
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:1: ") and reason in str(caught.value)


CONVERSATIONS = {
    "messages": {"messages": answered("A", *ASKED)},
    "developer": {"messages": [said("developer", SYSTEM.content), *answered("A", *ASKED)]},
    "parts": {
        "messages": [
            said("user", [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]),
            said("assistant", "A"),
        ]
    },
    "roles in conversations": {"conversations": answered("A", *ASKED)},
    "from in messages": {"messages": [human("Who?"), {"from": "gpt", "value": "A"}]},
    "prompt and completion": {"prompt": "Who?", "completion": "A"},
    "prompt and completion messages": {"prompt": ASKED, "completion": answered("A")},
    "Alpaca": {"instruction": "Who?", "output": "A"},
    "instances": {"instruction": "Who?", "instances": [{"input": "", "output": "A"}]},
    "question": {"question": "Who?", "answer": "A"},
}
NEUTRAL = {
    "tools": [],
    "tool_calls": None,
    "images": "",
    "history": [],
    "functions": "[]",
    "system": "",
    "chosen": None,
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_of_every_format_with_empty_and_null_columns(tmp_path, name):
    row = read(
        tmp_path, NEUTRAL | {key: None for key in ("prompt", "output", "rejected", "labels")} | CONVERSATIONS[name]
    )
    assert [m for m in row.messages if m.role != "system"] == [USER, Message("assistant", "A")]
    assert set(row.attributes) <= {"source"}
    if name != "developer":
        row = read(tmp_path, CONVERSATIONS[name] | {"system": SYSTEM.content})
    assert row.messages[0] == SYSTEM


def test_null_columns_are_absent_at_every_level(tmp_path):
    turns = [said("user", "Hi", name=None, tool_calls=None), said("assistant", "Hello", weight=None, refusal=None)]
    first = {"prompt": None, "chosen": None, "rejected": None, "messages": turns, "attributes": None, "id": None}
    second = {"messages": None, "instruction": "Hi", "input": None, "output": "Hello", "history": None, "system": None}
    third = {
        "question": None,
        "conversations": [{"from": "human", "value": "Hi", "weight": None}, {"from": "gpt", "value": "Hello"}],
    }
    rows = read_rows(save(tmp_path, first, second, third))
    assert [row.messages for row in rows] == [conversation("Hi", "Hello").messages] * 3
    assert rows[0].attributes == {}


def test_weight_zero_is_not_trained_and_stays_with_the_row(tmp_path):
    row = read(tmp_path, {"messages": TALK})
    assert row.weights == (0, 1) and row.id != Conversation(row.messages).id
    sample = encode_conversation(TOKENIZER, row.messages, weights=row.weights)
    whole = encode_conversation(TOKENIZER, row.messages)
    assert sample.tokens.tolist() == whole.tokens.tolist()
    learned = [token for token, weight in zip(sample.tokens.tolist(), sample.weights) if weight]
    assert TOKENIZER.decode(learned).strip() == "Paris" and learned.count(TOKENIZER.eos_id) == 1
    write_rows(tmp_path / "again.jsonl", [row])
    assert read_rows(tmp_path / "again.jsonl") == [row]
    changed = (*row.messages[:3], Message("assistant", "Rome"))
    assert kept_weights(row, changed) == (0, 1) and kept_weights(row.replace(weights=(0, 0)), changed) == (0, 1)
    ones = read(tmp_path, {"conversations": [human("a") | {"weight": 0}, {"from": "gpt", "value": "b", "weight": 1}]})
    assert ones.weights == () and ones.id == conversation("a", "b").id


def test_completion_does_not_train_the_answers_of_its_prompt(tmp_path):
    prompt = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    assert read(tmp_path, {"prompt": prompt, "completion": "d"}).weights == (0, 1)
    prompt[1]["weight"] = 1
    assert read(tmp_path, {"prompt": prompt, "completion": answered("d")}).weights == ()


def test_conversation_without_a_trained_answer_is_refused():
    with pytest.raises(ValueError, match="messages: expected an answer with weight 1, got 0 for all"):
        encode_conversation(TOKENIZER, conversation("a", "b").messages, weights=(0,))


LOST = {
    "messages[1].tool_calls": {
        "messages": answered("x", *ASKED)[:1] + [said("assistant", "x", tool_calls=[{"id": "1"}])]
    },
    "messages[1].reasoning_content": {"messages": [*ASKED, said("assistant", "4", reasoning_content="2 and 2")]},
    "messages[0].name": {"messages": [said("user", "a", name="Tom"), said("assistant", "b")]},
    "messages[0].weight": {"messages": [said("user", "a", weight=1), said("assistant", "b")]},
    "messages[2].role": {"messages": [*ASKED, said("assistant", "a"), said("tool", "b"), said("assistant", "c")]},
    "messages[0].content[1]": {
        "messages": [
            said("user", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "u"}]),
            said("assistant", "b"),
        ]
    },
    "conversations[1].from": {
        "conversations": [
            human("a"),
            {"from": "function_call", "value": "{}"},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b"},
        ]
    },
    "conversations[0].loss": {"conversations": [human("a") | {"loss": False}, {"from": "gpt", "value": "b"}]},
    "tools": {"conversations": [human("a"), {"from": "gpt", "value": "b"}], "tools": '[{"name": "rate"}]'},
    "images": {"messages": answered("a", *ASKED), "images": ["a.png"]},
    "history": {"question": "a", "answer": "b", "history": [["c", "d"]]},
    "thinking": {"instruction": "a", "output": "b", "thinking": "hm"},
    "label": {"prompt": "a", "completion": "b", "label": False},
    "instances[0].note": {"instruction": "a", "instances": [{"output": "b", "note": "c"}]},
}


@pytest.mark.parametrize("place", LOST)
def test_field_without_a_place_is_refused_by_name_or_kept_apart_and_counted(tmp_path, caplog, place):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, LOST[place])
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:1: {place}: expected no such field")
    assert "--unknown-fields count" in str(caught.value)
    row = read(tmp_path, LOST[place], unknown_fields="count")
    assert place in row.attributes["unread_fields"]
    generic = place.replace("[0]", "[]").replace("[1]", "[]").replace("[2]", "[]")
    assert f"{generic} 1" in caplog.text and "fields that rows have no place for" in caplog.text


def test_other_columns_become_attributes_and_are_named_once(tmp_path, caplog):
    records = [{"question": str(number), "answer": "b", "category": "x", "sytem": "typo"} for number in range(3)]
    rows = read_rows(save(tmp_path, *records))
    assert [row.attributes for row in rows] == [{"source": "rows", "category": "x", "sytem": "typo"}] * 3
    (record,) = [record.getMessage() for record in caplog.records]
    assert "columns kept as attributes" in record and "category 3" in record and "sytem 3" in record


def test_column_that_attributes_has_with_another_value_is_an_error(tmp_path):
    record = {"messages": answered("a", *ASKED), "attributes": {"score": 1}, "score": 2}
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: score: expected the value of attributes\.score, 1, got 2"):
        read(tmp_path, record)
    assert read(tmp_path, record | {"score": 1}).attributes == {"score": 1}


def test_wanted_kind_decides_where_a_record_is_of_two(tmp_path):
    path = save(tmp_path, PAIRS["UltraFeedback"])
    assert type(read_rows(path)[0]) is Preference
    (row,) = read_rows(path, kind="conversation")
    assert row.answer == RIGHT and row.attributes["score_rejected"] == 3.0
    with pytest.raises(ValueError, match="expected a process row, got a preference row"):
        read_rows(path, kind="process")


TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
KEYS = st.sampled_from((*TOOL_KEYS, "name", "weight", "reasoning_content", "refusal", "audio", "train", "loss", "id"))
VALUES = (
    st.none() | st.booleans() | st.integers(-1, 2) | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2)
)


@settings(max_examples=50, deadline=None)
@given(
    extra=st.dictionaries(KEYS, VALUES, max_size=3),
    place=st.integers(0, 1),
)
def test_no_key_of_a_message_vanishes_in_silence(tmp_path_factory, extra, place):
    turns = answered("b", *ASKED)
    turns[place] = turns[place] | extra
    path = save(tmp_path_factory.mktemp("rows"), {"messages": turns})
    said_something = {key for key, value in extra.items() if value not in (None, "", []) or value is False}
    read_as_weight = {"weight"} if extra.get("weight") in ((0, 1) if place else (0,)) else set()
    try:
        (row,) = read_rows(path)
    except ValueError as error:
        named = [key for key in said_something if f"messages[{place}].{key}: expected" in str(error)]
        assert named and not set(named) & read_as_weight
    else:
        assert said_something <= read_as_weight
        assert row.weights == ((0,) if place and extra.get("weight") == 0 and "weight" in said_something else ())

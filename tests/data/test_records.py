"""Rows in and out: known formats, bad input by file, line and field, and files that are never half written."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.equations import equation_holds, step_label
from wizard_engine.data.records import (
    Conversation,
    Message,
    Preference,
    Process,
    Reject,
    conversation,
    read_files,
    read_located,
    read_prompts,
    read_rows,
    scan_rows,
    write_rows,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "messages",
        "prompt",
        "chosen",
        "rejected",
        "steps",
        "labels",
        "conversations",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "role",
        "content",
        "from",
        "value",
        "instances",
        "attributes",
        "lineage",
        "id",
        "user",
        "assistant",
        "human",
        "gpt",
    ]
)


def turns(question="Why?", answer="Because."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def save(tmp_path, *lines, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_write_rows_read_rows_round_trip(tmp_path):
    user = (Message("system", "Be brief."), Message("user", "2+2?\u2028</s> ASSISTANT: x"))
    rows = [
        conversation("你好", "Hi </s> there", topic="greeting", nested={"a": [1, 2.5, None]}),
        Conversation((*user, Message("assistant", "4")), {}, {"parents": ["00"], "operator": "deepen"}),
        Preference(user, "4", "5", {"margin": 0.25}),
        Preference((), "better", "worse"),
        Process(user, ("a", "b"), (1, -1)),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), attributes=st.dictionaries(TEXT, JSON, max_size=3)
)
def test_write_rows_keeps_any_unicode_text(tmp_path_factory, pairs, attributes):
    messages = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    row = Conversation(tuple(messages), attributes)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, [row, row])
    assert read_rows(path, kind="conversation") == [row, row]


@settings(max_examples=50, deadline=None)
@given(value=st.dictionaries(KEYS | st.text(max_size=5), JSON, max_size=6) | JSON, data=st.data())
def test_scan_rows_gives_a_row_or_a_reject_for_any_json(tmp_path_factory, value, data):
    record = data.draw(
        st.sampled_from(
            [value, turns(), {**turns(), "messages": value}, {"prompt": "q", "chosen": value, "rejected": "b"}]
        )
    )
    path = save(tmp_path_factory.mktemp("rows"), turns("before"), json.dumps(record), turns("after"))
    items = list(scan_rows(path))
    assert items[0].instruction == "before" and items[-1].instruction == "after"
    assert len(items) >= 3
    assert all(not isinstance(item, Reject) or item.error.startswith(f"{path}:2: ") for item in items[1:-1])


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=60), array=st.booleans(), length=st.integers(0, 200))
def test_read_rows_any_bytes_raise_value_error_with_the_line_or_give_rows(tmp_path_factory, content, array, length):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    valid = json.dumps([turns()] * 2 if array else turns()).encode()
    path.write_bytes(valid[:length] + content)
    try:
        rows = read_rows(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}:")
        assert str(error).removeprefix(f"{path}:").split(":")[0].isdigit()
    else:
        assert rows


def test_row_id_depends_on_content_alone():
    row = conversation("a", "b", topic="x")
    assert row.id == row.replace(attributes={}, lineage={"operator": "deepen"}).id
    assert len({row.id, conversation("a", "c").id, conversation("b", "a").id, Preference((), "a", "b").id}) == 4
    assert len(row.id) == 16 and int(row.id, 16) >= 0


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"messages": []}, "messages: expected a user turn"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages: expected the last turn to be 'assistant'"),
        (turns(answer="  "), "messages[1].content: expected text, got '  '"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role: expected one of system, developer"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: expected text, got int 3"),
        ({"messages": ["a"]}, "messages[0]: expected an object, got str 'a'"),
        ({**turns(), "attributes": 3}, "attributes: expected an object, got int 3"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "messages[1].role"),
        ({"conversations": [{"from": "martian", "value": "a"}]}, "conversations[0].from: expected one of"),
        ({"instruction": "a"}, "output: expected str, got no such field, or null"),
        ({"instruction": "a", "output": None}, "output: expected str, got no such field, or null"),
        ({"question": "a", "answer": ["b"]}, "answer: expected text, got list"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected: expected a text other than chosen"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen: expected text"),
        ({"prompt": "a", "steps": ["x"], "labels": [1, 1]}, "labels: expected 1, one per step, got 2"),
        ({"prompt": "a", "steps": ["x"], "labels": [True]}, "labels[0]: expected 1, 0 or -1, got True"),
        ({"prompt": "a", "steps": [], "labels": []}, "steps: expected at least one step"),
        ({"instances": [], "instruction": "a"}, "instances: expected at least one"),
        ({"other": 1}, "record: expected messages"),
        ([1], "record: expected an object, got list"),
        ('{"messages": [{"role": "user"', "json: expected a complete JSON value"),
        ('{"instruction": "a", "output": NaN}', "json: expected a JSON value, got NaN"),
        ('{"instruction": "a\\ud800", "output": "b"}', "instruction: expected valid Unicode"),
        ('{"instruction": "a", "output": "b"} x', "json: expected the end of the line"),
        ("[" * 4000, "brackets"),
    ],
)
def test_read_rows_error_names_file_line_and_field(tmp_path, record, reason):
    path = save(tmp_path, turns(), "", record)
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)


def test_read_rows_invalid_utf8_names_the_byte(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(turns()).encode() + b'\n{"question": "a\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: json: expected UTF-8, got byte 0xff at byte 16"):
        read_rows(path)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"[]", b"\xef\xbb\xbf"])
def test_read_rows_empty_file_is_an_error_unless_allowed(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"rows\.json:1: file: expected at least one record"):
            read_rows(path, on_error=on_error)
    assert read_rows(path, allow_empty=True) == []


def test_read_rows_truncated_array_names_the_line_of_the_broken_record(tmp_path):
    lines = ["[", json.dumps(turns("a")) + ",", json.dumps(turns("b")) + ",", json.dumps(turns("c"))[:-9]]
    path = save(tmp_path, *lines, name="rows.json")
    with pytest.raises(ValueError, match=r"rows\.json:4: json: expected a complete JSON value"):
        read_rows(path)
    assert [row.instruction for row in read_rows(path, on_error="skip")] == ["a", "b"]


def test_read_rows_array_lines_point_at_the_element(tmp_path):
    path = save(tmp_path, json.dumps([turns(), turns(), {"x": 1}, turns()], indent=2), name="rows.json")
    (reject,) = [item for item in scan_rows(path) if isinstance(item, Reject)]
    assert path.read_text().splitlines()[reject.line : reject.line + 1] == ['    "x": 1']
    save(tmp_path, json.dumps([turns()]) + "x", name="rows.json")
    with pytest.raises(ValueError, match="json: expected the end of the file, got 'x"):
        read_rows(path)


def test_read_rows_skip_counts_logs_and_writes_rejects(tmp_path, caplog):
    path = save(tmp_path, turns("a"), "{broken", turns("b"), {"other": 1})
    rows, bad = read_files([path], on_error="skip", rejects=tmp_path / "rejects.jsonl")
    assert [row.instruction for row in rows] == ["a", "b"] and len(bad) == 2
    assert "2 records rejected, 2 rows kept" in caplog.text
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [item["line"] for item in written] == [2, 4]
    assert written[0]["text"] == "{broken" and written[1]["error"].startswith(f"{path}:4: record: ")


def test_read_rows_of_another_kind_is_an_error(tmp_path):
    path = save(tmp_path, turns())
    with pytest.raises(ValueError, match=":1: record: expected a preference row, got a conversation row"):
        read_rows(path, kind="preference")
    with pytest.raises(ValueError, match="kind: expected one of conversation"):
        read_rows(path, kind="picture")


def test_write_rows_refuses_an_invalid_row_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [conversation("a", "b")])
    with pytest.raises(ValueError, match=r"row 1: messages\[1\].content: expected text"):
        write_rows(path, [conversation("c", "d"), conversation("e", "")])
    assert [row.instruction for row in read_rows(path)] == ["a"]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, "\ud800"])
def test_write_rows_refuses_what_json_has_no_form_for(tmp_path, value):
    with pytest.raises(ValueError, match="row 1: "):
        write_rows(tmp_path / "rows.jsonl", [conversation("a", "b"), conversation("a", "b", bad=value)])
    assert os.listdir(tmp_path) == []


def test_write_rows_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [conversation("a", "b")])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_rows(path, [conversation("c", "d")])
    assert [row.instruction for row in read_rows(path)] == ["a"]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_sharegpt_roles_and_dropped_turns(tmp_path, caplog):
    talk = [
        ("system", "s"),
        ("gpt", "hello"),
        ("human", "q"),
        ("function_call", "{}"),
        ("observation", "1"),
        ("gpt", "a"),
    ]
    record = {"conversations": [{"from": who, "value": text} for who, text in talk], "tools": "[]"}
    path = save(tmp_path, record, name="talk.jsonl")
    with pytest.raises(
        ValueError, match=r"conversations\[3\].from: .*no tools.*, got 'function_call'; .*--unknown-fields"
    ):
        read_rows(path)
    caplog.clear()
    (row,) = read_rows(path, unknown_fields="count")
    assert [message.role for message in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert "talk.jsonl: 1 turns before the first of the user left out of the rows" in caplog.text
    roles = {"conversations[3].from": "function_call", "conversations[4].from": "observation"}
    assert row.attributes == {"source": "talk", "dropped_leading_turns": 1, "unread_fields": roles}


def test_alpaca_instances_and_foreign_keys_are_kept(tmp_path):
    alpaca = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "history": [["h", "i"]],
        "id": "x7",
        "source": "own",
    }
    tasks = {"id": "t", "instruction": "Do", "instances": [{"input": "", "output": "x"}, {"input": "y", "output": "z"}]}
    rows = read_rows(save(tmp_path, alpaca, tasks))
    assert [message.content for message in rows[0].messages] == ["h", "i", "Add.\n1 2", "3"]
    assert rows[0].attributes == {"source": "own", "source_id": "x7"}
    assert [(row.instruction, row.answer) for row in rows[1:]] == [("Do", "x"), ("Do\ny", "z")]


def test_gsm8k_annotations_leave_the_text_and_stay_as_attribute(tmp_path):
    answer = "She has 2*3=<<2*3=6>>6.\n#### 6"
    (row,) = read_rows(save(tmp_path, {"question": "q", "answer": answer}))
    assert row.answer == "She has 2*3=6.\n#### 6" and row.attributes["annotated"] == answer


def test_differing_id_of_a_row_is_kept_as_source_id(tmp_path):
    (row,) = read_rows(save(tmp_path, {**turns(), "id": "mine"}))
    assert row.attributes["source_id"] == "mine" and row.id == conversation("Why?", "Because.").id


@pytest.mark.parametrize(
    "equation, holds",
    [
        ("3*4=12", True),
        ("10/3=3.33", True),
        ("10/3=3.3", True),
        ("10/3=3", False),
        ("3*4=13", False),
        ("$5+.5=5.5", True),
        ("20%*50=10", True),
        ("1,000+1=1001", True),
        ("2*(3+4)=14.0", True),
        ("-3+5=2", True),
        ("05+1=6", True),
        ("2**9=512", None),
        ("x+1=2", None),
        ("5", None),
        ("1/0=0", None),
        ("3+4=7=7", True),
        ("__import__('os')=1", None),
        ("1e9*2=3", None),
        ("(" * 190 + "=1", None),
        ("9" * 180 + "*2=1", False),
    ],
)
def test_equation_holds(equation, holds):
    assert equation_holds(equation) is holds


def test_step_label_takes_every_equation_of_a_line():
    assert step_label("a <<1+1=2>> b <<2+2=4>>") == 1
    assert step_label("a <<1+1=2>> b <<2+2=5>>") == -1
    assert step_label("a <<x+1=2>> b") == step_label("plain") == 0


def test_solutions_become_one_process_row_each(tmp_path):
    solver = {"solution": "2+2=<<2+2=4>>4\n4-1=<<4-1=2>>2\nA: 2", "is_correct": False}
    (row,) = read_rows(save(tmp_path, {"question": "q", "ground_truth": "g", "6b": solver}))
    assert row.steps == ("2+2=4", "4-1=2", "A: 2") and row.labels == (1, -1, 0)
    assert row.attributes["solver"] == "6b" and row.attributes["is_correct"] is False


def test_read_prompts_of_rows_and_of_questions(tmp_path):
    path = save(tmp_path, {"question_id": 1, "turns": ["a", "b"]}, turns("c"))
    assert read_prompts(path) == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"q\.jsonl:1: "):
        read_prompts(save(tmp_path, {"turns": 3}, name="q.jsonl"))


@pytest.mark.parametrize(
    "name, count, kind",
    [
        ("gsm8k/train.jsonl", 7473, Conversation),
        ("gsm8k/model_solutions.jsonl", 4 * 1319, Process),
        ("instructions/alpaca_en.json", 999, Conversation),
        ("instructions/alpaca_zh.json", 1000, Conversation),
        ("instructions/sharegpt_tools_en.json", 300, Conversation),
        ("preferences/dpo_en.json", 300, Preference),
        ("instructions/seed_tasks.jsonl", 175, Conversation),
        ("instructions/user_oriented.jsonl", 252, Conversation),
    ],
)
def test_real_files_are_read_whole(shared_data, name, count, kind):
    rows = read_rows(shared_data / name, unknown_fields="count" if "tools" in name else "refuse")
    assert len(rows) == count and all(type(row) is kind for row in rows)


def test_step_label_agrees_with_every_annotation_of_gsm8k(shared_data):
    rows = read_rows(shared_data / "gsm8k/train.jsonl")
    labels = [step_label(line) for row in rows for line in row.attributes.get("annotated", "").splitlines()]
    assert labels.count(1) > 20000 and labels.count(-1) == 0


def test_read_located_names_the_line_of_every_row_across_blank_and_rejected_ones(tmp_path):
    good = '{"question": "1 + 1?", "answer": "2"}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n\nbroken\n{good}\n")
    (tmp_path / "b.json").write_text(f"[\n{good},\n{good}\n]")
    files = [tmp_path / "a.jsonl", tmp_path / "b.json"]
    rows, bad = read_located(files, on_error="skip", rejects=tmp_path / "rejects.jsonl")
    assert [where for where, _ in rows] == [f"{files[0]}:1", f"{files[0]}:4", f"{files[1]}:2", f"{files[1]}:3"]
    assert [reject.line for reject in bad] == [3]


def test_source_is_the_file_and_its_folder_where_the_stem_is_a_split(tmp_path):
    for name in ("gsm8k/train.jsonl", "gsm8k/alpaca.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    sources = [read_rows(tmp_path / f"gsm8k/{name}.jsonl")[0].attributes["source"] for name in ("train", "alpaca")]
    assert sources == ["gsm8k/train", "alpaca"]

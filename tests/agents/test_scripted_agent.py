"""Agents whose replies are written in a file."""

import json

import pytest

from wizard_engine.agents import Cast, make_agent, prompts
from wizard_engine.agents.calls import derive_seed
from wizard_engine.agents.estimate import StandInCast
from wizard_engine.agents.protocol import Request
from wizard_engine.agents.scripted import ScriptedAgent
from wizard_engine.data.records import Message
from wizard_engine.runtime.process import Runtime

LINES = (
    {"task": "answer", "instruction": "Add 2  and\n3.", "reply": "5"},
    {"task": "answer", "instruction": "Add 2 and 3.", "reply": "It is 5."},
    {"task": "evolve", "instruction": "Add 2 and 3.", "reply": "Add 2, 3 and 4."},
    {"task": "compare", "reply": "Not Equal"},
    {"task": "judge", "instruction": "Add 2 and 3.", "reply": "[[9]] [[2]]"},
    {"task": "user", "instruction": "Add 2 and 3.", "reply": "And 4?"},
)


def write(path, lines=LINES):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def agent(tmp_path):
    return make_agent(f"scripted:{write(tmp_path / 'replies.jsonl')}")


def reply(agent, task, seed=0, **fields):
    return agent.respond([Request(task, prompts.request_messages(task, **fields), seed=seed)])[0]


def answer(agent, *turns, seed=0, task="answer"):
    messages = tuple(Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns))
    return agent.respond([Request(task, messages, seed=seed)])[0]


def test_replies_are_found_by_task_and_instruction(agent):
    assert reply(agent, "evolve", operator="steps", method="x", instruction=" Add 2 and\t3. ").text == "Add 2, 3 and 4."
    assert reply(agent, "judge", instruction="Add 2 and 3.", answer_a="5", answer_b="6").text == "[[9]] [[2]]"
    assert answer(agent, "Hello", "Hi", "Add 2 and 3.").text in ("5", "It is 5.")
    assert answer(agent, "Add 2 and 3.", "5", task="user").text == "And 4?"


def test_a_line_without_instruction_replies_to_all_others(agent):
    assert reply(agent, "compare", first="a", second="b").text == "Not Equal"


def test_the_seed_chooses_among_several_replies(agent):
    drawn = [answer(agent, "Add 2 and 3.", seed=seed).text for seed in range(4)]
    assert drawn[:2] == ["5", "It is 5."] and set(drawn[2:]) == set(drawn[:2])
    seeds = [derive_seed("sample", number) for number in range(12)]
    texts = [answer(agent, "Add 2 and 3.", seed=seed).text for seed in seeds]
    assert set(texts) == set(drawn) and texts == [answer(agent, "Add 2 and 3.", seed=seed).text for seed in seeds]


def test_rows_with_the_same_seeds_draw_for_themselves(tmp_path):
    lines = [{"task": "answer", "instruction": f"q{row}", "reply": reply} for row in range(12) for reply in "ab"]
    agent = ScriptedAgent(write(tmp_path / "x.jsonl", lines))
    seeds = [derive_seed("sample", number) for number in range(4)]
    drawn = {"".join(answer(agent, f"q{row}", seed=seed).text for seed in seeds) for row in range(12)}
    assert len(drawn) > 4


def test_a_list_to_rank_is_answered_from_the_scores_of_its_instructions(tmp_path):
    whole = prompts.numbered(["c", "a  b"])
    scores = {"a b": "4", "c": "7.5", whole: "1: 1\n2: 2"}
    lines = [{"task": "rank", "instruction": text, "reply": score} for text, score in scores.items()]
    agent = ScriptedAgent(write(tmp_path / "x.jsonl", lines))
    assert reply(agent, "rank", instructions=prompts.numbered(["a\nb", "a b", "c"])).text == "1: 4\n2: 4\n3: 7.5"
    assert reply(agent, "rank", instructions=whole).text == "1: 1\n2: 2"
    failed = reply(agent, "rank", instructions=prompts.numbered(["a b", "new one"]))
    assert failed.reason == "no scripted reply" and "'rank' of 'new one'" in failed.error


@pytest.mark.parametrize("task", ["answer", "user"])
def test_an_absent_reply_is_a_failed_call_that_names_the_row(agent, task):
    failed = answer(agent, "Write a poem about the sea.", task=task)
    assert failed.reason == "no scripted reply" and "Write a poem about the sea." in failed.error
    failed = reply(agent, "evolve", operator="steps", instruction="Write a poem.")
    assert failed.reason == "no scripted reply" and "'evolve' of 'Write a poem.'" in failed.error


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    one, same = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    other = write(tmp_path / "c.jsonl", LINES[:-1])
    prints = [ScriptedAgent(path).fingerprint for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2] and ScriptedAgent(one).name != ScriptedAgent(same).name


BAD = {
    "not json": ("{", r"x\.jsonl:2: json: "),
    "no object": ("[1]", r"x\.jsonl:2: json: expected an object"),
    "misspelt": ('{"task": "answer", "instrction": "a", "reply": "b"}', r"x\.jsonl:2: instrction: .*'instruction'"),
    "no task": ('{"reply": "b"}', r"x\.jsonl:2: task: expected a text, got none"),
    "no reply": ('{"task": "answer"}', r"x\.jsonl:2: reply: expected a text, got none"),
    "other task": ('{"task": "sing", "reply": "b"}', r"x\.jsonl:2: task: expected one of answer, .*got 'sing'"),
    "number": ('{"task": "answer", "reply": 5}', r"x\.jsonl:2: reply: expected a text, got int 5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines_are_named(tmp_path, kind):
    line, message = BAD[kind]
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(LINES[0])}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        make_agent(f"scripted:{path}")


def test_files_that_are_absent_or_empty_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl:1: file: expected lines of replies, got no such file"):
        make_agent(f"scripted:{tmp_path / 'none.jsonl'}")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.jsonl:1: file: expected a line"):
        make_agent(f"scripted:{tmp_path / 'empty.jsonl'}")
    with pytest.raises(ValueError, match="scripted:FILE, openai:MODEL@URL"):
        make_agent("script")


def test_a_cast_and_an_estimate_know_it(tmp_path):
    spec = f"scripted:{write(tmp_path / 'replies.jsonl')}"
    cast = Cast(tmp_path / "ledger.sqlite", Runtime(), quiet=True)
    request = Request("answer", (Message("user", "Add 2 and 3."),))
    assert cast.scheduler.run(cast.scheduler.ask(cast.agent(spec), request)).text == "5"
    name = cast.agent(spec).name
    cast.close()
    estimate = StandInCast(tmp_path / "ledger.sqlite")
    estimate.scheduler.run(estimate.scheduler.ask(estimate.agent(spec), request))
    assert estimate.estimate()["stored"] == 1 and estimate.agent(spec).name == name
    estimate.close()

"""Rows that are not of the world: its programs refuse them, and broken ones of its own they take as ever."""

import pytest

from wizard_engine.agents import prompts
from wizard_engine.agents.calls import Calls, check_calls
from wizard_engine.agents.protocol import Request
from wizard_engine.data.records import Message, read_rows
from wizard_engine.world.agents import is_of_world
from wizard_engine.world.corpus import natural_corpus
from wizard_engine.world.evolve import HEADINGS
from wizard_engine.world.programs import HABITS, program

WORLD = "Tom has 12 apples. He buys 3 bags with 4 apples each. He sells 5. How many apples does Tom have now?"
BROKEN = (
    "Tom has some apples. He sells 5. How many apples does Tom have now?",
    "Tom has 12 apples. He sells 15. How many apples does Tom have now?",
    "Suppose instead that Leo gets another 7. Find how many rulers Leo has now.",
    "Tom has 12 apples. He sells 5. How many rulers does Tom have now?",
    *(heading + WORLD for heading in HEADINGS),
)
OTHERS = (
    "Write a poem.",
    "",
    "Natalia sold clips to 48 of her friends in April. How many did she sell?",
    # Sentences of the world within other ones, its names, its nouns, its numbers.
    "Tom has 12 apples. He eats two thirds of them. How many apples does Tom have now?",
    "Ana has 3 cats.",
    "Please help me.",
    "翻译成英文：你好。",
    "How many apples does Tom have now? Explain.",
)


def fields_of(task, text):
    return {
        "evolve": {"operator": "steps", "instruction": text},
        "rewrite": {"operator": "correctness", "instruction": text, "answer": "5"},
        "compare": {"first": text, "second": WORLD},
        "judge": {"instruction": text, "answer_a": "5", "answer_b": "6"},
        "rate": {"instruction": text, "answer": "5", "reference": "5"},
        "label": {"instruction": text, "answer_steps": "1+1=2\n2"},
        "suggest": {"instruction": text, "answer": "5", "better": "6"},
        "diagnose": {"instruction": text, "evolved": WORLD},
        "rank": {"instructions": prompts.numbered([text, text])},
        "analyse": {"method": "1. Think.", "trajectory": prompts.trajectory([([text, text], "5")])},
    }[task]


DOES = {
    "answer": "world:expert",
    "rewrite": "world:careless",
    "user": "world:evolver",
    "evolve": "world:evolver",
    "analyse": "world:optimizer",
    "rank": "world:ranker",
    **dict.fromkeys(("compare", "diagnose", "judge", "rate", "label", "suggest"), "world:judge"),
}


def asked(task, text):
    if task in ("answer", "user"):
        turns = [Message("user", text), *([Message("assistant", "5")] if task == "user" else [])]
        request = Request(task, tuple(turns))
    else:
        request = Request(task, prompts.request_messages(task, **fields_of(task, text)))
    return program(DOES[task]).respond([request])[0]


@pytest.mark.parametrize("task", DOES)
def test_rows_of_other_kinds_are_refused(task):
    for text in OTHERS:
        reply = asked(task, text)
        assert reply.reason == "not of this world" and not reply.text, text
        assert DOES[task] in reply.error


@pytest.mark.parametrize("task", DOES)
def test_broken_rows_of_the_world_are_not(task):
    for text in (WORLD, *BROKEN):
        assert asked(task, text).ok, text


@pytest.mark.parametrize("name", HABITS)
def test_all_answering_programs_refuse(name):
    request = Request("answer", (Message("user", WORLD), Message("assistant", "19"), Message("user", "Thank you!")))
    assert program(name).respond([request])[0].reason == "not of this world"


def test_a_follow_up_is_of_the_world_with_its_problem_and_without():
    turns = (Message("user", WORLD), Message("assistant", "19"), Message("user", BROKEN[2].replace("Leo", "Tom")))
    assert program("world:expert").respond([Request("answer", turns)])[0].ok


def test_the_whole_corpus_is_of_the_world():
    rows = natural_corpus(1500, seed=3)
    assert all(is_of_world(m.content) for row in rows for m in row.messages if m.role == "user")


def test_evolutions_of_other_kinds_are_no_reason_to_refuse():
    judge = program("world:judge")
    request = Request("compare", prompts.request_messages("compare", first=WORLD, second="Write a poem."))
    assert judge.respond([request])[0].text == "Not Equal"


def test_refusals_end_a_stage_with_what_to_name_instead():
    calls = Calls()

    async def work():
        for seed in range(3):
            await calls.ask(program("world:judge"), "label", fields_of("label", "Hi"), seed, read=lambda text: text)

    calls.scheduler.run(work())
    with pytest.raises(
        ValueError, match=r"not of this world 3\); name a reference: or scripted: agent, .*--max-missing"
    ):
        check_calls(calls.statistics(), 0.05)


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "instructions/alpaca_en.json"])
def test_real_rows_are_refused(shared_data, name):
    rows = read_rows(shared_data / name, unknown_fields="count")[:400]
    assert not any(is_of_world(row.instruction) for row in rows)

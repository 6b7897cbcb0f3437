"""The programs' replies: the same as ever for the same fields, and read as ever by the readers."""

import hashlib
import random
import re
from functools import cache

import pytest

from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Request
from wizard_engine.agents.reading.texts import without_remarks
from wizard_engine.agents.replies import read_reply, read_rewritten, read_user
from wizard_engine.data.records import Message
from wizard_engine.data.solution_steps import step_texts
from wizard_engine.world import vocabulary as words
from wizard_engine.world.evolve import OPERATORS
from wizard_engine.world.problems import random_problem
from wizard_engine.world.programs import program
from wizard_engine.world.render import render
from wizard_engine.world.solve import STYLES, solve

PROGRAM_OF = {
    "evolve": "world:evolver",
    "compare": "world:judge",
    "rewrite": "world:expert",
    "judge": "world:judge",
    "rate": "world:judge",
    "label": "world:judge",
    "rank": "world:ranker",
    "suggest": "world:judge",
    "analyse": "world:optimizer",
    "optimise": "world:optimizer",
}
# Of the replies to 120 requests a task, from before the prompts had optional fields and their numbered steps.
DIGESTS = {
    "evolve": "3d8853c51e80e660",
    "compare": "2c1d03ae86d1722b",
    "rewrite": "4fc8287e900658c7",
    "judge": "b3d940a15ea298f3",
    "rate": "15df7d70b000f3ba",
    "label": "f7474c000580da79",
    "rank": "60f1f8327656c0d7",
    "suggest": "79581cba45b2a541",
    "analyse": "1e620dca8cbc712a",
    "optimise": "ecb15f838a50455e",
}


def _texts(index: int) -> tuple[list[str], list[str]]:
    """Three instructions and three answers to the first of them."""
    rng = random.Random(f"replies unchanged {index}")
    problems = [
        random_problem(rng, operations=1 + (index + i) % 4, language="es" if index % 7 == 6 else "en") for i in range(3)
    ]
    answers = [solve(problems[0], STYLES[(index + i) % len(STYLES)], rng) for i in range(3)]
    return [render(problem, rng) for problem in problems], answers


def _fields(task: str, index: int) -> dict[str, str]:
    """Fields of a prompt, those that every version of it had."""
    asked, answers = _texts(index)
    history = prompts.dialogue([Message("user", asked[1]), Message("assistant", "It is 3.")]) if index % 3 == 2 else ""
    trajectory = prompts.trajectory(
        [([asked[0], asked[1]], answers[0]), ([asked[1], asked[1]], "Please provide more.")]
    )
    return {
        "evolve": {"operator": OPERATORS[index % 6], "method": "Be brief." * (index % 2), "instruction": asked[0]},
        "compare": {"first": asked[0], "second": asked[index % 2]},
        "rewrite": {
            "operator": ("correctness", "relevance")[index % 2],
            "suggestion": "Look at step 1." * (index % 3 == 0),
            "instruction": asked[0],
            "answer": answers[0],
        },
        "judge": {"history": history, "instruction": asked[0], "answer_a": answers[0], "answer_b": answers[1]},
        "rate": {
            "history": history,
            "instruction": asked[0],
            "reference": answers[1] * (index % 2),
            "answer": answers[0],
        },
        "label": {"instruction": asked[0], "answer_steps": "\n".join(step_texts(answers[0]))},
        "rank": {"instructions": prompts.numbered(asked)},
        "suggest": {"instruction": asked[0], "answer": answers[0], "better": answers[1]},
        "analyse": {"method": "1. Think.", "trajectory": trajectory},
        "optimise": {"method": "1. Think.", "feedback": "Case 1: jump in complexity, too many changes at once"},
    }[task]


MORE = {
    "rewrite": {"history": "### User\nHi", "reference": "The answer is 3."},
    "judge": {"criteria": "math", "reference": "The answer is 3."},
    "rate": {"criteria": "coding"},
    "label": {"reference": "The answer is 3."},
    "suggest": {"history": "### User\nHi", "reference": "The answer is 3."},
}


def _reply(task: str, fields: dict[str, str], seed: int) -> str:
    (reply,) = program(PROGRAM_OF[task]).respond([Request(task, prompts.request_messages(task, **fields), seed=seed)])
    assert reply.ok, reply.error
    return reply.text


@cache
def _replies(task: str, count: int) -> tuple[str, ...]:
    return tuple(_reply(task, _fields(task, index), index) for index in range(count))


@pytest.mark.parametrize("task", PROGRAM_OF)
def test_replies_are_those_of_before(task):
    digest = hashlib.sha256("\0".join(_replies(task, 120)).encode()).hexdigest()[:16]
    assert digest == DIGESTS[task]


@pytest.mark.parametrize("task", MORE)
def test_new_fields_do_not_enter_the_seeds(task):
    for index in range(20):
        assert _reply(task, _fields(task, index) | MORE[task], index) == _replies(task, 120)[index]


def _as_written(task: str, text: str):
    """The meaning of a program's reply by the form in which the programs write it."""
    if task == "evolve":
        return text.removeprefix("#Rewritten Instruction#:\n")
    if task == "compare":
        return {"Equal": True, "Not Equal": False}[text]
    if task in ("judge", "rate"):
        return tuple(float(score) for score in re.findall(r"\[\[([\d.]+)\]\]", text.rpartition("\n")[2]))
    if task == "label":
        return tuple(map(int, text.split("\n")))
    if task == "rank":
        return tuple(float(line.partition(": ")[2]) for line in text.split("\n"))
    if task == "optimise":
        return text.removeprefix("```\n").removesuffix("\n```")
    return text


@pytest.mark.parametrize("task", PROGRAM_OF)
def test_replies_are_read_as_they_are_written(task):
    for index in range(300):
        fields = _fields(task, index)
        text = _reply(task, fields, index)
        expected = _as_written(task, text)
        if task == "rewrite":
            expected = expected.removeprefix(f"{words.META_REMARK}\n")
        assert read_reply(task, text, fields) == expected


@pytest.mark.parametrize("name", ["world:careless", "world:terse", "world:rambler"])
def test_rewrites_lose_the_remark_alone(name):
    for index in range(100):
        messages = prompts.request_messages("rewrite", **_fields("rewrite", index))
        (reply,) = program(name).respond([Request("rewrite", messages, seed=index)])
        assert without_remarks(reply.text) == reply.text.removeprefix(f"{words.META_REMARK}\n")


@pytest.mark.parametrize("name", ["world:careless", "world:terse", "world:rambler", "world:expert"])
def test_rewrites_of_all_programs_are_answers(name):
    for index in range(150):
        fields = _fields("rewrite", index)
        messages = prompts.request_messages("rewrite", **fields)
        (reply,) = program(name).respond([Request("rewrite", messages, seed=index)])
        assert read_rewritten(reply.text, fields["answer"]) == reply.text.removeprefix(f"{words.META_REMARK}\n")


def test_messages_of_the_programs_user_are_read_as_they_are_written():
    for index in range(150):
        asked, answers = _texts(index)
        chat = (Message("user", asked[0]), Message("assistant", answers[0]))
        (reply,) = program("world:evolver").respond([Request("user", chat, seed=index)])
        assert read_user(reply.text) == reply.text

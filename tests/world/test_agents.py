"""The programs behind the agents' protocol: every task, the stated rates, determinism, speed."""

import random
import time
from collections.abc import Sequence

import pytest

from wizard_engine import agents
from wizard_engine.agents import prompts, replies
from wizard_engine.agents.protocol import Agent, Request
from wizard_engine.data.records import Conversation, Message
from wizard_engine.world import vocabulary as words
from wizard_engine.world.corpus import natural_corpus
from wizard_engine.world.evolve import OPERATORS, RULES
from wizard_engine.world.parse import parse, parse_turns
from wizard_engine.world.programs import PROGRAMS, program, register
from wizard_engine.world.solve import check_answer, solve

TEXT = "Tom has 12 apples. He buys 3 bags with 4 apples each. He sells 5. How many apples does Tom have now?"
VAGUE = "Tom has some apples. He sells 5. How many apples does Tom have now?"
ALONE = "Suppose instead that Leo gets another 7. Find how many rulers Leo has now."
BROKEN = "Tom has 12 apples. He sells 15. How many apples does Tom have now?"


@pytest.fixture(scope="module")
def rows() -> list[Conversation]:
    drawn = [row for row in natural_corpus(900, seed=11) if len(row.messages) == 2]
    return [row for row in drawn if not parse(row.instruction).defect]


def ask(agent: Agent, requests: Sequence[Request]) -> list[str]:
    answered = agent.respond(requests)
    assert all(reply.ok for reply in answered)
    return [reply.text for reply in answered]


def one(name: str, task: str, seed: int = 0, **fields: str) -> str:
    return ask(program(name), [Request(task, prompts.request_messages(task, **fields), seed=seed)])[0]


def answer(name: str, *turns: str, seed: int = 0) -> str:
    messages = [Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    return ask(program(name), [Request("answer", tuple(messages), seed=seed)])[0]


def test_programs_are_registered_under_their_names():
    register()
    for name in PROGRAMS:
        agent = agents.make_agent(name)
        assert isinstance(agent, Agent) and agent.name == name
    assert len({program(name).fingerprint for name in PROGRAMS}) == len(PROGRAMS) == 8


def test_unknown_program_is_refused():
    with pytest.raises(ValueError, match="world program: expected one of world:expert"):
        program("world:genius")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("expert", 0.94, 1.0), ("careless", 0.70, 0.84), ("terse", 0.86, 0.95), ("rambler", 0.80, 0.91)],
)
def test_answerers_are_right_at_their_rates(rows: list[Conversation], name: str, low: float, high: float):
    texts = ask(program(f"world:{name}"), [Request("answer", row.messages[:1]) for row in rows])
    right = sum(check_answer(parse(row.instruction), text) for row, text in zip(rows, texts, strict=True))
    assert low < right / len(rows) < high


def test_answers_follow_the_conversation():
    second = "Suppose instead that Tom sells 7 of them. How many apples does Tom have now?"
    answers = [answer("world:expert", TEXT, seed=seed) for seed in range(20)]
    assert answers.count("3*4=12\n12+12=24\n24-5=19\nThe answer is 19.") > 15
    changed = [answer("world:expert", TEXT, "whatever", second, seed=seed) for seed in range(20)]
    assert sum(text.endswith("\nThe answer is 17.") for text in changed) > 15


@pytest.mark.parametrize("text", [VAGUE, BROKEN, "#Rewritten Prompt#: " + TEXT, ALONE])
def test_expert_asks_back_where_there_is_no_answer(text: str):
    reply = answer("world:expert", text)
    assert reply.startswith("What do you mean?") and "please provide" in reply.lower()


@pytest.mark.parametrize("name", ["careless", "terse", "rambler"])
def test_others_sometimes_guess_where_there_is_no_answer(name: str):
    for text in (
        VAGUE,
        BROKEN,
        "Tom has 7 apples. He shares them among 2 friends. How many apples does each friend get?",
    ):
        replies = {answer(f"world:{name}", text, seed=seed) for seed in range(30)}
        assert any("please provide" in each.lower() for each in replies)
        assert any("please provide" not in each.lower() for each in replies)


def test_rewrites_of_the_expert_mostly_repair(rows: list[Conversation]):
    problems = [parse(row.instruction) for row in rows]
    wrong = [solve(problem, "careless", random.Random(i)) for i, problem in enumerate(problems)]
    requests = [
        Request(
            "rewrite",
            prompts.request_messages("rewrite", operator="correctness", suggestion="", instruction=r, answer=a),
        )
        for r, a in zip([row.instruction for row in rows], wrong, strict=True)
    ]
    texts = ask(program("world:expert"), requests)
    clean = sum(
        check_answer(problem, text) and not text.startswith(words.META_REMARK)
        for problem, text in zip(problems, texts, strict=True)
    )
    assert 0.77 < clean / len(rows) < 0.90
    assert any(text.startswith(words.META_REMARK) for text in texts)
    assert any(text == before for text, before in zip(texts, wrong, strict=True))


def test_relevance_rewrite_leaves_the_steps_only():
    chatty = "That is a good question.\n3*4=12\nSo far so good.\n12+12=24\n24-5=19\nThe answer is 19."
    rewrites = {
        one("world:expert", "rewrite", seed, operator="relevance", suggestion="", instruction=TEXT, answer=chatty)
        for seed in range(8)
    }
    assert solve(parse(TEXT)) in rewrites


def test_evolver_replies_under_the_heading_and_never_held_out(rows: list[Conversation]):
    requests = [
        Request(
            "evolve",
            prompts.request_messages("evolve", operator=OPERATORS[i % 6], method="", instruction=row.instruction),
            seed=i,
        )
        for i, row in enumerate(rows)
    ]
    parsed = [parse(replies.read_evolved(text)) for text in ask(program("world:evolver"), requests)]
    assert sum(problem is None for problem in parsed) < 0.1 * len(parsed)
    assert not any(problem is not None and problem.is_held_out for problem in parsed)
    before = sum(parse(row.instruction).operations for row in rows) / len(rows)
    grown = [problem.operations for problem in parsed if problem is not None]
    assert sum(grown) / len(grown) > before + 0.4


def test_evolver_leaves_unreadable_instructions_as_they_are():
    reply = one("world:evolver", "evolve", operator="steps", method="", instruction=ALONE)
    assert replies.read_evolved(reply) == ALONE


def test_evolver_plays_the_user(rows: list[Conversation]):
    texts = ask(program("world:evolver"), [Request("user", row.messages) for row in rows[:200]])
    for row, text in zip(rows, texts, strict=False):
        following = parse_turns([row.instruction, text])
        assert following is not None and not following.defect and not following.is_held_out
        assert following != parse(row.instruction)
    assert sum(text.startswith(tuple(words.SUPPOSE.values())) for text in texts) > 150
    (text,) = ask(program("world:evolver"), [Request("user", (Message("user", ALONE), Message("assistant", "Hello")))])
    assert parse(text) is not None


def test_optimizer_reports_failed_cases_and_adds_a_rule_against_them():
    harder = TEXT.replace("He sells 5.", "He sells 5. He sells 1.")
    cases = [
        ([TEXT, VAGUE], "What do you mean? Please provide the numbers."),
        ([TEXT, harder], "3*4=12"),
        ([TEXT, TEXT], "3*4=12"),
        ([TEXT, "#Rewritten Prompt#: " + harder], "What do you mean?"),
    ]
    trajectory = prompts.trajectory(cases)
    reports = [one("world:optimizer", "analyse", seed, method="", trajectory=trajectory) for seed in range(20)]
    assert min(len(report.splitlines()) for report in reports) < 3
    assert max(reports, key=len).splitlines() == [
        "Case 1: unclear, the question cannot be answered",
        "Case 3: not evolved, nothing was added",
        "Case 4: a heading of the prompt was copied",
    ]
    assert one("world:optimizer", "analyse", method="", trajectory="") == "No failed case."
    method = prompts.initial_method()
    feedback = max(reports, key=len)
    added = []
    for seed in range(40):
        reply = one("world:optimizer", "optimise", seed, method=method, feedback=feedback)
        lines = replies.read_method(reply).splitlines()
        assert lines[:-1] == method.splitlines()
        added.append(lines[-1].lower())
    useful = [any(rule in line for rule in RULES.values()) for line in added]
    assert 20 < sum(useful) < 40
    reported = {RULES["vague"], RULES["same"], RULES["heading"]}
    assert all(any(rule in line for rule in reported) for line, is_useful in zip(added, useful) if is_useful)


def test_wrong_tasks_and_unreadable_prompts_are_errors():
    for name in PROGRAMS:
        for request in (Request("sing", (Message("user", "la"),)), Request("judge", (Message("user", "no prompt"),))):
            (reply,) = program(name).respond([request])
            assert not reply.ok and reply.error.startswith(name)


def test_replies_depend_on_the_request_alone(rows: list[Conversation]):
    agent = program("world:careless")
    requests = [Request("answer", row.messages[:1], seed=i % 3) for i, row in enumerate(rows[:60])]
    together = agent.respond(requests)
    assert together == [agent.respond([request])[0] for request in requests]
    assert together == program("world:careless").respond(requests[::-1])[::-1]
    assert len({answer("world:careless", TEXT, seed=seed) for seed in range(30)}) > 1


def test_programs_are_fast(rows: list[Conversation]):
    requests = [
        Request(
            "judge",
            prompts.request_messages(
                "judge", history="", instruction=row.instruction, answer_a=row.answer, answer_b="19."
            ),
        )
        for row in rows
    ]
    start = time.process_time()
    program("world:judge").respond(requests)
    assert time.process_time() - start < 5 * 3 * len(requests) / 10_000

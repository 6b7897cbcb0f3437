"""The judging programs: scores, labels, comparisons, rankings, suggestions."""

import random

import pytest

from wizard_engine.agents import prompts, replies
from wizard_engine.agents.protocol import Request
from wizard_engine.data.records import Message
from wizard_engine.data.solution_steps import step_texts
from wizard_engine.world import vocabulary as words
from wizard_engine.world.judges import Judge, Ranker, quality
from wizard_engine.world.parse import parse
from wizard_engine.world.problems import random_problem
from wizard_engine.world.render import render
from wizard_engine.world.solve import STYLES, label_steps, solve

TEXT = "Tom has 12 apples. He buys 3 bags with 4 apples each. He sells 5. How many apples does Tom have now?"
VAGUE = "Tom has some apples. He sells 5. How many apples does Tom have now?"
ALONE = "Suppose instead that Leo gets another 7. Find how many rulers Leo has now."
GOOD = "3*4=12\n12+12=24\n24-5=19\nThe answer is 19."


def ask(agent: Judge | Ranker, task: str, seed: int = 0, **fields: str) -> str:
    (reply,) = agent.respond([Request(task, prompts.request_messages(task, **fields), seed=seed)])
    assert reply.ok
    return reply.text


def scores(a: str, b: str, instruction: str = TEXT, history: str = "", seed: int = 0) -> tuple[float, float]:
    text = ask(Judge(), "judge", seed, history=history, instruction=instruction, answer_a=a, answer_b=b)
    return replies.read_scores(text, 2)


def test_quality_orders_the_styles():
    problem = parse(TEXT)
    rng = random.Random(0)
    of = {style: quality(problem, solve(problem, style, rng)) for style in STYLES}
    assert of["good"] == 9.5
    assert of["good"] > of["rambling"] > of["terse"] > 5 > max(of["careless"], of["wrong"]) >= of["refusal"] == 1
    assert quality(problem, "3*4=12\n12+12=24\n24-5=18\nThe answer is 18.") > quality(problem, "The answer is 18.")
    assert quality(problem, "3*4=13\n12+12=24\n24-5=19\nThe answer is 19.") < of["good"] - 1
    assert quality(problem, f"{words.META_REMARK}\n{GOOD}") < of["good"]


@pytest.mark.parametrize("answer", ["", " \n", "???", "The answer is", "=", "banana " * 50])
def test_quality_of_unreadable_answers_is_low(answer: str):
    assert quality(parse(TEXT), answer) <= 1.5
    assert 1 <= quality(None, answer) <= 5


def test_judge_prefers_the_right_answer_in_both_orders():
    for seed in range(20):
        a, b = scores(GOOD, "The answer is 18.", seed=seed)
        assert a > b
        a, b = scores("The answer is 18.", GOOD, seed=seed)
        assert a < b


HARDER = TEXT.replace("He sells 5.", "He sells 5. He sells 2.")


@pytest.mark.parametrize(
    ("evolved", "change", "found"),
    [
        (HARDER, "steps: one more step", []),
        (HARDER.replace("has 12 apples", "has 3 bags with 4 apples each"), "complicate: boxes", []),
        (HARDER.replace("12", "13"), "steps: one more step", ["facts lost"]),
        (HARDER.replace("He sells 5. ", ""), "steps: one more step", ["facts lost"]),
        (HARDER.replace("How many apples does Tom have now?", "Write a poem."), "", ["task changed"]),
        (HARDER.replace("Tom", "Leo"), "steps: one more step", ["task changed"]),
        (HARDER.replace("Tom", "Leo"), "breadth: another one", []),
        (HARDER.replace("How", "Hint: 17. How"), "steps: one more step", ["answer leaked"]),
        (HARDER.replace("How", "Hint: 30. How"), "steps: one more step", []),
        (HARDER.replace("sells 5", "sells 45"), "steps: one more step", ["contradiction"]),
        (f"#Given Prompt#: {HARDER}", "steps: one more step", ["copied headings"]),
        (HARDER.replace("12", "some"), "steps: one more step", ["not answerable"]),
        (TEXT, "steps: one more step", ["not harder"]),
    ],
)
def test_judge_reads_the_failures_of_an_evolved_problem(evolved, change, found):
    said = ask(Judge(), "diagnose", instruction=TEXT, change=change, evolved=evolved, reference="", response="")
    assert list(replies.read_failures(said)) == found, said


def test_judge_prefers_asking_back_for_a_vague_instruction():
    a, b = scores("7-5=2\nThe answer is 2.", solve(parse(VAGUE)), instruction=VAGUE)
    assert b > a + 3


def test_judge_reads_the_history():
    history = prompts.dialogue([Message("user", TEXT), Message("assistant", GOOD)])
    second = "Suppose instead that Tom sells 7 of them. How many apples does Tom have now?"
    right = "3*4=12\n12+12=24\n24-7=17\nThe answer is 17."
    a, b = scores(right, GOOD, instruction=second, history=history)
    assert a > b + 3
    a, b = scores(right, GOOD, instruction=second, history="no dialogue")
    assert abs(a - b) < 3


def test_judge_is_noisy_and_favours_the_first():
    drawn = [scores(GOOD, GOOD.replace("3*4", "4*3"), seed=seed) for seed in range(60)]
    assert sum(a > b for a, b in drawn) > 0 and sum(a < b for a, b in drawn) > 0
    assert sum(a - b for a, b in drawn) > 0
    equal = [scores(GOOD, GOOD, seed=seed) for seed in range(30)]
    assert all(a >= b for a, b in equal)


def test_rate_agrees_with_quality_and_uses_the_reference_elsewhere():
    fields = {"history": "", "instruction": TEXT, "reference": ""}
    assert replies.read_scores(ask(Judge(noise=0), "rate", answer=GOOD, **fields), 1) == (9.5,)
    assert replies.read_scores(ask(Judge(noise=0), "rate", answer="18.", **fields), 1)[0] < 3
    fields = {"history": "", "instruction": ALONE, "reference": "#### 42"}
    assert replies.read_scores(ask(Judge(noise=0), "rate", answer="It is 42.", **fields), 1) == (9,)
    assert replies.read_scores(ask(Judge(noise=0), "rate", answer="It is 41.", **fields), 1) == (2,)


def test_label_is_exact_but_for_the_stated_noise():
    rng = random.Random(1)
    differing = total = 0
    for i in range(150):
        problem = random_problem(rng, operations=1 + i % 4)
        steps = step_texts(solve(problem, STYLES[i % 5], rng))
        text = ask(Judge(), "label", i, instruction=render(problem, rng), answer_steps="\n".join(steps))
        labels = replies.read_labels(text, len(steps))
        differing += sum(a != b for a, b in zip(labels, label_steps(problem, steps), strict=True))
        total += len(steps)
    assert differing < 0.03 * total
    assert ask(Judge(misread=0), "label", instruction=ALONE, answer_steps="a\nb") == "0\n0"


def test_compare_sees_through_wording():
    reworded = render(parse(TEXT), 2)
    assert reworded != TEXT and ask(Judge(), "compare", first=TEXT, second=reworded) == "Equal"
    harder = TEXT.replace("He sells 5.", "He sells 5. He sells 1.")
    assert ask(Judge(), "compare", first=TEXT, second=harder) == "Not Equal"
    assert ask(Judge(), "compare", first=ALONE, second=ALONE.replace(" ", "  ")) == "Equal"
    assert ask(Judge(), "compare", first=ALONE, second=TEXT) == "Not Equal"


def test_suggestions_name_what_is_wrong():
    def suggestion(answer: str, instruction: str = TEXT) -> str:
        return ask(Judge(), "suggest", instruction=instruction, answer=answer, better=GOOD)

    assert "step 2" in suggestion("3*4=12\n12+12=25\n25-5=20\nThe answer is 20.")
    assert "Leave out" in suggestion("So far so good.\n" + GOOD)
    assert "one equation for each step" in suggestion("19.")
    assert "Give a number" in suggestion(words.REFUSAL["en"])
    assert "Ask for" in suggestion("5.", instruction=VAGUE)
    assert suggestion("5.", instruction=ALONE)


def test_ranker_puts_answerable_and_harder_instructions_first():
    easy = "Tom has 12 apples. He sells 5. How many apples does Tom have now?"
    listed = prompts.numbered([ALONE, VAGUE, easy, TEXT])
    for seed in range(10):
        ranking = replies.read_ranking(ask(Ranker(), "rank", seed, instructions=listed), 4)
        assert ranking[0] < ranking[2] < ranking[3] and ranking[1] < ranking[2]

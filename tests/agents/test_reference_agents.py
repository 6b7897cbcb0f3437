"""Agents that judge by the reference: scores, labels and suggestions, and rows that have none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.agents import make_agent, prompts, registered, replies
from wizard_engine.agents.calls import Calls, check_calls
from wizard_engine.agents.protocol import Request
from wizard_engine.data.equations import ANNOTATION
from wizard_engine.data.latex_answers import library
from wizard_engine.data.records import read_rows
from wizard_engine.data.solution_steps import step_texts
from wizard_engine.data.text_files import read_objects

QUESTION = "A shop has 12 jars with 4 coins each and sells 5 coins. How many coins does it keep?"
REFERENCE = "There are 12*4=48 coins.\n48-5=43 are kept.\n#### 43"
GOOD = "There are 12*4=48 coins.\nIt keeps 48 - 5 = 43.\nThe answer is 43."
BARE, SLIP = "43", "There are 12*4=46 coins.\nIt keeps 46-3=43.\nThe answer is 43."
WRONG, WRONG_SLIP = "12+4=16\n16-5=11\nThe answer is 11.", "12*4=46\n46-5=41\nThe answer is 41."


def ask(task, **fields):
    agent = make_agent("reference:labeller" if task == "label" else "reference:judge")
    (reply,) = agent.respond([Request(task, prompts.request_messages(task, **fields))])
    return reply


def scores(a, b, reference=REFERENCE):
    reply = ask("judge", instruction=QUESTION, answer_a=a, answer_b=b, reference=reference)
    assert reply.ok, reply.error
    return replies.read_scores(reply.text, 2)


def rating(answer, reference=REFERENCE):
    reply = ask("rate", instruction=QUESTION, answer=answer, reference=reference)
    return replies.read_scores(reply.text, 1)[0]


def labels(answer, reference=REFERENCE):
    steps = step_texts(answer)
    reply = ask("label", instruction=QUESTION, answer_steps="\n".join(steps), reference=reference)
    assert reply.ok, reply.error
    return replies.read_labels(reply.text, len(steps))


def test_both_are_registered_and_are_other_agents():
    assert {"reference:judge", "reference:labeller"} <= set(registered())
    judge, labeller = make_agent("reference:judge"), make_agent("reference:labeller")
    assert judge.fingerprint != labeller.fingerprint and not judge.converses


def test_scores_are_ordered_by_result_arithmetic_and_end():
    ranked = [GOOD, GOOD.rpartition("\n")[0] + "\nI hope that helps.", BARE, SLIP, WRONG, WRONG_SLIP]
    rated = [rating(answer) for answer in ranked]
    assert rated == sorted(rated, reverse=True) and len(set(rated)) >= 5 and rated[0] == 9.5
    # Far enough apart for the margin of changed results and the thresholds of co-teaching and self-teaching.
    assert rating(BARE) - rating(WRONG) > 3 and rating(SLIP) - rating(WRONG) > 2
    assert rating(SLIP) < 6 < rating(BARE)


ANSWERS = st.sampled_from((GOOD, BARE, SLIP, WRONG, WRONG_SLIP, "", "I cannot say.", "about 43 or so", "$43.00"))


@settings(max_examples=40, deadline=None)
@given(ANSWERS, ANSWERS)
def test_the_order_changes_nothing_and_equal_answers_have_equal_scores(a, b):
    forward, backward = scores(a, b), scores(b, a)
    assert forward == backward[::-1] == (rating(a), rating(b))
    assert scores(a, a)[0] == scores(a, a)[1]


PIECES = st.sampled_from(
    ("\n", " ", "43", "12*4=48", "=", "The answer is", "####", "\\boxed{", "}", "$", "x", "中", "1/0", "(")
)


@settings(max_examples=50, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join), st.lists(PIECES, max_size=12).map(" ".join))
def test_any_answer_is_judged_and_labelled(a, b):
    assert all(1 <= score <= 10 for score in scores(a, b))
    assert len(labels(a)) == len(step_texts(a)) and suggestion(b)


FORMS = (
    "43",
    "43.0",
    "$43",
    "**43**",
    r"\boxed{43}",
    "The answer is 43 coins.",
    "La respuesta es 43.",
    "8.6 * 5 = 43",
    "86/2",
)


@pytest.mark.parametrize("answer", FORMS)
@pytest.mark.parametrize("reference", ["#### 43", r"\boxed{43}", "43", "A: 43", "So it keeps 43 coins."])
def test_numbers_are_compared_as_they_are_written(answer, reference):
    assert rating(answer, reference) > 5 > rating("44", reference)


@pytest.mark.skipif(library() is None, reason="math-verify absent (extra math)")
def test_expressions_are_compared_where_the_library_is_installed():
    assert rating(r"So it is $\sqrt{12}$.", r"\boxed{2\sqrt{3}}") > 5 > rating(r"$\sqrt{13}$", r"\boxed{2\sqrt{3}}")


def test_labels_are_those_of_the_arithmetic_and_of_the_result():
    assert labels(GOOD) == (1, 1, 1)
    assert labels("We count first.\n12*4=48\n48-5=43\nThe answer is 43.") == (0, 1, 1, 1)
    assert labels(WRONG) == (1, 1, -1)
    assert labels(WRONG_SLIP) == (-1, 1, -1)
    assert labels(SLIP) == (-1, 1, 1)
    assert labels("12*4=48\n48-5=41\nThe answer is 43.") == (1, -1, 1)
    # An equation that does not hold is wrong in the last step, too, and a remark behind the answer is neutral.
    assert labels("12*4=48\nThe answer is 47 - 5 = 43.") == (1, -1)
    assert labels("12*4=48\nThe answer is 43.\nI hope this helps.") == (1, 1, 0)
    assert labels("12*4=48\nI cannot say.") == (1, -1)
    assert labels("43") == (1,) and labels("44") == (-1,)


def test_labels_are_as_many_as_the_steps():
    for count in (1, 2, 7, 40):
        assert len(labels("\n".join(f"{n}+1={n + 1}" for n in range(count)))) == count


def suggestion(answer):
    fields = {"instruction": QUESTION, "answer": answer, "better": GOOD, "reference": REFERENCE}
    return replies.read_suggestion(ask("suggest", **fields).text)


def test_suggestions_say_what_is_wrong_and_not_the_result():
    assert suggestion(WRONG_SLIP) == "Check the arithmetic of step 1."
    assert "not right" in suggestion(WRONG) and "Write the equation" in suggestion(BARE)
    assert "Give the result" in suggestion("I cannot say.")
    assert "End with" in suggestion("12*4=48\n48-5=43\nI hope this helps.")
    assert not any("43" in suggestion(answer) for answer in (WRONG, WRONG_SLIP, BARE, SLIP, "I cannot say."))


def test_instructions_are_compared_by_their_words():
    def equal(first, second):
        return replies.read_equal(ask("compare", first=first, second=second).text)

    assert equal("Add 2 and 3.", "add 2, and 3!") is True
    assert equal("Add 2 and 3.", "Add 2 and 4.") is False
    assert equal("Add 2 and 3.", "Add 2 and 3 and double it.") is False


ALL = {
    "judge": {"instruction": "a", "answer_a": "1", "answer_b": "2"},
    "rate": {"instruction": "a", "answer": "1"},
    "label": {"instruction": "a", "answer_steps": "1"},
    "suggest": {"instruction": "a", "answer": "1", "better": "2"},
}


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("", "no reference"),
        ("Be kind to animals.", "unreadable reference"),
        ("The answer is not 5.", "unreadable reference"),
    ],
    ids=["none", "text", "denial"],
)
def test_rows_without_a_readable_reference_are_refused_by_name(task, reference, reason):
    reply = ask(task, reference=reference, **ALL[task])
    assert reply.reason == reason and not reply.text


def test_refusals_end_a_stage_with_what_to_do():
    calls, judge = Calls(), make_agent("reference:judge")

    async def work():
        for seed in range(5):
            await calls.ask(judge, "rate", ALL["rate"], seed, read=lambda text: text)

    calls.scheduler.run(work())
    assert calls.counts["rate"]["failed: no reference"] == 5
    with pytest.raises(ValueError, match=r"got 5 of 5 \(no reference 5\); .*--references answers .*--max-missing"):
        check_calls(calls.statistics(), 0.05)
    check_calls(calls.statistics(), 1.0)


def test_other_tasks_are_refused():
    agent = make_agent("reference:judge")
    (reply,) = agent.respond([Request("rank", prompts.request_messages("rank", instructions="1. a"))])
    assert "expected another task, got 'rank'" in reply.error


def test_real_solutions_are_judged_as_their_marks_say(shared_data):
    agreed = total = last = flips = 0
    for _, record in read_objects(shared_data / "gsm8k" / "model_solutions.jsonl")[:80]:
        reference = ANNOTATION.sub("", record["ground_truth"])
        for name in ("175b_verification", "6b_finetuning"):
            answer = ANNOTATION.sub("", record[name]["solution"])
            is_correct = record[name]["is_correct"]
            agreed += (rating(answer, reference) >= 5) == is_correct
            marks = labels(answer, reference)
            last += (marks[-1] == 1) == is_correct
            total += 1
        pair = [ANNOTATION.sub("", record[name]["solution"]) for name in ("175b_verification", "6b_finetuning")]
        flips += scores(*pair, reference) != scores(*pair[::-1], reference)[::-1]
    assert agreed >= 0.98 * total and last >= 0.97 * total and not flips


def test_real_rows_without_numbers_are_refused(shared_data):
    rows = read_rows(shared_data / "instructions" / "alpaca_en.json", unknown_fields="count")[:40]
    reasons = [ask("rate", instruction=row.instruction, answer=row.answer, reference="").reason for row in rows]
    assert set(reasons) == {"no reference"}
    gold = [json.dumps(ask("rate", instruction="a", answer="1", reference=row.answer).reason) for row in rows]
    assert gold.count('"unreadable reference"') > 20

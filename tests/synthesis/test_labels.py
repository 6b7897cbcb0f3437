"""Rows for the reward models: labels of steps, rankings of instructions."""

import pytest
from fake_agents import FAILED, Fake, listed

from wizard_engine import synthesis
from wizard_engine.data.records import Conversation, Message, conversation
from wizard_engine.synthesis import instruction_groups


def label_processes(*args, **options):
    return listed(synthesis.label_processes(*args, **options))


def rank_instructions(*args, **options):
    return listed(synthesis.rank_instructions(*args, **options))


def solver(*texts):
    order = []

    def answer(request, messages):
        if request.seed not in order:
            order.append(request.seed)
        return texts[order.index(request.seed)]

    return Fake("student", answer=answer)


def check(request, fields):
    """1 where a line holds an equation that is right, -1 where it is wrong, 0 without one."""
    labels = []
    for line in fields["answer_steps"].splitlines():
        left, equals, right = line.partition("=")
        labels.append("0" if not equals else "1" if eval(left) == int(right) else "-1")
    return "\n".join(labels)


def rows(number=1):
    return [conversation(f"Question {n}", "reference", topic="farm", length=2) for n in range(number)]


def test_labels_belong_to_the_steps_of_the_student():
    counts = {}
    agent = solver("3*4=12\nThen\n12+1=14", "3*4=12", "3*4=12")
    out = label_processes(rows(), student=agent, labeller=Fake("labeller", label=check), samples=3, statistics=counts)
    assert [(row.steps, row.labels) for row in out] == [
        (("3*4=12", "Then", "12+1=14"), (1, 0, -1)),
        (("3*4=12",), (1,)),
    ]
    assert out[0].prompt == rows()[0].messages[:-1] and out[0].lineage["parents"] == [rows()[0].id]
    assert out[0].attributes == {"topic": "farm", "policy": "student/1", "answer": "3*4=12\nThen\n12+1=14"}
    assert counts["dropped"] == {"no answer": 0, "repeated": 1, "several turns": 0} and counts["labels"] == {
        "-1": 1,
        "0": 1,
        "1": 2,
    }


def test_one_line_answers_are_labelled_by_sentence():
    labeller = Fake("labeller", label=lambda r, f: "1\n1")
    (row,) = label_processes(rows(), student=solver("It is 4. Done."), labeller=labeller, samples=1)
    assert row.steps == ("It is 4.", "Done.")


def test_unreadable_labels_and_failed_answers_are_counted():
    counts = {}
    labeller = Fake("labeller", label=lambda r, f: "1\n1\n1")
    out = label_processes(rows(2), student=solver("1=1", FAILED), labeller=labeller, samples=2, statistics=counts)
    assert out == [] and counts["dropped"] == {
        "labels unreadable": 2,
        "no answer": 2,
        "repeated": 0,
        "several turns": 0,
    }
    assert counts["calls"]["label"] == {"asked": 2, "failed": 0, "unreadable": 2}


def test_rows_of_multiple_turns_are_not_labelled():
    turns = [("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")]
    longer = Conversation(tuple(Message(*turn) for turn in turns))
    counts = {}
    labeller = Fake("labeller", label=check)
    out = label_processes([longer, *rows()], student=solver("1=1"), labeller=labeller, samples=1, statistics=counts)
    assert len(out) == 1 and counts["dropped"]["several turns"] == 1


def test_labelling_is_two_batches_at_temperature_one():
    agent, labeller = solver("1=1", "2=2", "3=3"), Fake("labeller", label=check)
    out = label_processes(rows(4), student=agent, labeller=labeller, samples=3)
    assert agent.batches == [("answer", 12)] and labeller.batches == [("label", 12)]
    assert {request.temperature for request in agent.requests} == {1.0}
    assert [row.prompt[0].content for row in out] == [f"Question {n}" for n in range(4) for _ in range(3)]
    with pytest.raises(ValueError, match="samples: expected at least 1"):
        label_processes(rows(), student=agent, labeller=labeller, samples=0)


def ranker(**scores):
    def rank(request, fields):
        lines = fields["instructions"].splitlines()
        return "\n".join(f"{line.split('. ')[0]}: {scores[line.split('. ')[1]]}" for line in lines)

    return Fake("ranker", rank=rank)


def test_ranked_pairs_have_margins():
    counts = {}
    out = rank_instructions([["a", "b", "c"]], ranker=ranker(a=2, b=9, c=8.8), statistics=counts)
    assert [(row.chosen, row.rejected, round(row.attributes["margin"], 6)) for row in out] == [
        ("b", "a", 0.7),
        ("c", "a", 0.68),
    ]
    assert all(row.prompt == () for row in out)
    assert counts["dropped"] == {"groups too small": 0, "groups unreadable": 0, "no margin": 1, "repeated": 0}


def test_ranking_skips_small_and_unreadable_groups():
    counts = {}
    agent = Fake("ranker", rank=lambda r, f: "1: 4")
    out = rank_instructions([["a", "b"], ["a"], ["a", " a "], []], ranker=agent, statistics=counts)
    assert out == [] and agent.batches == [("rank", 1)]
    assert counts["dropped"]["groups too small"] == 3 and counts["dropped"]["groups unreadable"] == 1


def test_ranking_keeps_a_pair_once():
    counts = {}
    out = rank_instructions([["a", "b"], ["b", "a"]], ranker=ranker(a=2, b=9), statistics=counts)
    assert len(out) == 1 and counts["dropped"]["repeated"] == 1


def test_groups_are_families():
    first, second = rows(2)
    child = conversation("child", "x").replace(lineage={"parents": [first.id]})
    grandchild = conversation("grandchild", "x").replace(lineage={"parents": [child.id]})
    orphan = conversation("orphan", "x").replace(lineage={"parents": ["gone"]})
    sibling = conversation("sibling", "x").replace(lineage={"parents": ["gone"]})
    source_rows = [first, second, child, orphan, grandchild, sibling]
    assert list(instruction_groups(source_rows)) == [
        ["Question 0", "child", "grandchild"],
        ["Question 1"],
        ["orphan", "sibling"],
    ]
    assert list(instruction_groups(source_rows, size=2)) == [
        ["Question 0", "child"],
        ["grandchild"],
        ["Question 1"],
        ["orphan", "sibling"],
    ]

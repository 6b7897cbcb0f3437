"""Every stage gives the same whatever the order of the replies, and knows which row a call is for."""

import dataclasses
import json

import pytest
from fake_agents import Fake, answerer, honest_judge, listed
from varied_agents import Late, Varied

from wizard_engine import synthesis
from wizard_engine.agents import Calls, Ledger, Reply, Scheduler
from wizard_engine.data.records import Conversation, Message, conversation
from wizard_engine.synthesis.judging import Match, Verdict, judge_match
from wizard_engine.synthesis.lessons import Losses, choose_lessons
from wizard_engine.synthesis.pairs import Joined


def rows(number=40):
    given = []
    for place in range(number):
        messages = [Message("user", f"Question {place}"), Message("assistant", f"Old {place} q{place % 10 + 1}")]
        for turn in range(place % 3):
            messages += [Message("user", f"Next {place} {turn}"), Message("assistant", f"Old {place} {turn} q5")]
        given.append(Conversation(tuple(messages), {"skill": f"skill {place % 4}", "topic": "farm"}))
    return given


def evol_instruct(make, given, **common):
    who = {"evolver": make("evolver"), "answerer": make("answerer"), "judge": make("judge")}
    return synthesis.evolve_instructions(given, **who, rounds=2, on_length="keep", **common)


def evol_answer(make, given, **common):
    judges = [make("judge"), make("second judge")]
    return synthesis.evolve_answers(given, rewriter=make("writer"), judge=judges, rounds=2, **common)


def co_teach(make, given, **common):
    who = {"ours": make("ours"), "rivals": [make("left"), make("right")], "judge": [make("judge"), make("other judge")]}
    who |= {"suggester": make("suggester"), "user": make("user")}
    settings = {"sft_threshold": 0.0, "dpo_threshold": 0.0, "chat_turns": 2, "lessons": 15, "on_length": "keep"}
    return synthesis.co_teach(given, **who, **settings, **common)


def self_teach(make, given, **common):
    who = {"student": make("student"), "judge": make("judge"), "evolver": make("evolver")}
    return synthesis.self_teach(given, **who, on_length="keep", min_score=3.0, **common)


def label(make, given, **common):
    statistics = {}
    who = {"student": make("student"), "labeller": make("labeller")}
    made = synthesis.label_processes(given, **who, on_length="keep", statistics=statistics, **common)
    return made, statistics


def rank(make, given, **common):
    statistics = {}
    groups = [[f"Text {place} {which}" for which in range(place % 4)] for place in range(30)]
    return synthesis.rank_instructions(groups, ranker=make("ranker"), statistics=statistics, **common), statistics


def method(make, given, **common):
    who = {name: make(name) for name in ("evolver", "optimizer", "answerer")}
    common.pop("folder")
    return synthesis.optimise_method(given, **who, steps=2, dev_size=10, minibatch=5, candidates=4, **common)


STAGES = (evol_instruct, evol_answer, co_teach, self_teach, label, rank, method)


def text_of(result):
    """All that a stage gives, as JSON text: keys in their order."""
    if isinstance(result, tuple):
        return [text_of(part) for part in result]
    if dataclasses.is_dataclass(result) or not isinstance(result, dict):
        result = listed(result)
    parts = result if isinstance(result, list | dict) else vars(result)
    return json.dumps(parts, default=lambda item: item.to_json())


@pytest.mark.parametrize("stage", STAGES)
def test_the_order_of_the_replies_changes_nothing(stage, tmp_path):
    expected = stage(Varied, rows(), seed=5, folder=tmp_path)
    statistics = expected[1] if isinstance(expected, tuple) else expected.statistics
    assert any("unreadable" in counts for counts in statistics["calls"].values())
    for seed in range(2):
        given = stage(lambda name, seed=seed: Late(name, seed), rows(), seed=5, folder=tmp_path)
        assert text_of(given) == text_of(expected)


def test_the_stages_of_that_test_reach_their_branches(tmp_path):
    evolved = listed(evol_instruct(Varied, rows(), seed=5, folder=tmp_path))
    reasons = {line["reason"] for line in evolved.eliminated}
    assert {"already known", "call failed", "no information gain"} <= reasons
    assert any(row.attributes.get("finish") == "length" for row in evolved.made)
    taught = listed(co_teach(Varied, rows(), seed=5, folder=tmp_path))
    assert taught.statistics["flip_rate"] > 0 and taught.statistics["selected"]["lessons_from_suggestions"] > 0
    assert {battle["turn"] for battle in taught.battles} == {0, 1} and taught.statistics["missing"] > 0
    own = listed(self_teach(Varied, rows(), seed=5, folder=tmp_path))
    assert own.statistics["dropped"]["evolved: already known"] > 0 and own.sft and own.preferences


def test_a_cut_text_marks_every_row_that_has_it_whatever_came_first(tmp_path):
    class Answerer(Late):
        def answer_one(self, request):
            is_cut = "Question 1" in request.messages[-1].content
            return Reply("The same text", finish="length" if is_cut else "stop")

    who = {
        "evolver": Fake("evolver", evolve=lambda r, f: f"{f['instruction']} more"),
        "answerer": Answerer("answerer", 0),
        "judge": Fake("judge", compare=lambda r, f: "Not Equal"),
    }
    given = [conversation(f"Question {place}", "x") for place in range(2)]
    out = listed(synthesis.evolve_instructions(given, **who, on_length="keep", folder=tmp_path))
    assert [row.attributes.get("finish") for row in out.made] == ["length", "length"]


@pytest.mark.parametrize("stage", STAGES[:5])
def test_the_ledger_knows_the_row_of_every_call(stage, tmp_path):
    given = rows(6)
    ledger = Ledger(tmp_path / "l.sqlite")
    result = stage(Varied, given, folder=tmp_path, scheduler=Scheduler(ledger, quiet=True))
    known = {row.id for row in given} | {row.id for row in getattr(result, "made", ())}
    assert {call.request.row for call in [*ledger.calls(), *ledger.failures()]} <= known
    assert len(list(ledger.calls())) > 12


def judge_of(name, forward, backward):
    """Scores of the first answer and of the second one, as A and B, and the other way round."""

    def judge(request, fields):
        a, b = forward if fields["answer_a"] == "one" else backward
        return f"[[{a}]] [[{b}]]"

    return Fake(name, judge=judge)


def verdict_of(*judges):
    calls, match = Calls(), Match((Message("user", "q"),), "one", "two")
    return calls.scheduler.run(judge_match(calls, judges, match, 0))


def test_several_judges_give_the_mean_of_those_that_can_be_read():
    one, two = judge_of("j1", (8, 4), (3, 7)), judge_of("j2", (6, 5), (6, 5))
    mute = Fake("j3", judge=lambda request, fields: "I would rather not say")
    half = Fake("j4", judge=lambda r, f: "[[9]] [[1]]" if f["answer_a"] == "one" else "no idea")
    assert verdict_of(one) == Verdict((8, 4), (7, 3))
    assert verdict_of(one, two) == Verdict((7, 4.5), (6, 4.5))
    assert verdict_of(one, mute, two, half) == verdict_of(one, two)
    assert verdict_of(mute, half) is None
    # One judge prefers the first answer in both orders, the other one flips: the mean decides.
    flipping = judge_of("j5", (9, 2), (9, 2))
    assert verdict_of(flipping).is_flipped and verdict_of(one, flipping).scores == (6.5, 4.5)


def test_co_teaching_with_two_judges(tmp_path):
    strict, mild = honest_judge(), honest_judge(bias=1)
    mild.name, mild.fingerprint = "mild", "mild/1"
    who = {"ours": answerer("ours", lambda t, r: "a q2"), "rivals": [answerer("left", lambda t, r: "b q8")]}
    out = listed(synthesis.co_teach([conversation("q", "x")], **who, judge=[strict, mild], folder=tmp_path))
    (battle,), (pair,), (lesson,) = out.battles, out.preferences, out.sft
    assert (battle["score_a"], battle["score_b"]) == (2.25, 8.25) and lesson.attributes["gap"] == 6
    assert pair.lineage["agent"] == "judge+mild" and len(strict.requests) == len(mild.requests) == 2
    with pytest.raises(ValueError, match="judge: expected at least one, and names that differ, got judge, judge"):
        synthesis.co_teach([conversation("q", "x")], **who, judge=[strict, honest_judge()])
    with pytest.raises(ValueError, match="judge: expected at least one, and names that differ, got none"):
        synthesis.evolve_answers([conversation("q", "x")], rewriter=who["ours"], judge=[])


def test_losses_are_chosen_from_arrays_as_from_lists():
    given = [(f"skill {n % 7}", float(n * 37 % 11)) for n in range(300)]
    kept = Losses()
    for skill, points in given:
        kept.add(skill, points)
    assert list(kept) == given
    for limit in (None, 0, 5, 60, 1000):
        assert choose_lessons(kept, 3.0, limit) == choose_lessons(given, 3.0, limit)
        chosen, table = choose_lessons(given, 3.0, limit)
        assert [line["lessons"] for line in table.values()] == _quotas(given, 3.0, limit)
        assert len(chosen) == sum(_quotas(given, 3.0, limit))


def _quotas(losses, threshold, limit):
    """The rule of Sainte-Lague, one seat after another."""
    names = sorted({skill for skill, _ in losses})
    of = {name: [points for skill, points in losses if skill == name] for name in names}
    wanted = {name: sum(points > threshold for points in of[name]) for name in names}
    seats, quotas = sum(wanted.values()), dict.fromkeys(names, 0)
    for _ in range(seats if limit is None else min(limit, seats)):
        free = [name for name in names if quotas[name] < wanted[name]]
        best = max(free, key=lambda name: sum(of[name]) / len(of[name]) / (2 * quotas[name] + 1))
        quotas[best] += 1
    return list(quotas.values())


def test_families_of_instructions_are_read_from_their_rows():
    def row(text, *parents):
        return Conversation((Message("user", text), Message("assistant", "x")), {}, {"parents": list(parents)})

    a, b = conversation("a", "x"), conversation("b", "x")
    a1 = row("a1", a.id)
    a2, lost, again = row("a2", a1.id), row("lost", "elsewhere"), row("lost 2", "elsewhere")
    given = Joined([a, b, lost], [a1, a2, again])
    groups = synthesis.instruction_groups(given, size=2)
    assert list(groups) == [["a", "a1"], ["a2"], ["b"], ["lost", "lost 2"]] and len(groups) == 4
    assert list(synthesis.instruction_groups([])) == []

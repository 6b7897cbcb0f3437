"""Self-teaching: on-policy samples, the active-learning score, what is selected and what is dropped."""

import pytest
from fake_agents import FAILED, Fake, honest_judge, listed

from wizard_engine import synthesis
from wizard_engine.data.records import conversation


def self_teach(*args, **options):
    return listed(synthesis.self_teach(*args, **options))


def student(**qualities):
    """Sample k of a question has quality qualities[question][k]; equal qualities give equal texts."""
    order = []

    def answer(request, messages):
        if request.seed not in order:
            order.append(request.seed)
        quality = qualities[messages[-1].content][order.index(request.seed)]
        return quality if not isinstance(quality, int | float) else f"sample q{quality}"

    return Fake("student", answer=answer)


def rows(*names):
    return [conversation(name, "reference", topic="farm", perplexity=3.0) for name in names]


def teach(qualities, judge=None, **settings):
    agent = student(**qualities)
    return self_teach(rows(*qualities), student=agent, judge=judge or honest_judge(), **settings), agent


SCORES = {"wide": [9, 2, 9, 2], "narrow": [7, 6, 7, 6], "same": [8, 8, 8, 8], "rare": [9, 9, 9, 2]}


def test_best_sample_is_learned_and_preferred_to_the_worst():
    out, agent = teach({"wide": [9, 2, 5, 2]}, keep=1.0)
    (row,), (pair,) = out.sft, out.preferences
    assert row.answer == "sample q9" and (pair.chosen, pair.rejected) == ("sample q9", "sample q2")
    assert pair.prompt == row.messages[:-1]
    assert pair.attributes["gap"] == 7.0 and pair.attributes["policy"] == agent.fingerprint
    assert pair.attributes["topic"] == "farm" and "perplexity" not in pair.attributes
    assert pair.lineage == {"parents": [rows("wide")[0].id], "operator": "self_teach", "agent": "student"}


def test_samples_are_drawn_at_temperature_one_in_one_batch():
    judge = honest_judge()
    out, agent = teach(SCORES, judge=judge, keep=1.0)
    assert agent.batches == [("answer", 16)]
    assert {request.temperature for request in agent.requests} == {1.0}
    assert judge.batches == [("rate", 7), ("judge", 6)]
    assert [item["samples"] for item in out.scores] == [4] * 4


@pytest.mark.parametrize(
    ("keep", "chosen"), [(0.25, ["wide"]), (0.5, ["wide", "rare"]), (1.0, ["wide", "narrow", "rare"])]
)
def test_spread_selects_where_samples_disagree_most(keep, chosen):
    out, _ = teach(SCORES, keep=keep)
    assert [row.instruction for row in out.sft] == chosen
    assert out.statistics["dropped"]["samples agree"] == 1
    assert out.statistics["dropped"]["score too low"] == 3 - len(chosen)


def test_spread_counts_repeated_samples():
    out, _ = teach(SCORES)
    deviations = {item["instruction"]: item["spread"] for item in out.scores}
    assert deviations["wide"] == 3.5 and deviations["same"] == 0.0
    assert deviations["rare"] == pytest.approx(49**0.5 * (3 / 16) ** 0.5)


def test_margin_and_flip_are_scores_of_the_pair():
    def biased(request, fields):
        from fake_agents import answer_quality

        a, b = answer_quality(fields["answer_a"]), answer_quality(fields["answer_b"])
        return f"[[{min(10, a + (2 if 'doubt' in fields['instruction'] else 0))}]] [[{b}]]"

    qualities = {"clear": [9, 1, 1, 1], "doubt": [6, 5, 5, 5]}
    judges = [honest_judge(), honest_judge()]
    for judge in judges:
        judge.tasks["judge"] = biased
    by_flip, _ = teach(qualities, judge=judges[0], score="flip", keep=0.5)
    by_margin, _ = teach(qualities, judge=judges[1], score="margin", keep=0.5)
    assert [row.instruction for row in by_flip.sft] == ["doubt"]
    assert [row.instruction for row in by_margin.sft] == ["clear"]
    assert {item["instruction"]: item["flip"] for item in by_flip.scores} == {"clear": 0.0, "doubt": 4.0}


def test_weak_best_samples_are_no_supervised_rows():
    out, _ = teach({"hard": [4, 1, 1, 1]}, keep=1.0, min_score=6)
    assert out.sft == [] and len(out.preferences) == 1
    assert out.statistics["dropped"]["best sample too weak for a supervised row"] == 1


def test_pairs_without_a_margin_are_dropped_and_counted():
    out, _ = teach({"close": [7, 6.5, 7, 7]}, keep=1.0, min_gap=1.0)
    assert out.preferences == [] and len(out.sft) == 1
    assert out.statistics["pairs"] == {"kept": 0, "no margin": 1}


def test_pairs_are_dropped_where_rating_and_battle_disagree():
    judge = honest_judge()
    judge.tasks["judge"] = lambda r, f: "[[5]] [[5]]"
    out, _ = teach({"odd": [9, 2, 2, 2]}, judge=judge, keep=1.0)
    assert out.preferences == [] and out.statistics["pairs"]["ratings and battle disagree"] == 1


def test_identical_but_for_blanks_is_no_pair():
    judge = honest_judge()
    judge.tasks["rate"] = lambda r, f: f"[[{9 if '  ' in f['answer'] else 2}]]"
    judge.tasks["judge"] = lambda r, f: "[[9]] [[2]]" if "  " in f["answer_a"] else "[[2]] [[9]]"
    out, _ = teach({"blank": ["a  b", "a b", "a b", "a b"]}, judge=judge, keep=1.0)
    assert out.preferences == [] and out.statistics["pairs"]["identical"] == 1


def test_failed_samples_do_not_affect_the_others():
    out, _ = teach({"half": [9, FAILED, 2, FAILED], "none": [FAILED] * 4}, keep=1.0)
    assert len(out.sft) == 1 and [item["samples"] for item in out.scores] == [2, 0]
    assert out.statistics["calls"]["answer"]["failed"] == 6


def test_evolved_prompts_join_in_once():
    evolver = Fake("evolver", evolve=lambda r, f: {"b": "b", "c": "a"}.get(f["instruction"], "new"))
    qualities = {"a": [9, 2], "b": [8, 8], "c": [5, 5], "d": [4, 4], "new": [7, 3]}
    source_rows = rows("a", "b", "c", "d")
    out = self_teach(
        source_rows, student=student(**qualities), judge=honest_judge(), evolver=evolver, samples=2, keep=1.0
    )
    assert [(item["instruction"], item["row"]) for item in out.scores][4:] == [("new", source_rows[0].id)]
    assert out.statistics["dropped"]["evolved: unchanged"] == 1
    assert out.statistics["dropped"]["evolved: already known"] == 2
    evolved = [row for row in out.sft if "evolved_by" in row.lineage]
    assert [row.instruction for row in evolved] == ["new"] and evolved[0].attributes["evolutions"] == 1


def test_evolved_prompts_that_the_student_cannot_take_are_left_out():
    evolver = Fake("evolver", evolve=lambda r, f: "broken")
    qualities = {"a": [9, 2], "broken": ["Please provide a number.", "q2"]}
    agent = student(**qualities)
    out = self_teach(rows("a"), student=agent, judge=honest_judge(), evolver=evolver, samples=2, keep=1.0)
    assert [item["instruction"] for item in out.scores] == ["a"]
    assert out.statistics["dropped"]["evolved: failure shown"] == 1


def test_self_teaching_repeats_exactly():
    assert teach(SCORES, seed=2)[0] == teach(SCORES, seed=2)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "samples: expected at least 2"),
        ({"keep": 0}, "keep: expected"),
        ({"score": "luck"}, "score: exp"),
    ],
)
def test_self_teaching_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        teach(SCORES, **settings)

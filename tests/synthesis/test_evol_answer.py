"""Evol-Answer: the parent stays unless the rewrite wins in both orders, and every guard holds."""

import pytest
from fake_agents import FAILED, Fake, honest_judge, listed

from wizard_engine import synthesis
from wizard_engine.data.records import Conversation, Message, conversation
from wizard_engine.synthesis.evol_answer import SHORTEST_CHARACTERS, strip_meta


def evolve_answers(*args, **options):
    return listed(synthesis.evolve_answers(*args, **options))


def rewriter(*texts):
    """Gives the texts in turn, one a round."""
    rounds = []

    def rewrite(request, fields):
        if request.seed not in rounds:
            rounds.append(request.seed)
        return texts[rounds.index(request.seed)]

    return Fake("rewriter", rewrite=rewrite)


def evolve(*texts, judge=None, answer="old q4", **settings):
    row = conversation("How many?", answer, topic="farm", skill="addition", length=7)
    agent = rewriter(*texts)
    return evolve_answers([row], rewriter=agent, judge=judge or honest_judge(), rounds=len(texts), **settings), row


def reasons(out):
    return [link["reason"] for link in out.chains[0]["links"]]


def test_answer_climbs_a_chain_of_accepted_rewrites():
    out, row = evolve("better q6", "worse q5", "best q8", result_margin=0)
    assert out.rows[0].answer == "best q8"
    assert reasons(out) == ["accepted", "not preferred", "accepted"]
    links = out.chains[0]["links"]
    assert [link["parent"] for link in links] == ["old q4", "better q6", "better q6"]
    assert links[0]["scores"] == [6.0, 4.0]
    assert out.rows[0].lineage["parents"] == [row.id]
    assert out.rows[0].lineage["operator"] == f"evol_answer:{links[0]['operator']}+{links[2]['operator']}"
    assert out.rows[0].attributes == {"topic": "farm", "skill": "addition", "answer_score": 8.0}


def test_rows_without_a_better_answer_stay_the_same_object():
    out, row = evolve("worse q1", "old q4")
    assert out.rows[0] == row
    assert reasons(out) == ["not preferred", "unchanged"]
    assert out.statistics["rows_changed"] == 0


def test_winners_and_losers_become_preference_rows():
    out, row = evolve("better q6", "worse q5", result_margin=0)
    assert [(p.chosen, p.rejected) for p in out.preferences] == [("better q6", "old q4"), ("better q6", "worse q5")]
    assert [p.attributes["gap"] for p in out.preferences] == [2.0, 1.0]
    assert out.preferences[0].prompt == row.messages[:-1]


def test_judge_that_prefers_a_place_changes_nothing():
    out, row = evolve("other q4.5", judge=honest_judge(bias=3))
    assert out.rows[0] == row and reasons(out) == ["flipped"]
    assert out.preferences == [] and out.statistics["pairs"] == {"kept": 0, "flipped": 1}


def test_each_operator_is_used_once_before_any_is_used_again():
    texts = [f"worse {n} q1" for n in range(10)]
    out, _ = evolve(*texts)
    used = [link["operator"] for link in out.chains[0]["links"]]
    assert sorted(used[:5]) == sorted(used[5:]) and len(set(used[:5])) == 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (FAILED, "call failed"),
        ("   ", "call failed"),
        ("Here is the improved answer:", "only a remark"),
        ("  old   q4 ", "unchanged"),
        ("long q9 " + "x" * 4 * SHORTEST_CHARACTERS, "too long"),
    ],
)
def test_guards_keep_the_parent_without_asking_the_judge(text, reason):
    judge = honest_judge()
    out, row = evolve(text, judge=judge)
    assert out.rows[0] == row and reasons(out) == [reason]
    assert judge.requests == [] and out.preferences == []


def test_length_cap_is_a_ratio_to_the_first_answer():
    first = "a" * 200 + " q4"
    assert reasons(evolve("b" * 405 + " q4.5", answer=first, length_cap=2, result_margin=0)[0]) == ["too long"]
    assert reasons(evolve("b" * 395 + " q4.5", answer=first, length_cap=2, result_margin=0)[0]) == ["accepted"]
    growing = evolve("b" * 395 + " q5", "c" * 500 + " q6", answer=first, length_cap=2, result_margin=0)[0]
    assert reasons(growing) == ["accepted", "too long"]


def test_another_result_must_win_by_the_margin_in_both_orders():
    judge = honest_judge(bias=0.5)
    new = "so 5=5 q6.7 The answer is {}."
    same, _ = evolve(new.format(4), judge=judge, answer="q4 The answer is 4.")
    assert reasons(same) == ["accepted"]
    # The averaged gap is 2.2, but only 1.7 in the order that the bias works against.
    other, row = evolve(new.format(5), judge=judge, answer="q4.5 The answer is 4.")
    assert reasons(other) == ["result changed"] and other.rows[0] == row
    clear, _ = evolve(new.format(5), judge=judge, answer="q3 The answer is 4.")
    assert reasons(clear) == ["accepted"]


def test_a_remark_before_the_answer_is_cut_off_and_counted():
    out, _ = evolve("Sure! Here is the improved answer: better q6", result_margin=0)
    assert out.rows[0].answer == "better q6"
    assert out.chains[0]["links"][0]["meta_removed"]
    assert sum(count.get("meta removed", 0) for count in out.statistics["operators"].values()) == 1


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Here is the improved answer:\n3+4=7", "3+4=7"),
        ("Here's a revised version: 7.", "7."),
        ("Of course, I have rewritten the answer.\n7", "7"),
        ("Here is the answer: 7", "Here is the answer: 7"),
        ("The improved yield is 7.", "The improved yield is 7."),
        ("3+4=7\nHere is the improved answer", "3+4=7\nHere is the improved answer"),
    ],
)
def test_strip_meta_cuts_opening_remarks_only(text, kept):
    assert strip_meta(text) == kept


def test_answers_of_conversations_are_judged_in_context():
    turns = [("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "old q4")]
    row = Conversation(tuple(Message(*turn) for turn in turns))
    judge = honest_judge()
    out = evolve_answers([row], rewriter=rewriter("new q9"), judge=judge, rounds=1)
    assert out.rows[0].messages[:3] == row.messages[:3] and out.rows[0].answer == "new q9"
    assert "### User\nU1\n\n### Assistant\nA1" in judge.requests[0].messages[0].content


def test_a_round_is_one_batch_of_rewrites_and_one_of_judgements():
    source_rows = [conversation(f"How many {n}?", "old q4") for n in range(6)]
    agent, judge = rewriter("new q9", "newer q10"), honest_judge()
    out = evolve_answers(source_rows, rewriter=agent, judge=judge, rounds=2, result_margin=0)
    assert agent.batches == [("rewrite", 6)] * 2 and judge.batches == [("judge", 12)] * 2
    again = evolve_answers(
        source_rows, rewriter=rewriter("new q9", "newer q10"), judge=judge, rounds=2, result_margin=0
    )
    assert out == again


def test_evolving_answers_refuses_bad_settings():
    with pytest.raises(ValueError, match=r"operators: expected some of helpfulness, .* got cheer"):
        evolve("x", operators=["cheer"])
    with pytest.raises(ValueError, match=r"expected at least 0 and 1, got 1 and 0.5"):
        evolve("x", length_cap=0.5)

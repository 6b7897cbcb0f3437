"""Co-teaching: all pairs in both orders, thresholds, lessons for the weakest skills, suggestions, simulated chat."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_agents import FAILED, Fake, answerer, honest_judge, listed

from wizard_engine import synthesis
from wizard_engine.agents import Ledger
from wizard_engine.data.records import Conversation, Message, conversation
from wizard_engine.synthesis.judging import Verdict
from wizard_engine.synthesis.lessons import choose_lessons


def co_teach(*args, **options):
    return listed(synthesis.co_teach(*args, **options))


def team(*scores):
    """ours and its rivals, each with the quality of its answer on every row, or a function of the instruction."""
    names = ["ours", "left", "right", "far"]
    rules = [(lambda text, request, score=score: score(text) if callable(score) else f"q{score}") for score in scores]
    agents = [answerer(name, lambda t, r, n=name, rule=rule: f"{n} {rule(t, r)}") for name, rule in zip(names, rules)]
    return {"ours": agents[0], "rivals": agents[1:]}


def rows(number=1, **attributes):
    return [conversation(f"Question {n}", "reference", topic="farm", length=3, **attributes) for n in range(number)]


def test_every_pair_battles_in_both_orders():
    judge = honest_judge()
    out = co_teach(rows(2), **team(5, 7, 6), judge=judge)
    assert len(judge.requests) == 2 * 3 * 2
    assert len({request.messages for request in judge.requests}) == 12
    pairs = [(battle["a"], battle["b"], battle["gap"], battle["winner"]) for battle in out.battles[:3]]
    assert pairs == [("ours", "left", -2.0, "b"), ("ours", "right", -1.0, "b"), ("left", "right", 1.0, "a")]
    assert {name: line["battles"] for name, line in out.statistics["rivals"].items()} == {"left": 2, "right": 2}


def test_scores_are_averaged_over_the_orders():
    out = co_teach(rows(), **team(5, 7), judge=honest_judge(bias=1), sft_threshold=0)
    (battle,) = out.battles
    assert (battle["score_a"], battle["score_b"], battle["gap"]) == (5.5, 7.5, -2.0)


@pytest.mark.parametrize(("threshold", "lessons"), [(2.9, 1), (3.0, 0), (3.1, 0)])
def test_lessons_are_lost_by_more_than_the_threshold(threshold, lessons):
    out = co_teach(rows(), **team(5, 8), judge=honest_judge(), sft_threshold=threshold)
    assert len(out.sft) == lessons


def test_lesson_is_the_answer_of_the_best_scored_rival():
    out = co_teach(rows(skill="division", difficulty=2.6), **team(2, 6, 9), judge=honest_judge())
    (lesson,) = out.sft
    assert lesson.messages == (Message("user", "Question 0"), Message("assistant", "right q9"))
    assert lesson.lineage == {"parents": [rows()[0].id], "operator": "co_teach", "agent": "right"}
    assert lesson.attributes == {
        "topic": "farm",
        "skill": "division",
        "difficulty": 2.6,
        "gap": 7.0,
        "rival": "right",
        "answer_score": 9.0,
        "turn": 0,
    }


@pytest.mark.parametrize(("threshold", "kept"), [(3.9, 1), (4.0, 0)])
def test_best_and_worst_become_a_preference_row(threshold, kept):
    out = co_teach(rows(), **team(7, 8, 4), judge=honest_judge(), dpo_threshold=threshold)
    assert len(out.preferences) == kept
    if kept:
        (pair,) = out.preferences
        assert (pair.chosen, pair.rejected, pair.attributes["gap"]) == ("left q8", "right q4", 4.0)
        assert (pair.attributes["winner"], pair.attributes["loser"]) == ("left", "right")
    else:
        assert out.statistics["selected"]["pairs"] == {"kept": 0, "no margin": 1}


def test_our_wins_are_counted_among_the_pairs():
    out = co_teach(rows(3), **team(9, 4), judge=honest_judge())
    assert out.sft == [] and out.statistics["selected"]["pairs_won_by_ours"] == 3
    assert out.statistics["rivals"]["left"] == {
        "battles": 3,
        "wins": 3,
        "losses": 0,
        "ties": 0,
        "flips": 0,
        "identical": 0,
        "mean_gap": 5.0,
    }


def test_flipped_battles_teach_nothing():
    out = co_teach(rows(2), **team(5, 5.5), judge=honest_judge(bias=4), sft_threshold=0, dpo_threshold=0)
    assert out.sft == [] and out.preferences == []
    assert out.statistics["flip_rate"] == 1.0 and out.statistics["rivals"]["left"]["ties"] == 2
    assert out.statistics["selected"]["pairs"] == {"kept": 0, "flipped": 2}


def test_equal_answers_are_a_tie_without_a_judgement():
    judge = honest_judge()
    agents = [Fake(name, answer=lambda r, m: "same  answer") for name in ("ours", "left")]
    out = co_teach(rows(), ours=agents[0], rivals=agents[1:], judge=judge)
    assert judge.requests == [] and out.statistics["rivals"]["left"]["identical"] == 1
    assert out.sft == [] and out.preferences == []


def test_failed_answers_and_judgements_do_not_affect_the_others():
    agents = team(2, 9)
    agents["rivals"].append(Fake("down", answer=lambda r, m: FAILED))
    judge = honest_judge()
    out = co_teach(rows(2), **agents, judge=judge)
    assert len(out.battles) == 2 and len(out.sft) == 2 and out.statistics["missing"] == 4
    assert out.statistics["calls"]["answer"] == {"asked": 6, "failed": 2, "failed: timed out": 2, "unreadable": 0}
    judge.tasks["judge"] = lambda r, f: "no idea"
    out = co_teach(rows(2), **agents, judge=judge)
    assert out.battles == [] and out.sft == [] and out.statistics["calls"]["judge"]["unreadable"] == 4
    assert out.statistics["selected"]["pairs"] == {"kept": 0, "not judged": 2}


def test_tables_group_by_topic_difficulty_and_skill():
    source_rows = [
        conversation(f"Q{n}", "x", topic=t, difficulty=d, skill=s)
        for n, (t, d, s) in enumerate([("farm", 1.2, ["mul", "add"]), ("farm", 2.7, "div"), ("school", 3, "div")])
    ] + [conversation("Q9", "x")]
    out = co_teach(source_rows, **team(5, 9), judge=honest_judge())
    assert {name: line["losses"] for name, line in out.statistics["topics"].items()} == {
        "farm": 2,
        "school": 1,
        "unknown": 1,
    }
    assert list(out.statistics["difficulties"]) == ["1", "3", "unknown"]
    assert list(out.statistics["skills"]) == ["add+mul", "div", "unknown"]


def losses(**skills):
    return [(skill, loss) for skill, values in skills.items() for loss in values]


def test_all_losses_above_the_threshold_are_lessons_without_a_limit():
    chosen, table = choose_lessons(losses(a=[5, 0, 3], b=[3.5]), 3.0, None)
    assert chosen == [0, 3]
    assert table["a"] == {"scenes": 3, "mean_loss": 8 / 3, "candidates": 1, "lessons": 1}


def test_limited_lessons_go_to_the_weakest_skill_not_the_commonest():
    common, rare = [4.0] * 50 + [0.0] * 50, [6.0] * 10
    chosen, table = choose_lessons(losses(common=common, rare=rare), 1.0, 12)
    assert (table["rare"]["lessons"], table["common"]["lessons"]) == (9, 3)
    assert len(chosen) == 12


def test_quota_left_over_goes_to_other_skills():
    _, table = choose_lessons(losses(common=[4.0] * 50, rare=[9.0] * 2), 1.0, 20)
    assert (table["rare"]["lessons"], table["common"]["lessons"]) == (2, 18)


def test_largest_losses_of_a_skill_come_first():
    assert choose_lessons(losses(a=[4, 9, 5, 8]), 1.0, 2)[0] == [1, 3]


def advised(suggestion="show steps", rewrite="rewritten q9.5", **settings):
    helpers = {
        "suggester": Fake("suggester", suggest=lambda r, f: suggestion),
        "rewriter": Fake("rewriter", rewrite=lambda r, f: rewrite),
    }
    out = co_teach(rows(), **team(2, 9), judge=honest_judge(), **helpers, **settings)
    return out, helpers


def test_suggestion_is_applied_to_our_answer_and_kept_where_better():
    out, helpers = advised()
    (lesson,) = out.sft
    assert lesson.answer == "rewritten q9.5"
    assert lesson.lineage["agent"] == "rewriter" and lesson.lineage["suggestion"] == "show steps"
    assert out.statistics["selected"]["lessons_from_suggestions"] == 1
    prompt = helpers["rewriter"].requests[0].messages[0].content
    assert "show steps" in prompt and "ours q2" in prompt and "left q9" not in prompt
    prompt = helpers["suggester"].requests[0].messages[0].content
    assert "ours q2" in prompt and "left q9" in prompt


@pytest.mark.parametrize("rewrite", ["rewritten q8.5", "left q9", "", FAILED])
def test_rewrite_that_is_no_better_keeps_the_rivals_answer(rewrite):
    out, _ = advised(rewrite=rewrite)
    assert out.sft[0].answer == "left q9" and "suggestion" not in out.sft[0].lineage


def test_the_winner_rewrites_where_no_rewriter_is_named():
    agents = team(2, 9, 5)
    for rival in agents["rivals"]:
        rival.tasks["rewrite"] = lambda r, f, n=rival.name: f"by {n} q9.9"
    suggester = Fake("suggester", suggest=lambda r, f: "try")
    out = co_teach(rows(), **agents, judge=honest_judge(), suggester=suggester)
    assert out.sft[0].answer == "by left q9.9" and agents["rivals"][1].asked("rewrite") == []


def test_chat_goes_on_after_the_best_answer():
    user = Fake("user", user=lambda r, m: f"And {len(m)}?")
    agents, judge = team(2, 9, 5), honest_judge()
    out = co_teach(rows(2), **agents, judge=judge, user=user, chat_turns=3)
    assert [message.content for message in out.sft[-1].messages] == [
        "Question 1",
        "left q9",
        "And 2?",
        "left q9",
        "And 4?",
        "left q9",
    ]
    assert [battle["turn"] for battle in out.battles] == [0] * 6 + [1] * 6 + [2] * 6
    assert len(user.requests) == 4 and len(judge.requests) == 2 * 3 * 3 * 2
    assert out.statistics["selected"]["scenes"] == 6


def test_chat_ends_without_a_good_user_turn():
    user = Fake("user", user=lambda r, m: FAILED if "Question 0" in m[0].content else "Please provide a number.")
    out = co_teach(rows(2), **team(2, 9), judge=honest_judge(), user=user, chat_turns=2)
    assert out.statistics["selected"]["scenes"] == 2


def test_context_of_a_conversation_is_part_of_the_battle():
    turns = [("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2")]
    judge = honest_judge()
    out = co_teach([Conversation(tuple(Message(*turn) for turn in turns))], **team(2, 9), judge=judge)
    assert [message.content for message in out.sft[0].messages] == ["U1", "A1", "U2", "left q9"]
    assert "### Assistant\nA1" in judge.requests[0].messages[0].content


def test_co_teaching_repeats_exactly():
    one, two = (co_teach(rows(5), **team(2, 9, 5), judge=honest_judge(), seed=3) for _ in range(2))
    assert one == two


def test_co_teaching_refuses_bad_settings():
    with pytest.raises(ValueError, match="rivals: expected at least one, and names that differ, got ours; rename"):
        co_teach(rows(), **team(2), judge=honest_judge())
    same = team(2, 3)
    same["rivals"][0].name = "ours"
    with pytest.raises(ValueError, match="got ours, ours"):
        co_teach(rows(), **same, judge=honest_judge())
    with pytest.raises(ValueError, match="thresholds: expected 0 or more, got -1"):
        co_teach(rows(), **team(2, 3), judge=honest_judge(), sft_threshold=-1)
    with pytest.raises(ValueError, match="chat_turns: expected 1, or more with a user agent, got 2"):
        co_teach(rows(), **team(2, 3), judge=honest_judge(), chat_turns=2)


def test_verdict_reads_both_orders():
    assert Verdict((8, 5), (7, 6)).winner == 1 and Verdict((8, 5), (7, 6)).gap == 2
    assert Verdict((8, 5), (5, 8)).is_flipped and Verdict((8, 5), (5, 8)).winner == 0
    assert Verdict((8, 5), (6, 6)).winner == 0 and not Verdict((8, 5), (6, 6)).is_flipped
    assert Verdict((8, 5), (7, 6)).swing == 2 and Verdict((8, 5), (7, 6)).swapped().gap == -2


KILLED = """
import json, sys, time
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
from fake_agents import answerer, honest_judge
from wizard_engine.agents import Ledger, Scheduler
from wizard_engine.data.records import conversation
from wizard_engine.synthesis import co_teach

ledger = Ledger({ledger!r})
def slow(agent):
    inner = agent.respond
    def respond(requests):
        time.sleep(0.01)
        replies = inner(requests)
        with open({log!r}, "a") as log:
            log.write("x" * len(requests))
        return replies
    agent.respond = respond
    return agent

agents = [slow(answerer(name, lambda t, r, s=s: f"{{t}} q{{s}}")) for name, s in [("ours", 2), ("a", 9), ("b", 5)]]
rows = [conversation(f"Question {{n}}", "x") for n in range(60)]
scheduler = Scheduler(ledger, batch_size=20, quiet=True)
out = co_teach(rows, ours=agents[0], rivals=agents[1:], judge=slow(honest_judge()), scheduler=scheduler)
rows = [row.to_json() for row in [*out.sft, *out.preferences]]
Path({out!r}).write_text(json.dumps([rows, list(out.battles), out.statistics]))
"""


@pytest.mark.slow
def test_killed_co_teaching_resumes_without_repeating_a_returned_call(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("log", "ledger", "out")}
    command = [
        sys.executable,
        "-c",
        KILLED.format(root=str(Path(__file__).parents[2]), here=str(Path(__file__).parent), **paths),
    ]
    log = tmp_path / "log"
    log.touch()
    for calls in (40, 200):
        process = subprocess.Popen(command)
        while len(log.read_text()) < calls and process.poll() is None:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    counts = Ledger(paths["ledger"]).counts()
    stored = sum(task["replies"] for tasks in counts.values() for task in tasks.values())
    before = len(log.read_text())
    subprocess.run(command, check=True)
    expected_calls = 60 * 3 + 60 * 3 * 2
    assert 0 < stored < expected_calls and before - stored <= 2 * 20
    assert len(log.read_text()) - before == expected_calls - stored
    resumed = (tmp_path / "out").read_text()
    for name in ("ledger", "ledger-wal", "ledger-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    subprocess.run(command, check=True)
    assert re.findall(r"q9", resumed) and (tmp_path / "out").read_text() == resumed

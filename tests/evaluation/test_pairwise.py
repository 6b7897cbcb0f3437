"""Blind pairwise preference with judges whose verdicts are known."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from wizard_engine import world
from wizard_engine.agents import prompts
from wizard_engine.agents.protocol import Reply, Request
from wizard_engine.data.records import Message
from wizard_engine.evaluation.pairwise import all_pairs, bootstrap_rates, pairwise


class ScriptedJudge:
    """Scores both answers by a function of the fields it sees; keeps what it was shown."""

    name, fingerprint = "scripted", "scripted/1"

    def __init__(self, verdict: Callable[[dict[str, str]], str]) -> None:
        self.verdict, self.seen = verdict, []

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        # A request that asks again for an unreadable verdict begins with the same message.
        asked = [prompts.parse(request.task, request.messages[0].content) for request in requests]
        self.seen += asked
        return [Reply(self.verdict(fields)) for fields in asked]


def _by_quality(fields: dict[str, str]) -> str:
    """Scores are the numbers in the answers."""
    scores = (re.search(r"\d+", fields[name])[0] for name in ("answer_a", "answer_b"))
    return "ok " + " ".join(f"[[{score}]]" for score in scores)


def _answers(scores: Sequence[int]) -> list[str]:
    return [f"quality {score}" for score in scores]


def test_pairwise_counts_wins_losses_ties():
    judge = ScriptedJudge(_by_quality)
    comparison = pairwise(_answers([9, 3, 5, 8, 7]), _answers([2, 8, 5, 7, 1]), list("abcde"), judge=judge)
    assert (comparison.wins, comparison.losses, comparison.ties, comparison.errors, comparison.flips) == (3, 1, 1, 0, 0)
    assert comparison.win_rate == 0.75 and comparison.win_rate_with_ties == 0.7
    assert [battle.score for battle in comparison.battles] == [1.0, 0.0, 0.5, 1.0, 1.0]
    assert comparison.battles[0].games == ((9.0, 2.0), (9.0, 2.0))


def test_pairwise_judge_sees_no_names_and_each_order_once():
    judge = ScriptedJudge(_by_quality)
    comparison = pairwise(
        _answers([9] * 40), _answers([2] * 40), [f"q{i}" for i in range(40)], judge=judge, name_a="ours", name_b="rival"
    )
    assert not any("ours" in text or "rival" in text for fields in judge.seen for text in fields.values())
    first, second = judge.seen[0::2], judge.seen[1::2]
    assert all((x["answer_a"], x["answer_b"]) == (y["answer_b"], y["answer_a"]) for x, y in zip(first, second))
    shown_first = sum(fields["answer_a"] == "quality 9" for fields in first)
    assert 8 < shown_first < 32
    assert [b.a_first for b in comparison.battles] == [fields["answer_a"] == "quality 9" for fields in first]


def test_pairwise_detects_a_judge_of_positions_and_ties_everything():
    judge = ScriptedJudge(lambda fields: "[[9]] [[2]]")
    comparison = pairwise(_answers([5] * 12), _answers([4] * 12), ["q"] * 12, judge=judge)
    assert (comparison.wins, comparison.losses, comparison.ties, comparison.flips) == (0, 0, 12, 12)
    assert comparison.first_wins == 1.0 and comparison.win_rate is None and comparison.ci95 is None
    assert comparison.win_rate_with_ties == 0.5


def test_pairwise_counts_unreadable_verdicts_and_failed_calls_as_errors():
    class Failing(ScriptedJudge):
        def respond(self, requests):
            replies = super().respond(requests)
            return [Reply("", "time out") if index == 2 else reply for index, reply in enumerate(replies)]

    def verdict(fields):
        return "no scores" if fields["instruction"] == "bad" else _by_quality(fields)

    comparison = pairwise(
        _answers([9, 9, 9, 9]), _answers([1, 1, 1, 1]), ["bad", "x", "y", "z"], judge=Failing(verdict)
    )
    assert (comparison.wins, comparison.losses, comparison.ties, comparison.errors) == (2, 0, 0, 2)
    assert comparison.battles[0].score is None and "no two scores" in comparison.battles[0].errors[0]
    assert comparison.battles[1].errors == ("judge: time out",) and comparison.battles[1].games[0] is None


def test_pairwise_small_differences_are_ties():
    judge = ScriptedJudge(lambda fields: "[[7]] [[7.1]]")
    assert pairwise(["x"] * 3, ["y"] * 3, ["q"] * 3, judge=judge).ties == 3
    assert pairwise(["x"] * 3, ["y"] * 3, ["q"] * 3, judge=judge, tie_margin=0.0).flips == 3


def test_pairwise_reports_whether_longer_answers_win():
    long, short = [f"quality 9 {'x' * 40}"] * 4, _answers([2] * 4)
    assert pairwise(long, short, ["q"] * 4, judge=ScriptedJudge(_by_quality)).longer_wins == 1.0
    assert pairwise(short, long, ["q"] * 4, judge=ScriptedJudge(_by_quality)).longer_wins == 1.0


def test_pairwise_swapping_the_models_swaps_the_result():
    rng = np.random.default_rng(0)
    a, b = (_answers(rng.integers(1, 11, 60).tolist()) for _ in range(2))
    one = pairwise(a, b, ["q"] * 60, judge=ScriptedJudge(_by_quality))
    other = pairwise(b, a, ["q"] * 60, judge=ScriptedJudge(_by_quality))
    assert (one.wins, one.losses, one.ties) == (other.losses, other.wins, other.ties)
    assert one.win_rate == pytest.approx(1 - other.win_rate)


def test_pairwise_shows_the_history_of_a_conversation():
    judge = ScriptedJudge(_by_quality)
    history = (Message("user", "first"), Message("assistant", "reply"))
    pairwise(_answers([9]), _answers([2]), [(*history, Message("user", "second"))], judge=judge)
    assert judge.seen[0]["instruction"] == "second" and prompts.parse_dialogue(judge.seen[0]["history"]) == history


@pytest.mark.parametrize(
    ("a", "b", "prompts", "message"),
    [
        ([], [], [], "at least one prompt"),
        (["x"], ["y", "z"], ["q"], "one per prompt from both"),
        (["x"], ["y"], [(Message("user", "q"), Message("assistant", "a"))], "ends with a user turn"),
    ],
)
def test_pairwise_refuses_bad_arguments(a, b, prompts, message):
    with pytest.raises(ValueError, match=message):
        pairwise(a, b, prompts, judge=ScriptedJudge(_by_quality))


def test_bootstrap_rates_hold_the_rate_and_match_the_normal_width():
    without, with_ties = bootstrap_rates(300, 200, 500, seed=1)
    assert without[0] < 0.6 < without[1] and with_ties[0] < 0.55 < with_ties[1]
    width = 2 * 1.96 * (0.6 * 0.4 / 500) ** 0.5
    assert without[1] - without[0] == pytest.approx(width, rel=0.1)
    assert with_ties[1] - with_ties[0] < without[1] - without[0]
    assert bootstrap_rates(300, 200, 500, seed=1) == (without, with_ties)


def test_bootstrap_rates_of_one_sided_results_are_not_certain():
    without, _ = bootstrap_rates(10, 0, 5, seed=0)
    assert without[0] < 0.8 and without[1] == pytest.approx(1.0)
    assert bootstrap_rates(0, 0, 3, seed=0)[0] is None and bootstrap_rates(0, 0, 0, seed=0) == (None, None)


def test_bootstrap_interval_covers_the_truth_in_about_95_of_100():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        wins, losses, ties = rng.multinomial(150, [0.45, 0.3, 0.25]).tolist()
        low, high = bootstrap_rates(wins, losses, ties, seed=trial)[0]
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 199


def test_all_pairs_of_three_or_with_a_baseline():
    models = {"base": _answers([2] * 5), "mid": _answers([5] * 5), "top": _answers([9] * 5)}
    lines = []
    comparisons = all_pairs(models, ["q"] * 5, judge=ScriptedJudge(_by_quality), progress=lines.append)
    assert [(r.a, r.b, r.wins) for r in comparisons] == [("mid", "base", 5), ("top", "base", 5), ("top", "mid", 5)]
    assert len(lines) == 3
    against = all_pairs(models, ["q"] * 5, judge=ScriptedJudge(_by_quality), baseline="mid")
    assert [(r.a, r.b, r.wins) for r in against] == [("base", "mid", 0), ("top", "mid", 5)]
    with pytest.raises(ValueError, match="baseline: expected one of"):
        all_pairs(models, ["q"] * 5, judge=ScriptedJudge(_by_quality), baseline="other")
    with pytest.raises(ValueError, match="at least two"):
        all_pairs({"base": ["x"]}, ["q"], judge=ScriptedJudge(_by_quality))


def test_pairwise_with_the_worlds_judge_prefers_right_answers():
    rows = world.held_out(60, seed=2)
    problems = [world.parse(row.instruction) for row in rows]
    good = [world.solve(problem) for problem in problems]
    wrong = [world.solve(problem, "wrong") for problem in problems]
    comparison = pairwise(good, wrong, [row.messages[:-1] for row in rows], judge=world.program("world:judge"))
    assert comparison.wins > 50 and comparison.losses == 0 and comparison.errors == 0

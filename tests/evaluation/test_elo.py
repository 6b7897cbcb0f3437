"""Elo ratings by Bradley-Terry."""

import math

import numpy as np
import pytest

from wizard_engine.evaluation.elo import elo
from wizard_engine.evaluation.pairwise import Battle


def _table(battles, **options):
    return {rating.model: rating for rating in elo(battles, **options)}


def _battles(strengths: dict[str, float], games: int, seed: int) -> list[tuple[str, str, float]]:
    rng = np.random.default_rng(seed)
    names = list(strengths)
    battles = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            chance = 1 / (1 + 10 ** ((strengths[b] - strengths[a]) / 400))
            battles += [(a, b, float(won)) for won in rng.random(games) < chance]
    return battles


def test_elo_of_two_models_by_hand():
    battles = [("x", "y", 1.0)] * 30 + [("y", "x", 1.0)] * 10
    table = _table(battles, anchor="y", prior=0.0)
    assert table["x"].estimate == pytest.approx(1000 + 400 * math.log10(3))
    assert table["y"].estimate == table["y"].low == table["y"].high == 1000
    assert table["x"].low < table["x"].elo < table["x"].high and table["x"].battles == 40


def test_elo_recovers_known_strengths():
    strengths = {"a": 1000.0, "b": 1120.0, "c": 900.0, "d": 1300.0}
    table = _table(_battles(strengths, 600, seed=1), anchor="a", bootstrap=50)
    assert all(abs(table[name].estimate - value) < 35 for name, value in strengths.items())
    assert all(table[name].low - 10 < value < table[name].high + 10 for name, value in strengths.items())


def test_elo_likelihood_has_zero_gradient_at_the_estimate():
    battles = _battles({"a": 1000, "b": 1100, "c": 950}, 50, seed=4)
    table = _table(battles, anchor="a", prior=0.0, bootstrap=0)
    for name in "bc":
        slope = 0.0
        for a, b, score in battles:
            expected = 1 / (1 + 10 ** ((table[b].estimate - table[a].estimate) / 400))
            slope += (score - expected) * ((a == name) - (b == name))
        assert abs(slope) < 1e-6


def test_elo_is_sorted_and_anchor_shifts_everything():
    battles = _battles({"a": 1000, "b": 1200, "c": 800}, 40, seed=2)
    ratings = elo(battles, anchor="a")
    assert [rating.model for rating in ratings] == ["b", "a", "c"]
    moved = _table(battles, anchor="a", anchor_elo=1500)
    assert all(moved[r.model].elo == pytest.approx(r.elo + 500) for r in ratings)


def test_elo_ties_pull_together_and_failed_battles_do_not_count():
    tied = _table([("x", "y", 0.5)] * 20 + [("x", "y", None)] * 5, anchor="y")
    assert tied["x"].estimate == pytest.approx(1000) and tied["x"].battles == 20


def test_elo_of_a_model_that_never_lost_is_finite_with_the_prior_only():
    battles = [Battle("x", "y", i, 1.0, (None, None), True) for i in range(10)]
    assert 1300 < _table(battles, anchor="y")["x"].estimate < 1700
    with pytest.raises(ValueError, match="prior > 0"):
        elo(battles, anchor="y", prior=0.0)


def test_elo_is_deterministic_and_seeded():
    battles = _battles({"a": 1000, "b": 1200}, 30, seed=3)
    assert elo(battles, anchor="a", seed=1) == elo(battles, anchor="a", seed=1)
    assert elo(battles, anchor="a", seed=1) != elo(battles, anchor="a", seed=2)


@pytest.mark.parametrize(
    ("battles", "anchor", "message"),
    [
        ([], "a", "expected at least one with a score"),
        ([("a", "b", None)], "a", "expected at least one with a score"),
        ([("a", "b", 1.0)], "c", "anchor: expected one of a, b"),
        ([("a", "b", 1.0), ("c", "d", 1.0)], "a", "got c, d apart"),
        ([("a", "b", 1.5)], "a", "score 0 to 1"),
        ([("a", "a", 1.0)], "a", "expected two models"),
    ],
)
def test_elo_refuses_bad_battles(battles, anchor, message):
    with pytest.raises(ValueError, match=message):
        elo(battles, anchor=anchor)

"""Held-out measures: estimates and their errors, the report, options that are refused."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from many_ranks import results_by_rank

from wizard_engine.data.chat import Sample
from wizard_engine.data.samples import Pair
from wizard_engine.training.held_out import HeldOutOptions, Measure, placements, report
from wizard_engine.training.held_out_rows import PreferenceRows, StepRows, step_values


def test_a_mean_has_its_error_and_one_row_has_none():
    assert Measure(np.array([1.0, 2.0, 3.0, 6.0])).estimate() == pytest.approx([3.0, math.sqrt(14 / 3 / 4)])
    assert Measure(np.array([1.0])).estimate() == [1.0, None]
    assert Measure(np.array([0.0]), np.array([0.0])).estimate() == [None, None]


# By hand: R = 6 / 4; residuals 2 - 1.5, 4 - 4.5; error^2 = 2 / 1 (0.25 + 0.25) / 16.
def test_nats_per_token_are_a_ratio_of_sums_with_its_error():
    assert Measure(np.array([2.0, 4.0]), np.array([1.0, 3.0])).estimate() == pytest.approx([1.5, math.sqrt(1 / 16)])


def test_differences_are_paired_over_the_rows():
    before, shift = np.array([1.0, 50.0, 900.0]), np.array([0.1, 0.2, 0.3])
    mean, error = (Measure(before + shift) - Measure(before)).estimate()
    assert (mean, error) == pytest.approx((0.2, 0.1 / math.sqrt(3)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_the_area_is_that_of_all_pairs_with_its_error(rows):
    scores, classes = np.array([float(x) for x, _ in rows]), np.array([side for _, side in rows])
    high, low = scores[classes], scores[~classes]
    mean, error = placements(scores, classes).estimate()
    if not len(high) or not len(low):
        assert (mean, error) == (None, None)
        return
    wins = np.array([[(a > b) + 0.5 * (a == b) for b in low] for a in high])
    assert mean == pytest.approx(wins.mean())
    if len(high) < 2 or len(low) < 2:
        assert error is None
        return
    expected = wins.mean(1).var(ddof=1) / len(high) + wins.mean(0).var(ddof=1) / len(low)
    assert error == pytest.approx(math.sqrt(expected))


def test_the_report_is_a_line_of_each_measure():
    result = {
        "rows": 200,
        "before": {"loss": [1.654, 0.03], "auc": [None, None], "margin": [0.0, 0.0]},
        "after": {"loss": [1.239, 0.02], "auc": [None, None], "margin": [0.5, 0.1]},
        "difference": {"loss": [-0.415, 0.029], "auc": [None, None], "margin": [0.5, None]},
    }
    assert report(result, {"loss": "nats a token", "auc": "", "margin": ""}) == [
        "held-out: loss 1.654 -> 1.239 nats a token (-0.415 +- 0.029, 200 rows)",
        "held-out: auc not defined on these 200 rows",
        "held-out: margin 0.000 -> 0.500 (+0.500, 200 rows)",
    ]


def sample(tokens):
    return Sample(np.arange(tokens + 1, dtype=np.int32), np.array([0.0] + [1.0] * tokens, np.float32))


@pytest.mark.parametrize(("variant", "per_token"), list(product(("sigmoid", "robust", "ipo"), (False, True))))
def test_preference_measures_are_those_of_the_loss(variant, per_token):
    smoothing = 0.1 if variant == "robust" else 0.0
    rows = PreferenceRows(
        [Pair(sample(2), sample(4)), Pair(sample(1), sample(5))], 9, 0.5, variant, smoothing, per_token
    )
    first = {"chosen": np.array([-4.0, -2.0]), "rejected": np.array([-4.0, -20.0])}
    now = {"chosen": np.array([-2.0, -3.0]), "rejected": np.array([-8.0, -15.0])}
    start, end = rows.measures(first, first), rows.measures(now, first)
    assert start["accuracy"].values.tolist() == [0.5, 0.5] and start["margin"].values.tolist() == [0, 0]
    # Per token the chosen answers have -2 and -2 before, the rejected ones -1 and -4.
    assert start["preferred"].values.tolist() == [0, 1] and end["preferred"].values.tolist() == [1, 0.5]
    tokens = [(2, 4), (1, 5)] if per_token else [(1, 1), (1, 1)]
    margins = [0.5 * (2 / tokens[0][0] + 4 / tokens[0][1]), 0.5 * (-1 / tokens[1][0] - 5 / tokens[1][1])]
    assert end["margin"].values.tolist() == pytest.approx(margins) and end["accuracy"].values.tolist() == [1, 0]
    log = [math.log1p(math.exp(-m)) for m in margins], [math.log1p(math.exp(m)) for m in margins]
    losses = {
        "sigmoid": log[0],
        "robust": [(0.9 * a - 0.1 * b) / 0.8 for a, b in zip(*log)],
        "ipo": [(m / 0.5 - 1.0) ** 2 for m in margins],
    }
    assert end["loss"].values.tolist() == pytest.approx(losses[variant])


def test_step_measures_count_steps_and_find_wrong_answers():
    labels = [(1, -1), (1, 1, 0), (0,)]
    rows = StepRows([(sample(9), [1, 3, 5][: len(x)], x) for x in labels], 9)
    now = {"correct": np.array([1.0, 3.0, 0.0]), "lowest": np.array([0.3, 0.9, 0.3])}
    measures = rows.measures(now, now)
    assert measures["accuracy"].estimate()[0] == pytest.approx(4 / 6)
    assert measures["answer_auc"].estimate()[0] == pytest.approx(0.75)
    scores = torch.tensor([[9.0, 0, 0], [0, 0, 9.0], [9.0, 0, 0], [0, 9.0, 0]])
    correct, lowest = step_values(scores, rows.rows[0][1], rows.rows[0][2])
    assert correct == 1 and lowest == pytest.approx(1 - 1 / (2 + math.exp(9)))


def test_eval_every_without_rows_is_refused():
    with pytest.raises(ValueError, match="eval_every: expected 0 without rows to measure on, got 5; name some with"):
        HeldOutOptions(eval_every=5)
    assert HeldOutOptions(eval_every=5, held_out=(Path("rows.jsonl"),)).eval_every == 5


# Catches: rows that a rank scores in other company, or that are lost, doubled or out of order; a rank without a result.
@pytest.mark.parametrize(
    ("layouts", "kinds"),
    [
        (("sharded", "tp"), ("supervised", "steps")),
        pytest.param(
            ("sharded", "copies", "tp", "cp"),
            ("supervised", "preference", "ranking", "steps"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two_layouts", "all"],
)
def test_measures_do_not_depend_on_the_layout(tmp_path, layouts, kinds):
    script = Path(__file__).with_name("held_out_rank.py")
    found = results_by_rank(script, (1, 2), tmp_path, ("one", *layouts, *kinds))
    assert found[2][0] == found[2][1]
    for kind in kinds:
        one = found[1][0][f"one/{kind}"]
        assert one["before"] == one["after"] and all(len(set(values)) > 1 for values in one["columns"].values())
        for layout in layouts:
            other = found[2][0][f"{layout}/{kind}"]
            if layout in ("sharded", "copies"):
                assert other == one, (layout, kind)
            for name, values in other["columns"].items():
                assert values == pytest.approx(one["columns"][name], rel=1e-4), (layout, kind)

"""Raking meets targets or says why not, the cap holds, and draws follow the weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.curation.sampling import (
    cap_weights,
    column,
    effective_sample_size,
    largest_sample,
    partition,
    rake,
    sample_without_replacement,
    uniform_target,
)
from wizard_engine.data.shuffle import seeded_order, seeded_uniform


def example(count=4000):
    rng = np.random.default_rng(0)
    return {
        "language": [("en", "zh", None)[i] for i in rng.choice(3, count, p=[0.8, 0.1, 0.1])],
        "topic": [("a", "b", "c")[i] for i in rng.choice(3, count, p=[0.6, 0.3, 0.1])],
        "length": rng.integers(0, 100, count).tolist(),
    }


def test_rake_by_hand():
    rows = {"x": ["a", "a", "a", "b"], "y": ["p", "p", "q", "q"]}
    report = rake(rows, {"x": {"a": 0.5, "b": 0.5}, "y": {"p": 0.25, "q": 0.75}})
    # w(a,p) = 0.5 each (two rows), w(a,q) = 1, w(b,q) = 2: x: 2 against 2, y: 1 against 3.
    assert report.weights == pytest.approx([0.5, 0.5, 1, 2], abs=1e-5)
    assert report.natural["x"] == {"a": 0.75, "b": 0.25} and report.converged
    assert report.achieved["y"] == pytest.approx({"p": 0.25, "q": 0.75}, abs=1e-5)
    assert report.effective_sample_size == pytest.approx(16 / 5.5, abs=1e-4)


def test_rake_meets_all_marginals_and_keeps_the_unknown_share():
    rows = example()
    unknown = rows["language"].count(None) / 4000
    report = rake(rows, {"language": {"zh": 0.4, "en": 0.6}, "length": {"..50": 0.7, "50..": 0.3}, "topic": {"c": 0.2}})
    assert report.converged and report.max_error <= 1e-6
    assert report.achieved["language"]["zh"] == pytest.approx(0.4 * (1 - unknown), abs=1e-5)
    assert report.achieved["language"]["unknown"] == pytest.approx(unknown, abs=1e-5)
    assert report.achieved["length"]["..50"] == pytest.approx(0.7, abs=1e-5)
    natural = report.natural["topic"]
    assert report.target["topic"]["a"] / report.target["topic"]["b"] == pytest.approx(natural["a"] / natural["b"])
    assert report.weights.mean() == pytest.approx(1) and report.weights.max() <= 5


def test_rake_unknown_can_be_targeted_and_unnamed_values_get_none():
    report = rake(example(), {"language": {"unknown": 0.5, "zh": 0.5}}, cap=10)
    assert report.achieved["language"] == pytest.approx({"unknown": 0.5, "zh": 0.5, "en": 0.0}, abs=1e-6)
    assert rake(example(), {"language": {"zh": 0}}).achieved["language"]["zh"] == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(1.0, 20.0), st.floats(0.01, 0.98), st.floats(0.01, 0.98))
def test_rake_cap_always_holds_and_errors_are_reported(seed, cap, first, second):
    rng = np.random.default_rng(seed)
    rows = {
        "x": rng.choice(["a", "b"], 60, p=[0.9, 0.1]).tolist() + ["a", "b"],
        "y": list(rng.integers(0, 2, 60)) + [0, 1],
    }
    rows["y"] = [int(value) for value in rows["y"]]
    report = rake(rows, {"x": {"b": first, "a": 1 - first}, "y": {1: second, 0: 1 - second}}, cap=cap)
    assert report.weights.max() <= cap * (1 + 1e-9) and report.weights.mean() == pytest.approx(1)
    error = max(
        abs(report.achieved[name].get(value, 0) - share)
        for name, shares in report.target.items()
        for value, share in shares.items()
    )
    assert report.max_error == pytest.approx(error, abs=1e-9)
    assert report.converged == (report.max_error <= 1e-6)


@pytest.mark.parametrize(
    "targets, options, reason",
    [
        ({"language": {"fr": 0.1}}, {}, "targets.language.fr: expected a value that rows have, got none"),
        ({"mood": {"x": 1}}, {}, "targets.mood: expected an attribute of the rows, got none"),
        ({"language": {"zh": 0.8, "en": 0.7}}, {}, "targets.language: expected shares that sum to 1, got 1.5"),
        ({"language": {"zh": 0.3, "en": 0.3}}, {}, "targets.language: expected shares that sum to 1, got 0.6"),
        ({"language": {"zh": -0.1}}, {}, "targets.language.zh: expected a share from 0 to 1, got -0.1"),
        ({"language": {"zh": "all"}}, {}, "targets.language.zh: expected a share from 0 to 1, got 'all'"),
        ({"language": {"zh": float("nan")}}, {}, "targets.language.zh: expected a share"),
        ({"length": {"200..": 0.5}}, {}, r"targets.length.200..: expected a value that rows have"),
        ({}, {"cap": 0.5}, "cap: expected at least 1"),
        ({}, {"iterations": 0}, "iterations: expected at least 1"),
        (
            {"language": {"zh": 1, "unknown": 0}},
            {"cap": 2},
            "cap: expected at least .* of 4000 rows may be drawn, got 2",
        ),
    ],
)
def test_rake_impossible_targets_are_errors(targets, options, reason):
    with pytest.raises(ValueError, match=reason):
        rake(example(), targets, **options)


def test_rake_value_excluded_by_another_attribute_is_an_error():
    rows = {"x": ["a", "b", "b"], "y": ["p", "q", "q"]}
    with pytest.raises(
        ValueError, match=r"targets.y.p: expected a row that may be drawn, got only rows that shares of 0"
    ):
        rake(rows, {"x": {"a": 0}, "y": {"p": 0.5}})


def test_rake_refuses_columns_of_different_lengths():
    with pytest.raises(ValueError, match=r"attributes: expected columns of one length above 0, got lengths \[1, 2\]"):
        rake({"x": ["a"], "y": ["a", "b"]}, {})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6).filter(lambda x: x == 0 or x > 1e-6), min_size=1, max_size=30), st.floats(1, 40))
def test_cap_weights_scales_then_cuts(values, cap):
    weights = np.array(values)
    if (weights > 0).sum() * cap < len(weights):
        with pytest.raises(ValueError, match="cap: expected at least"):
            cap_weights(weights, cap)
        return
    capped = cap_weights(weights, cap)
    assert capped.mean() == pytest.approx(1) and capped.max() <= cap * (1 + 1e-9)
    below = (capped < cap * (1 - 1e-9)) & (weights > 0)
    scales = capped[below] / weights[below]
    assert np.ptp(scales) <= 1e-9 * scales.max() if below.any() else True
    assert not below.any() or (weights[~below & (weights > 0)] * scales.max() >= cap * (1 - 1e-6)).all()


def test_column_ranges_and_labels():
    assert column([1, 5, 9.5, "x", None, True], {"..5": 1, "5..9": 1}) == [
        "..5",
        "5..9",
        "other",
        "x",
        "unknown",
        "true",
    ]
    assert column([3.0, 3, 0.5, False, ["a"]], {}) == ["3", "3", "0.5", "false", '["a"]']
    assert uniform_target(["a", "b", None, "a"]) == {"a": 0.5, "b": 0.5}


def test_sample_without_replacement_follows_the_weights():
    rows = example()
    weights = rake(rows, {"language": {"zh": 0.4, "en": 0.6}}).weights
    k = largest_sample(weights) - 1
    zh = np.array([value == "zh" for value in rows["language"]])
    drawn = [sample_without_replacement(weights, k, seed) for seed in range(40)]
    assert all(len(np.unique(indices)) == k == len(indices) for indices in drawn)
    expected = k * weights[zh].sum() / weights.sum()
    mean = np.mean([zh[indices].sum() for indices in drawn])
    assert mean == pytest.approx(expected, rel=0.02)  # classic reservoir keys miss by more than 10 %
    assert drawn[0].tolist() == sample_without_replacement(weights, k, 0).tolist() != drawn[1].tolist()


def test_sample_without_replacement_extremes():
    assert sample_without_replacement(np.ones(5), 5, 0).tolist() == [0, 1, 2, 3, 4]
    assert sample_without_replacement(np.ones(5), 0, 0).tolist() == []
    assert sample_without_replacement(np.array([0, 2, 0, 2, 0]), 2, 7).tolist() == [1, 3]
    assert sample_without_replacement(np.array([3, 1, 1, 1]), 2, 7)[0] == 0


@pytest.mark.parametrize(
    "weights, k, reason",
    [
        ([1, 1], 3, "k: expected 0 to 2 rows, got 3 of 2, where 2 have a weight"),
        (
            [4, 1, 1, 1, 1],
            3,
            "k: expected 0 to 2 rows, got 3 of 5, where the heaviest row, 2.5 times the mean, would repeat",
        ),
        ([1, 0, 1], 3, "k: expected 0 to 2 rows"),
        ([1, 1], -1, "k: expected 0 to 2"),
        ([0, 0], 1, "weights: expected"),
        ([1, -1], 1, "weights: expected"),
        ([1, float("inf")], 1, "weights: expected"),
    ],
)
def test_sample_without_replacement_refuses_repetition_and_bad_weights(weights, k, reason):
    with pytest.raises(ValueError, match=reason):
        sample_without_replacement(np.array(weights, float), k, 0)


def test_effective_sample_size():
    assert effective_sample_size(np.full(7, 3.0)) == pytest.approx(7)
    assert effective_sample_size(np.array([1, 0, 0])) == pytest.approx(1)
    assert effective_sample_size(np.array([2, 1, 1])) == pytest.approx(16 / 6)


def test_partition_covers_every_row_once_in_order():
    rows = [f"row{i:03}" for i in range(101)]
    shards = partition(rows, 4, 5)
    assert sorted(row for shard in shards for row in shard) == rows and sorted(map(len, shards)) == [25, 25, 25, 26]
    assert all(shard == sorted(shard) for shard in shards) and shards != partition(rows, 4, 6)
    assert shards == partition(rows, 4, 5) and shards[0] != rows[:26]
    for slices in (0, 102):
        with pytest.raises(ValueError, match="slices: expected 1 to 101"):
            partition(rows, slices, 0)


def test_seeded_draws_are_fixed_for_good_and_apart_from_numpy():
    assert seeded_order(6, 3, 1).tolist() == [4, 2, 5, 1, 3, 0]
    draws = seeded_uniform(20000, 0)
    assert draws.min() > 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws, np.random.default_rng(0).random(20000))[0, 1]) < 0.03

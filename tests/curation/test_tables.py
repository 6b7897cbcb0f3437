"""Tables of attribute values: bins, counts, contingency tables, Cramer's V."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.curation.tables import (
    REST,
    cluster_sizes,
    column_table,
    contingency,
    cramers_v,
    pair_tables,
    quantile_bins,
    value_label,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-50, 50)), max_size=60), st.integers(1, 6))
def test_quantile_bins_cover_every_value_once(values, bins):
    labels, ranges = quantile_bins(values, bins)
    by_label = {item.label: item for item in ranges}
    for value, label in zip(values, labels, strict=True):
        assert (label is None) == (value is None)
        assert value is None or by_label[label].low <= value <= by_label[label].high
    assert len(ranges) <= bins
    assert all(first.high < second.low for first, second in pairwise(ranges))


def test_quantile_bins_hold_equal_numbers_of_different_values():
    labels, ranges = quantile_bins(list(range(100)), 5)
    assert [labels.count(item.label) for item in ranges] == [20] * 5
    assert ranges[0].label == "0 to 19"


def test_column_table_counts_shares_and_missing():
    table = column_table(["a", "b", "a", None])
    assert table["kind"] == "categorical"
    assert table["values"] == [
        {"value": "a", "count": 2, "share": pytest.approx(2 / 3)},
        {"value": "b", "count": 1, "share": pytest.approx(1 / 3)},
    ]


def test_column_table_of_numbers_has_bins_and_summary():
    table = column_table([*range(1, 21), None])
    assert table["kind"] == "numeric" and sum(line["count"] for line in table["values"]) == 20
    assert table["summary"]["median"] == 10.5 and table["summary"]["max"] == 20
    assert [line["low"] for line in table["values"]] == [1, 5, 9, 13, 17]


def test_column_table_orders_small_numbers_by_value_and_names_booleans():
    assert [line["value"] for line in column_table([3, 1, 1, 10])["values"]] == ["1", "3", "10"]
    assert value_label(True) == "yes" and value_label(None) is None


def test_cluster_sizes_name_the_size_of_each_rows_cluster():
    assert cluster_sizes([7, 7, 1, None, *[5] * 6]) == ["2 rows", "2 rows", "alone", None, *["6 or more"] * 6]


def test_contingency_counts_pairs_and_skips_unknown():
    rows, columns, counts = contingency(["x", "y", "x", None, "x"], ["p", "q", "p", "p", None])
    assert (rows, columns) == (["x", "y"], ["p", "q"])
    assert counts.tolist() == [[2, 0], [0, 1]]


def test_cramers_v_is_one_for_a_function_and_near_zero_for_noise():
    assert cramers_v(np.diag([30, 20, 50])) == pytest.approx(1.0)
    drawn = np.random.default_rng(0).multinomial(5000, np.ones(24) / 24).reshape(4, 6)
    assert cramers_v(drawn) < 0.05
    assert cramers_v(np.array([[5, 7]])) == 0.0 and cramers_v(np.zeros((2, 2))) == 0.0


def test_cramers_v_by_hand():
    # chi2 = 20 of n = 80: phi2 = 0.25 - 1/79; both sizes 2 - 1/79.
    counts = np.array([[30, 10], [10, 30]])
    assert cramers_v(counts) == pytest.approx(((0.25 - 1 / 79) / (1 - 1 / 79)) ** 0.5)


def test_cramers_v_does_not_depend_on_order_or_transposition():
    counts = np.array([[30, 4, 9], [2, 25, 11]])
    assert cramers_v(counts.T) == pytest.approx(cramers_v(counts))
    assert cramers_v(counts[::-1][:, [2, 0, 1]]) == pytest.approx(cramers_v(counts))


def test_pair_tables_cover_varied_columns_and_group_rare_values():
    many = [f"v{i % 20}" for i in range(100)]
    pairs = pair_tables({"many": many, "half": [i % 2 for i in range(100)], "constant": ["c"] * 100})
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("many", "half")]
    assert len(pairs[0]["rows"]) == 12 and pairs[0]["rows"][-1] == REST
    assert np.sum(pairs[0]["counts"]) == pairs[0]["n"] == 100

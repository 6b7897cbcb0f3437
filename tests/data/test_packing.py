"""Packing: C++ equals the reference, respects the capacity, and is as tight as best fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.packing import bin_members, pack, pack_reference

CASES = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=200))
)


@settings(max_examples=50, deadline=None)
@given(CASES)
def test_pack_equals_reference_and_never_exceeds_capacity(case):
    capacity, lengths = case[0], np.array(case[1], np.int64)
    bins = pack(lengths, capacity)
    assert bins.dtype == np.int32 and np.array_equal(bins, pack_reference(lengths, capacity))
    assert (np.bincount(bins, lengths) <= capacity).all()
    assert set(bins.tolist()) == set(range(len(set(bins.tolist()))))


@pytest.mark.parametrize("capacity, count", [(64, 5000), (4096, 5000), (4097, 3001), (1 << 20, 2000), (1 << 40, 100)])
def test_pack_equals_reference_on_many_sequences(capacity, count):
    lengths = np.minimum(np.random.default_rng(1).lognormal(5, 1.2, count).astype(np.int64) + 1, capacity)
    bins = pack(lengths, capacity)
    assert np.array_equal(bins, pack_reference(lengths, capacity))
    assert (np.bincount(bins, lengths) <= capacity).all()


def test_pack_by_hand():
    # 7, 6, 5 open bins 0 1 2 of 10; 4 fits best in bin 1 (space 4); 3 in bin 0 (space 3); 3 in bin 2; 2 in bin 2.
    assert pack(np.array([3, 7, 5, 4, 6, 3, 2]), 10).tolist() == [0, 0, 2, 1, 1, 2, 2]


def test_pack_ties_go_to_the_bin_that_got_its_space_last():
    assert pack(np.array([6, 6, 4]), 10).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "lengths, capacity, reason",
    [
        ([3, 0, 9], 8, r"lengths\[1\]: expected 1 to 8 tokens, got 0 \(2 of 3"),
        ([3, 9], 8, r"lengths\[1\]: expected 1 to 8 tokens, got 9"),
        ([1.5], 8, "lengths: expected a 1-d array of integers, got 1-d float64"),
        ([[1]], 8, "lengths: expected a 1-d array of integers, got 2-d"),
        ([1], 0, "capacity: expected at least 1 token, got 0"),
    ],
)
def test_pack_refuses_bad_lengths(lengths, capacity, reason):
    for function in (pack, pack_reference):
        with pytest.raises(ValueError, match=reason):
            function(np.array(lengths), capacity)


def test_pack_takes_any_integer_type_and_strides():
    lengths = np.arange(1, 41, dtype=np.uint16)[::2]
    assert np.array_equal(pack(lengths, 50), pack(lengths.astype(np.int64), 50))
    assert pack(np.array([]), 5).shape == (0,)


def test_bin_members_lists_each_sequence_once():
    assert [members.tolist() for members in bin_members(np.array([1, 0, 1, 2, 0]))] == [[1, 4], [0, 2], [3]]
    assert bin_members(np.zeros(0, np.int32)) == []

"""Items on disk: by place, whatever order they came in; a full disk loses none that were kept."""

import random
import resource
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.runtime.spill import Spill

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(JSON, max_size=12), st.randoms())
def test_items_come_back_by_place(tmp_path_factory, items, rng):
    places = list(range(len(items)))
    rng.shuffle(places)
    spill = Spill(tmp_path_factory.mktemp("s") / "deep")
    for place in places:
        assert place not in spill
        spill.put(place, items[place])
        assert spill[place] == items[place] and place in spill
    assert list(spill) == items and len(spill) == len(items)


def test_texts_of_all_kinds_and_lengths(tmp_path):
    texts = ["", "\n", "a\u2028b\x85c\r\n", "\ud800", "é" * 5000, "x" * 100_000, "\0", "中" * 8191]
    spill = Spill(tmp_path, dump=lambda text: [text], load=lambda value: value[0])
    for text in texts:
        spill.append(text)
    assert list(spill) == texts and [spill[place] for place in range(len(texts))] == texts


def test_a_place_is_filled_once_and_empty_ones_are_left_out(tmp_path):
    spill = Spill(tmp_path)
    spill.put(4, "four")
    spill.put(1, "one")
    with pytest.raises(ValueError, match="expected an empty place, got 4"):
        spill.put(4, "again")
    with pytest.raises(ValueError, match="expected an empty place, got -1"):
        spill.put(-1, "no")
    spill.append("five")
    assert list(spill) == ["one", "four", "five"] and len(spill) == 6
    for place in (0, 6, -1):
        assert place not in spill
        with pytest.raises(IndexError, match="expected a place with an item"):
            spill[place]


def test_nothing_stays_in_the_folder(tmp_path):
    spill = Spill(tmp_path / "deep")
    spill.append(1)
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Spill(tmp_path / "file")


@contextmanager
def full_disk(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Catches: a line that was cut, and moves all that come after it.
def test_a_full_disk_names_the_folder_and_loses_nothing(tmp_path):
    spill = Spill(tmp_path / "run")
    spill.append("first")
    with full_disk(2000), pytest.raises(OSError, match=r"run: not written .*the same command goes on"):
        spill.append("x" * 5000)
    spill.append("y" * 5000)
    spill.append("last")
    assert list(spill) == ["first", "y" * 5000, "last"]


def test_many_items_in_any_order(tmp_path):
    places = list(range(5000))
    random.Random(0).shuffle(places)
    spill = Spill(tmp_path)
    for place in places:
        spill.put(place, {"n": place})
    assert [item["n"] for item in spill] == list(range(5000))

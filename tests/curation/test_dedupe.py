"""Duplicates: clusters equal those of all exact Jaccard indices, in any script, and numbers tell texts apart."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.curation.dedupe import (
    band_rows,
    exact_duplicates,
    minhash_signatures,
    near_duplicates,
    shingle_texts,
)
from wizard_engine.curation.words import words


def shingle_set(text, width):
    tokens = words(text, operators=True)
    return {tuple(tokens[i : i + width]) for i in range(max(1, len(tokens) - width + 1))} if tokens else set()


def non_words(text):
    return [token for token in words(text, operators=True) if not token[0].isalpha()]


def clusters_by_all_pairs(texts, threshold, width):
    """Connected components over every pair, by Python sets."""
    sets, cluster = [shingle_set(text, width) for text in texts], list(range(len(texts)))
    for j in range(len(texts)):
        for i in range(j):
            union = len(sets[i] | sets[j])
            similar = len(sets[i] & sets[j]) >= threshold * union if union else True
            if similar and non_words(texts[i]) == non_words(texts[j]):
                low, high = sorted((cluster[i], cluster[j]))
                cluster = [low if item == high else item for item in cluster]
    return cluster


def random_texts(seed, count, alphabet, join):
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        if texts and rng.random() < 0.6:
            tokens = list(texts[rng.integers(len(texts))])
            for _ in range(rng.integers(0, 3)):
                tokens[rng.integers(len(tokens))] = alphabet[rng.integers(len(alphabet))]
        else:
            tokens = [alphabet[i] for i in rng.integers(0, len(alphabet), rng.integers(1, 30))]
        texts.append(tokens)
    return [join.join(tokens) for tokens in texts]


ENGLISH = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "red",
    "big",
    "house",
    "tree",
    "and",
    "then",
    "3",
    "4.5",
    "17",
    "slowly",
    "home",
    "river",
    "stone",
]
CHINESE = list("我们你的是不了在人有大这中国来上个说时候三四学生老师")


@pytest.mark.parametrize("threshold, width", [(0.8, 3), (0.5, 3), (0.6, 1), (1.0, 2)])
@pytest.mark.parametrize("alphabet, join", [(ENGLISH, " "), (CHINESE, "")])
def test_near_duplicates_equals_all_pairs(alphabet, join, threshold, width):
    texts = random_texts(5, 150, alphabet, join)
    clusters = near_duplicates(texts, threshold=threshold, shingle=width)
    assert clusters.tolist() == clusters_by_all_pairs(texts, threshold, width)
    assert len(set(clusters.tolist())) < len(texts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=25), max_size=12))
def test_near_duplicates_any_unicode(texts):
    clusters = near_duplicates(texts, threshold=0.9)
    assert clusters.tolist() == clusters_by_all_pairs(texts, 0.9, 3)
    assert clusters.dtype == np.int64 and (clusters <= np.arange(len(texts))).all()


def test_near_duplicates_numbers_tell_texts_apart():
    story = (
        "Tom has {} apples and buys {} boxes of {} apples each at the market. How many apples does Tom have in the end?"
    )
    texts = [story.format(3, 4, 5), story.format(3, 4, 6), story.format(3, 4, 5).upper(), story.format(4, 3, 5)]
    assert near_duplicates(texts, threshold=0.4).tolist() == [0, 1, 0, 3]
    assert near_duplicates(texts, threshold=0.4, numbers_matter=False).tolist() == [0, 0, 0, 0]
    assert near_duplicates(["What is 3 + 4 ?", "what is 3+4", "What is 3 * 4?", "What is 3.4?"]).tolist() == [
        0,
        0,
        2,
        3,
    ]


def test_near_duplicates_one_changed_word_in_a_long_text():
    text = " ".join(f"{word}{tail}" for word in ["alpha", "beta", "gamma", "delta"] for tail in "abcdefghij")
    other = text.replace("gammae", "changed")
    assert near_duplicates([text, other]).tolist() == [0, 0]  # 35 of 41 shingles
    assert near_duplicates([text, other], threshold=0.87).tolist() == [0, 1]


def test_near_duplicates_blank_and_wordless_texts():
    assert near_duplicates(["", "  ", "???", "!!!", "???"]).tolist() == [0, 0, 2, 3, 2]
    assert near_duplicates([]).shape == (0,)


def test_exact_duplicates_points_at_the_first():
    assert exact_duplicates(["a", "b", "a ", "b", "a"]).tolist() == [0, 1, 2, 1, 0]
    assert exact_duplicates([]).dtype == np.int64


def test_near_duplicates_clusters_do_not_depend_on_the_order():
    texts = random_texts(7, 120, ENGLISH, " ")
    order = np.random.default_rng(0).permutation(len(texts))
    one, other = near_duplicates(texts, threshold=0.6), near_duplicates([texts[i] for i in order], threshold=0.6)
    assert np.array_equal(one[order][:, None] == one[order], other[:, None] == other)


def test_minhash_signatures_estimate_jaccard():
    rng = np.random.default_rng(3)
    vocabulary = [f"w{a}{b}" for a in "abcdefghijklmnopqrst" for b in "abcdefghij"]
    texts = [" ".join(rng.choice(vocabulary, 150)) for _ in range(30)]
    signatures = minhash_signatures(shingle_texts(texts, shingle=1), permutations=1024)
    sets = [shingle_set(text, 1) for text in texts]
    error = [
        (signatures[i] == signatures[j]).mean() - len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for i in range(30)
        for j in range(i)
    ]
    assert np.abs(np.mean(error)) < 0.005 and np.std(error) < 0.025  # binomial: 0.0156
    assert len({signatures[:, p].tobytes() for p in range(1024)}) == 1024


def test_shingle_texts_sizes_are_those_of_the_sets():
    texts = ["a b c d", "a b", "", "x y z x y z x y z"]
    shingles = shingle_texts(texts, shingle=3)
    assert np.diff(shingles.offsets).tolist() == [2, 1, 0, 3]
    assert shingles.hashes[3:].tolist() == sorted(set(shingles.hashes[3:].tolist()))


@pytest.mark.parametrize("threshold, permutations, rows", [(0.8, 128, 5), (0.5, 128, 2), (1.0, 128, 128), (0.1, 16, 1)])
def test_band_rows_is_the_most_that_keeps_the_recall(threshold, permutations, rows):
    assert band_rows(threshold, permutations) == rows
    chance = lambda r: 1 - (1 - threshold**r) ** (permutations // r)  # noqa: E731
    assert rows == 1 or chance(rows) >= 0.999
    assert rows == permutations or chance(rows + 1) < 0.999


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"threshold": 0}, "threshold: expected above 0"),
        ({"threshold": 1.1}, "threshold: expected above 0 and at most 1"),
        ({"shingle": 0}, "shingle: expected at least 1"),
        ({"permutations": 0}, "permutations: expected at least 1"),
    ],
)
def test_near_duplicates_refuses_bad_settings(options, reason):
    with pytest.raises(ValueError, match=reason):
        near_duplicates(["a"], **options)


def test_near_duplicates_many_short_texts_quickly():
    rng = np.random.default_rng(0)
    names = [f"n{'abcdefghij'[i % 10]}{'abcdefghij'[i // 10]}" for i in range(100)]
    story = "{} has {} apples. {} buys {} boxes with {} apples each. How many apples does {} have now?"
    texts = [
        story.format(a := names[rng.integers(100)], *rng.integers(1, 20, 1), a, *rng.integers(1, 20, 2), a)
        for _ in range(20000)
    ]
    start = time.process_time()
    near_duplicates(texts)
    assert time.process_time() - start < 5  # about 1 s on one slow core

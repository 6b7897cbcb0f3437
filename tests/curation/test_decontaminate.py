"""Decontamination: the n-gram search equals plain sets of word tuples, and says what matched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.curation.decontaminate import Match, contaminated
from wizard_engine.curation.words import words

QUESTION = "Tom has 12 apples. He buys 3 boxes with 4 apples each. How many apples does Tom have now?"
SENTENCES = st.lists(st.sampled_from(["a", "b", "c", "1", "2"]), max_size=9).map(" ".join)


def grams(text, n):
    tokens = words(text)
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(SENTENCES, max_size=12), st.lists(SENTENCES, max_size=6), st.integers(1, 4), st.sampled_from([0, 0.5, 1])
)
def test_contaminated_equals_sets_of_tuples(texts, evaluation, n, min_share):
    matches = contaminated(texts, evaluation, n=n, min_share=min_share)
    for text, match in zip(texts, matches, strict=True):
        shares = [len(grams(text, n) & grams(other, n)) / max(1, len(grams(other, n))) for other in evaluation]
        if words(text) and len(words(text)) < n:
            shares = [float(words(text) == words(other)) for other in evaluation]
        best = max(shares, default=0.0)
        assert bool(match) == (best > 0 and best >= min_share)
        if match:
            assert match.share == best and match.evaluation == shares.index(best)
            assert f" {match.ngram} " in f" {' '.join(words(text))} "
            assert len(match.ngram.split()) == min(n, len(words(text)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=5), st.lists(st.text(max_size=30), max_size=5))
def test_contaminated_any_unicode_finds_equal_texts(texts, evaluation):
    matches = contaminated(texts + evaluation, evaluation, n=5)
    assert len(matches) == len(texts) + len(evaluation)
    for text, match in zip(evaluation, matches[len(texts) :]):
        assert bool(match) == bool(words(text))


def test_contaminated_ignores_case_and_punctuation_but_not_numbers():
    texts = [
        f"Answer this: {QUESTION.upper().replace('.', ' !')}",
        QUESTION.replace("12", "13").replace("3 boxes", "5 boxes").replace("4", "6"),
        "Something else entirely, with as many words as it takes to hold a run of thirteen words.",
    ]
    matches = contaminated(texts, ["unrelated", QUESTION], n=13)
    assert [bool(match) for match in matches] == [True, False, False]
    assert matches[0] == Match(1, "tom has 12 apples he buys 3 boxes with 4 apples each how", 1.0)


def test_contaminated_short_texts_compare_whole():
    evaluation = ["Name three primary colours.", QUESTION]
    texts = [
        "name THREE primary colours",
        "Name three primary colours please",
        "How many apples does Tom have now?",
        "",
        "?",
    ]
    assert [bool(match) for match in contaminated(texts, evaluation)] == [True, False, False, False, False]
    assert contaminated(texts, evaluation)[0] == Match(0, "name three primary colours", 1.0)


def test_contaminated_does_not_join_words_across_texts():
    assert not any(contaminated(["a b c", "d e f"], ["b c d e"], n=4))
    assert not any(contaminated(["a b c d"], ["a b", "c d"], n=4))


def test_contaminated_chinese_characters_are_words():
    matches = contaminated(["请问：泰姬陵的建筑风格是怎样的呢？", "长城有多长"], ["泰姬陵的建筑风格是怎样的"], n=8)
    assert [bool(match) for match in matches] == [True, False]


def test_contaminated_min_share_spares_a_common_phrase():
    text = "a b c d e f g h other words follow here"
    evaluation = ["a b c d e f g h " + " ".join(f"x{i}" for i in "ijklmnopqrstuvwxyz")]
    assert contaminated([text], evaluation, n=8)[0].share == pytest.approx(1 / 19)
    assert not contaminated([text], evaluation, n=8, min_share=0.1)[0]


@pytest.mark.parametrize(
    "options, reason", [({"n": 0}, "n: expected"), ({"min_share": 1.5}, "min_share: expected 0 to 1")]
)
def test_contaminated_refuses_bad_settings(options, reason):
    with pytest.raises(ValueError, match=reason):
        contaminated(["a"], ["b"], **options)


def test_contaminated_gsm8k_train_against_test(shared_data):
    from wizard_engine.data.records import read_prompts

    train, test = (read_prompts(shared_data / f"gsm8k/{name}.jsonl") for name in ("train", "test"))
    held_out = {n: {gram for text in test for gram in grams(text, n)} for n in (13, 8)}
    for n, most in ((13, 20), (8, 200)):
        matches = contaminated(train, test, n=n)
        assert [bool(match) for match in matches] == [not held_out[n].isdisjoint(grams(text, n)) for text in train]
        assert 1 <= np.count_nonzero(matches) <= most

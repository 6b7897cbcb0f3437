"""The natural corpus, held-out rows, plain text and two-turn questions."""

import re
import time
from collections import Counter

import pytest

from wizard_engine.data.records import Conversation
from wizard_engine.world import vocabulary as words
from wizard_engine.world.corpus import OPERATIONS, held_out, mt_questions, natural_corpus, plain_text
from wizard_engine.world.parse import parse, parse_turns
from wizard_engine.world.problems import Problem
from wizard_engine.world.solve import check_answer, label_steps


@pytest.fixture(scope="module")
def corpus() -> list[Conversation]:
    return natural_corpus(5000, seed=3)


@pytest.fixture(scope="module")
def evaluation() -> list[Conversation]:
    return held_out(800, seed=3)


def asked(row: Conversation) -> list[Problem | None]:
    turns = [message.content for message in row.messages if message.role == "user"]
    return [parse_turns(turns[: i + 1]) for i in range(len(turns))]


def test_corpus_has_the_stated_mixture(corpus: list[Conversation]):
    truth = [row.attributes["world"] for row in corpus]
    styles = Counter(each["style"] for each in truth)
    expected = {"good": 35, "terse": 25, "careless": 12, "wrong": 8, "rambling": 15, "refusal": 2, "vague": 3}
    assert all(abs(100 * styles[style] / len(corpus) - share) < 2.5 for style, share in expected.items())
    sizes = Counter(each["operations"] for each in truth)
    assert all(abs(sizes[size] / len(corpus) - share) < 0.025 for size, share in OPERATIONS.items())
    topics = Counter(each["topic"] for each in truth)
    assert 0.36 < topics["market"] / len(corpus) < 0.44 and topics["garden"] < topics["farm"] < topics["school"]
    assert 0.08 < sum(each["language"] == "es" for each in truth) / len(corpus) < 0.12
    assert 0.06 < sum(len(row.messages) == 4 for row in corpus) / len(corpus) < 0.10
    copies = Counter(each["copy"] for each in truth)
    assert 0.03 < copies["exact"] / len(corpus) < 0.06 and 0.04 < copies["near"] / len(corpus) < 0.08
    known = sum("topic" in row.attributes for row in corpus) / len(corpus)
    assert 0.66 < known < 0.74 and all("source" in row.attributes for row in corpus)


def test_corpus_sources_differ_in_quality(corpus: list[Conversation]):
    good = {
        source: [row.attributes["world"]["style"] == "good" for row in corpus if row.attributes["source"] == source]
        for source in ("textbook", "forum", "chat_log", "exam")
    }
    share = {source: sum(flags) / len(flags) for source, flags in good.items()}
    assert share["textbook"] > share["exam"] > share["forum"] > share["chat_log"]
    rude = {word.split()[-1].strip(".") for word in words.RUDE["en"]}
    sources = Counter(
        row.attributes["source"] for row in corpus if any(word in row.messages[0].content for word in rude)
    )
    assert sources["chat_log"] > sources["forum"] > 0 and sources["textbook"] == sources["exam"] == 0


def test_corpus_rows_parse_to_their_keys_and_are_never_held_out(corpus: list[Conversation]):
    for row in corpus:
        problems = asked(row)
        assert [problem.key for problem in problems] == row.attributes["world"]["keys"]
        assert not any(problem.is_held_out for problem in problems)


def test_corpus_styles_are_what_they_say(corpus: list[Conversation]):
    for row in corpus:
        style = row.attributes["world"]["style"]
        if style == "vague":
            assert asked(row)[0].is_vague
            continue
        answers = [message.content for message in row.messages if message.role == "assistant"]
        for problem, answer in zip(asked(row), answers, strict=True):
            labels = label_steps(problem, answer.split("\n"))
            assert (min(labels) == 1) == (style in ("good", "terse"))
            assert (-1 in labels) == (style in ("careless", "wrong"))
            assert style not in ("good", "terse", "rambling") or check_answer(problem, answer)


def test_corpus_copies_repeat_an_earlier_row(corpus: list[Conversation]):
    ids, skeletons = set(), set()
    for row in corpus:
        copy = row.attributes["world"]["copy"]
        skeleton = tuple(problem.skeleton for problem in asked(row))
        assert copy != "exact" or row.id in ids
        assert copy != "near" or skeleton in skeletons
        ids.add(row.id)
        skeletons.add(skeleton)


def test_corpus_is_a_function_of_its_seed(corpus: list[Conversation]):
    assert natural_corpus(50, seed=3) == corpus[:50]
    assert natural_corpus(50, seed=4) != corpus[:50]
    assert corpus[0].id == natural_corpus(1, seed=3)[0].id


def test_held_out_is_balanced_unique_and_reserved(evaluation: list[Conversation]):
    problems = [asked(row)[0] for row in evaluation]
    assert all(problem.is_held_out for problem in problems)
    assert len({problem.key for problem in problems}) == len(problems)
    assert set(Counter(problem.topic for problem in problems).values()) == {100}
    sizes = Counter(problem.operations for problem in problems)
    assert all(abs(sizes[size] / 800 - share) < 0.06 for size, share in {1: 0.2, 2: 0.3, 3: 0.3, 4: 0.2}.items())
    assert 0.15 < sum(problem.language == "es" for problem in problems) / 800 < 0.25
    for row, problem in zip(evaluation, problems, strict=True):
        assert len(row.messages) == 2
        assert label_steps(problem, row.answer.split("\n")) == [1] * (problem.operations + 1)


def test_held_out_skeletons_never_occur_in_training_text(corpus: list[Conversation], evaluation: list[Conversation]):
    reserved = {asked(row)[0].skeleton for row in evaluation}
    assert not reserved & {problem.skeleton for row in corpus for problem in asked(row)}


def test_plain_text_mixes_right_arithmetic_and_stories():
    documents = plain_text(2000, seed=1)
    stories = [document for document in documents if "\n" in document]
    assert 0.45 < len(stories) / len(documents) < 0.55
    for story in stories:
        problem = parse(story.split("\n")[0])
        assert problem is not None and not problem.is_held_out
    for document in documents:
        if "\n" not in document:
            for left, operation, right, result in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\.", document):
                expected = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
                assert int(result) == expected.get(operation, int(left) / int(right))
    assert not any("USER" in document for document in documents)


def test_mt_questions_have_two_held_out_turns_with_right_references():
    questions = mt_questions()
    assert len(questions) == 80 and set(Counter(question.category for question in questions).values()) == {10}
    for question in questions:
        first, second = parse(question.turns[0]), parse_turns(question.turns)
        assert first.is_held_out and second.is_held_out and first != second
        assert check_answer(first, question.references[0]) and check_answer(second, question.references[1])


def test_language_is_small(corpus: list[Conversation]):
    vocabulary = {
        word for row in corpus for message in row.messages for word in re.findall(r"[^\W\d]+", message.content)
    }
    assert 250 < len(vocabulary) < 400
    lengths = sorted(len(re.findall(r"\d|\w+|[^\w\s]", row.messages[0].content)) for row in corpus)
    assert lengths[len(lengths) // 50] >= 15 and lengths[-len(lengths) // 50] <= 45


def test_corpus_is_fast():
    start = time.process_time()
    natural_corpus(2000, seed=9)
    assert time.process_time() - start < 5 * 3 * 2000 / 20_000

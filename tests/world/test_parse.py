"""Texts of problems: parse is the inverse of render, and knows what no template produced."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.world import vocabulary as words
from wizard_engine.world.corpus import make_vague
from wizard_engine.world.parse import follow_up_indices, parse, parse_follow_up, parse_turns
from wizard_engine.world.problems import Problem, Quantity, Statement, random_problem
from wizard_engine.world.render import render, render_follow_up

from .drawn import problems, seeds

TOM = Problem(
    "en",
    "apples",
    "Tom",
    None,
    (Statement("start", Quantity(12)), Statement("gain", Quantity(3, 4)), Statement("lose", Quantity(5))),
    "has",
)
TOM_TEXT = "Tom has 12 apples. He buys 3 bags with 4 apples each. He sells 5. How many apples does Tom have now?"


def test_render_writes_the_expected_text():
    assert render(TOM) == TOM_TEXT
    spanish = "Tom tiene 12 manzanas. Compra 3 bolsas de 4 manzanas. Vende 5. ¿Cuántas manzanas tiene Tom ahora?"
    assert render(TOM.changed(language="es")) == spanish


@given(problem=problems(), phrasing=st.sampled_from((0, 1, 2)), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_parse_inverts_render(problem: Problem, phrasing: int, seed: int):
    assert parse(render(problem, phrasing)) == problem
    assert parse(render(problem, random.Random(seed))) == problem


def test_parse_inverts_render_for_every_kind_phrasing_and_topic():
    rng = random.Random(1)
    seen = set()
    for topic in words.TOPICS:
        for language in words.LANGUAGES:
            for i in range(60):
                person = words.SOMEONE if i % 6 == 0 else None
                problem = random_problem(rng, operations=1 + i % 4, language=language, topic=topic, person=person)
                for phrasing in range(words.PHRASINGS):
                    assert parse(render(problem, phrasing)) == problem
                seen |= {(language, kind, amount.each is None) for kind, amount in problem.statements}
                seen.add((language, problem.question))
    boxed = sum(len(entry) == 3 and not entry[2] for entry in seen)
    assert boxed == 8 and len(seen) == 2 * (9 + 4 + 4)


@given(problem=problems(), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_parse_recognises_vague_problems(problem: Problem, seed: int):
    vague = make_vague(problem, random.Random(seed))
    parsed = parse(render(vague, random.Random(seed)))
    assert parsed == vague
    assert parsed.defect == "vague" and not parsed.is_held_out


@given(problem=problems(), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_follow_up_changes_one_statement(problem: Problem, seed: int):
    rng = random.Random(seed)
    for index in follow_up_indices(problem):
        kind, amount = problem.statements[index]
        statements = list(problem.statements)
        statements[index] = Statement(kind, Quantity(rng.randint(2, 20), amount.each))
        changed = problem.changed(statements=tuple(statements))
        text = render_follow_up(changed, index, rng)
        assert parse(text) is None
        assert parse_follow_up(problem, text) == changed
        assert parse_turns([render(problem, rng), text]) == changed


@pytest.mark.parametrize("text", words.POLITE["en"] + words.RUDE["en"])
def test_parse_skips_chatter(text: str):
    assert parse(f"{text} {TOM_TEXT}") == TOM
    assert parse(f"{TOM_TEXT} {text}") == TOM


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "#",
        "Tom has # apples. How many apples does Tom have now?",
        "Tom has 12 apples.",
        "How many apples does Tom have now?",
        TOM_TEXT + " Why",
        TOM_TEXT.replace("buys", "eats"),
        TOM_TEXT.replace("He sells", "She sells"),
        TOM_TEXT.replace("4 apples", "4 pears"),
        TOM_TEXT.replace("4 apples", "4 hats"),
        TOM_TEXT.replace("does Tom", "does Ana"),
        TOM_TEXT.replace("He sells 5.", "Vende 5."),
        TOM_TEXT.replace("He sells 5.", "He sells 5.."),
        TOM_TEXT.replace("12", "1234567"),
        "#Rewritten Prompt#: " + TOM_TEXT,
        TOM_TEXT + " " + TOM_TEXT,
        "Suppose instead that Tom sells 7 of them. How many apples does Tom have now?",
        "Ana has 5 more apples than Tom. How many apples does Ana have now?",
        "Write a poem about spring.",
        "Tom tiene algunos manzanas. ¿Cuántas manzanas tiene Tom ahora?",
    ],
)
def test_parse_refuses_what_no_template_produces(text: str):
    assert parse(text) is None


@given(text=st.text(alphabet=st.sampled_from("TomAn has12 3aples.?¿#@~\n"), max_size=80))
@settings(max_examples=50, deadline=None)
def test_parse_never_fails_on_free_text(text: str):
    assert parse(text) is None or isinstance(parse(text), Problem)


@given(problem=problems(), cut=st.integers(0, 400), piece=st.sampled_from(["", " ", "#", "7", "Ana", "more", "."]))
@settings(max_examples=50, deadline=None)
def test_parse_of_damaged_text_is_a_problem_that_renders_back_or_none(problem: Problem, cut: int, piece: str):
    text = render(problem, 1)
    damaged = text[: cut % len(text)] + piece + text[cut % len(text) + 1 :]
    parsed = parse(damaged)
    assert parsed is None or parsed.is_well_formed()


def test_parse_and_generation_are_fast():
    rng = random.Random(0)
    start = time.process_time()
    made = [random_problem(rng, operations=1 + i % 4) for i in range(4000)]
    texts = [render(problem, rng) for problem in made]
    generated = time.process_time()
    parsed = [parse(text) for text in texts]
    assert parsed == made
    assert generated - start < 5 * 3 * 4000 / 20_000
    assert time.process_time() - generated < 5 * 2 * 4000 / 20_000


# Catches: a search that reads to the end of the text for each of its words.
@pytest.mark.parametrize(
    "text", ["x", "two three ", "Tom has 3 apples ", "7", "a\n", "é", "[[", ". ", " ", "Tom? ", "¿"]
)
def test_long_texts_are_read_in_time_that_grows_as_they_do(text):
    start = time.process_time()
    parse(text * (300_000 // len(text)))
    assert time.process_time() - start < 2

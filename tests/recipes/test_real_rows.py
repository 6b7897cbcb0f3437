"""The texts of the real run: every answer is what it should be, and held-out rows are no training rows."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from wizard_engine.curation.selection import remove_duplicates, select
from wizard_engine.data.equations import equation_holds
from wizard_engine.data.final_answers import extract_answer
from wizard_engine.data.records import read_rows, user_text
from wizard_engine.data.solution_steps import step_texts
from wizard_engine.evaluation.questions import read_questions

FOLDER = Path(__file__).parents[2] / "recipes" / "runs" / "real"
EQUATION = re.compile(r"(?:[^=:]*: )?([\d(][\d ()+*/-]* = \d+)")
FINAL = re.compile(r"(?:The answer is|La respuesta es) (\d+)\.")


def lines(name):
    with (FOLDER / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


ROWS, HELD_OUT, REPLIES = lines("rows.jsonl"), lines("held_out.jsonl"), lines("replies.jsonl")


def said(task):
    return {line.get("instruction"): line["reply"] for line in REPLIES if line["task"] == task}


# What a row should say: where its own answer is the result alone, the teacher's rewrite of it.
WORKED = [row | {"output": said("rewrite").get(row["instruction"], row["output"])} for row in ROWS]


def check_answer(text):
    """Every step is an equation that holds, the last line says its result; returns the number of equations."""
    *steps, final = step_texts(text)
    equations = [EQUATION.fullmatch(step) for step in steps]
    assert all(equations), text
    assert all(equation_holds(match[1]) for match in equations), text
    result = equations[-1][1].rpartition("= ")[2]
    assert FINAL.fullmatch(final)[1] == result, text
    assert extract_answer(text) == int(result), text
    return len(equations)


@pytest.mark.parametrize("rows, count", [(WORKED, 400), (HELD_OUT, 240)], ids=["rows", "held_out"])
def test_answers_are_equations_that_hold_and_end_with_the_result(rows, count):
    steps = Counter(check_answer(row["output"]) for row in rows)
    assert len(rows) == count and set(steps) == {1, 2, 3} and min(steps.values()) >= count // 3
    spanish = sum("La respuesta es" in row["output"] for row in rows)
    assert 0.08 * count <= spanish <= 0.12 * count


def test_rows_are_mixed_and_few_share_their_words():
    for rows in (WORKED, HELD_OUT):
        assert len({row["instruction"] for row in rows}) == len(rows)
        words = Counter(re.sub(r"\d+", "0", row["instruction"]) for row in rows)
        assert max(words.values()) <= 4
        steps = [check_answer(row["output"]) for row in rows]
        assert all(len(set(steps[start : start + 12])) == 3 for start in range(0, len(steps), 12))


def test_no_held_out_row_repeats_a_training_row():
    rows, held_out = read_rows(FOLDER / "rows.jsonl"), read_rows(FOLDER / "held_out.jsonl")
    selection = select(rows, [user_text(row) for row in held_out])
    assert selection.removed == [] and len(selection.slices[0]) == 400
    both = remove_duplicates([*rows, *held_out])
    assert both.removed == []
    evolved = [line["reply"] for line in REPLIES if line["task"] == "evolve"]
    own = {re.sub(r"\W+", " ", row["instruction"]).casefold() for row in HELD_OUT}
    assert not own & {re.sub(r"\W+", " ", text).casefold() for text in evolved}


def test_replies_are_about_rows_or_their_evolved_instructions():
    own = {row["instruction"] for row in ROWS}
    evolved, answers, rewrites, ranks = said("evolve"), said("answer"), said("rewrite"), said("rank")
    assert set(evolved) <= own and len(evolved) == 250
    assert set(answers) == {*evolved.values(), *own} and not set(evolved.values()) & own
    assert set(rewrites) <= own and len(rewrites) == 90
    assert set(ranks) == {*evolved, *evolved.values()} and said("compare") == {None: "Not Equal"}
    assert len(REPLIES) == len({(line["task"], line.get("instruction")) for line in REPLIES})
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.suffix != ".toml") < 530_000


def test_replies_hold_and_evolved_instructions_are_harder():
    outputs, answers, ranks = {row["instruction"]: row["output"] for row in WORKED}, said("answer"), said("rank")
    harder = 0
    for instruction, evolved in said("evolve").items():
        harder += check_answer(answers[evolved]) > check_answer(outputs[instruction])
        assert 4 <= float(ranks[instruction]) < float(ranks[evolved]) <= 9
    assert harder >= 240


def test_rewritten_rows_gave_the_result_alone():
    rewrites, short = said("rewrite"), {row["instruction"]: row["output"] for row in ROWS if "\n" not in row["output"]}
    assert set(short) == set(rewrites)
    for instruction, output in short.items():
        assert int(FINAL.fullmatch(output)[1]) == extract_answer(rewrites[instruction])


def test_held_out_pairs_are_a_right_answer_and_a_wrong_one():
    pairs = lines("held_out_pairs.jsonl")
    assert [(pair["instruction"], pair["chosen"]) for pair in pairs] == [
        (row["instruction"], row["output"]) for row in HELD_OUT[:200]
    ]
    slips = 0
    for pair in pairs:
        *steps, final = step_texts(pair["rejected"])
        claimed = EQUATION.fullmatch(steps[-1])[1].rpartition("= ")[2]
        assert FINAL.fullmatch(final)[1] == claimed and int(claimed) != extract_answer(pair["chosen"])
        slips += not all(equation_holds(EQUATION.fullmatch(step)[1]) for step in steps)
    assert len(pairs) == 200 and slips == 95


def test_questions_have_two_turns():
    questions = read_questions(FOLDER / "questions.jsonl")
    assert len({question.id for question in questions}) == len(questions) == 24
    assert len({question.category for question in questions}) >= 7
    assert sum(bool(question.references) for question in questions) >= 16

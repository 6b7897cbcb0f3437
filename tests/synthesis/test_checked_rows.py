"""Rows with answers that can be checked, through the recipes: reference and scripted agents, nothing of the world."""

import json

import pytest

from recipes import analyze, arena, co_teach, evol_answer, self_teach
from wizard_engine.agents import Ledger
from wizard_engine.data.records import conversation, read_rows, write_rows

SUMS = [(number + 2, 3 * number + 1) for number in range(10)]


def question(a, b):
    return f"A case holds {a} red and {b} blue pens. How many pens does it hold?"


def worked(a, b, off=0, note=""):
    return f"{note}{a} + {b} = {a + b + off}\nThe answer is {a + b + off}."


def good(a, b):
    return f"The case holds both kinds of pens.\n{worked(a, b)}"


def wrong(a, b):
    return f"The answer is {a * b + 100}."


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, [conversation(question(*pair), str(sum(pair))) for pair in SUMS])
    return path


def script(path, **tasks):
    """A file of replies: task -> functions of a pair of numbers, each a reply to its question."""
    lines = [
        {"task": task, "instruction": question(*pair), "reply": reply(*pair)}
        for task, writers in tasks.items()
        for pair in SUMS
        for reply in writers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return f"scripted:{path}"


def asked_agents(out):
    ledger = Ledger(out / "ledger.sqlite", read_only=True)
    try:
        return set(ledger.counts())
    finally:
        ledger.close()


def answered(out, rows, rewriter, **options):
    agents = evol_answer.Agents(rewriter=rewriter, judge="reference:judge")
    return evol_answer.Config(data=(rows,), out=out, agents=agents, rounds=1, quiet=True, **options)


def test_a_rewrite_with_another_result_is_never_taken_and_a_better_one_is(rows, tmp_path):
    cases = [("wrong", [wrong], 0), ("good", [good], 10)]
    for name, writers, changed in cases:
        out = tmp_path / name
        rewriter = script(tmp_path / f"{name}.jsonl", rewrite=writers)
        report = evol_answer.main(answered(out, rows, rewriter, references="answers"))
        assert report["rows_changed"] == changed
        assert asked_agents(out) == {"reference:judge", "scripted:" + "/".join((tmp_path / f"{name}.jsonl").parts[-3:])}
    made = read_rows(out / "rows.jsonl", kind="conversation")
    assert [row.attributes["reference"] for row in made] == [str(sum(pair)) for pair in SUMS]
    evol_answer.main(answered(out, rows, rewriter, references="answers"))
    script(tmp_path / "good.jsonl", rewrite=[worked])
    with pytest.raises(ValueError, match=r"agents\.rewriter"):
        evol_answer.main(answered(out, rows, rewriter, references="answers"))


def test_without_references_the_stage_ends_and_says_what_to_give(rows, tmp_path):
    rewriter = script(tmp_path / "good.jsonl", rewrite=[good])
    with pytest.raises(ValueError, match=r"'judge'.* got 20 of 20 \(no reference 20\); .*--references answers"):
        evol_answer.main(answered(tmp_path / "out", rows, rewriter))


def test_agents_of_the_world_end_it_too(rows, tmp_path):
    with pytest.raises(ValueError, match=r"'rewrite'.* \(not of this world 10\); name a reference: or scripted: agent"):
        evol_answer.main(evol_answer.Config(data=(rows,), out=tmp_path / "out", rounds=1, quiet=True))


def test_samples_are_rated_and_their_steps_labelled_by_the_reference(rows, tmp_path):
    student = script(tmp_path / "student.jsonl", answer=[worked, wrong, lambda a, b: worked(a, b, 1)])
    agents = self_teach.Agents(student, "reference:judge", labeller="reference:labeller")
    cfg = self_teach.Config(
        data=(rows,), out=tmp_path / "out", agents=agents, references="answers", quiet=True, keep=1.0
    )
    self_teach.main(cfg)
    pairs = read_rows(tmp_path / "out" / "preferences.jsonl", kind="preference")
    assert pairs and not any("world" in name for name in asked_agents(tmp_path / "out"))
    right = {worked(*pair) for pair in SUMS}
    assert all(pair.rejected not in right and pair.attributes["reference"] for pair in pairs)
    assert sum(pair.chosen in right for pair in pairs) > len(pairs) / 2
    for row in read_rows(tmp_path / "out" / "processes.jsonl", kind="process"):
        assert row.labels == ((1, 1) if row.answer in right else (-1, -1) if len(row.steps) == 2 else (-1,))


def test_battles_are_judged_and_lessons_suggested_by_the_reference(rows, tmp_path):
    ours, rival = (
        script(tmp_path / "o.jsonl", answer=[wrong]),
        script(tmp_path / "r.jsonl", answer=[worked], rewrite=[good]),
    )
    agents = co_teach.Agents(ours, (rival,), ("reference:judge",), suggester="reference:judge", user=None)
    cfg = co_teach.Config(data=(rows,), out=tmp_path / "out", agents=agents, references="answers", quiet=True)
    report = co_teach.main(cfg)
    assert (
        report["selected"]["lessons"]
        == report["rivals"]["scripted:" + "/".join((tmp_path / "r.jsonl").parts[-3:])]["losses"]
        == 10
    )
    lessons = read_rows(tmp_path / "out" / "sft.jsonl", kind="conversation")
    assert {row.answer for row in lessons} == {worked(*pair) for pair in SUMS}


def test_an_arena_is_judged_by_the_reference(rows, tmp_path):
    models = {
        "right": script(tmp_path / "r.jsonl", answer=[worked]),
        "wrong": script(tmp_path / "w.jsonl", answer=[wrong]),
    }
    specs = tuple(f"{name}={spec}" for name, spec in models.items())
    common = {"models": specs, "prompts": rows, "judge": ("reference:judge",), "quiet": True}
    report = arena.main(arena.Config(out=tmp_path / "out", references="answers", **common))
    (result,) = report["pairwise"]
    assert (result["a"], result["wins"], result["losses"]) == ("wrong", 0, 10)
    with pytest.raises(ValueError, match=r"verdicts of reference:judge .*\(no reference 10\).*--references answers"):
        arena.main(arena.Config(out=tmp_path / "bare", **common))


def test_an_analysis_keeps_the_rows_own_answers_as_references(rows, tmp_path):
    analyze.main(analyze.Config(data=(rows,), out=tmp_path, references="answers", quiet=True))
    kept = read_rows(tmp_path / "rows.jsonl")
    assert [row.attributes["reference"] for row in kept] == [row.answer for row in read_rows(rows)]
    analyze.main(analyze.Config(data=(rows,), out=tmp_path, quiet=True, overwrite=True))
    assert not any("reference" in row.attributes for row in read_rows(tmp_path / "rows.jsonl"))

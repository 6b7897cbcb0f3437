"""Arena and two-turn recipes in process, on the embedded world's programs."""

import json
import sys
from pathlib import Path

import pytest

from recipes import accuracy, arena
from recipes import mt_bench as bench
from wizard_engine import world
from wizard_engine.data.records import conversation, write_rows
from wizard_engine.evaluation.answers import read_answers
from wizard_engine.runtime.files import file_hash

sys.path.append(str(Path(__file__).parents[1] / "agents"))
from fake_endpoint import Fake, answer


def scripted(tmp_path, **replies):
    """An agent that says the same to every request of a task."""
    lines = [json.dumps({"task": task, "reply": reply}) for task, reply in replies.items()]
    (tmp_path / "replies").write_text("\n".join(lines), encoding="utf-8")
    return f"scripted:{tmp_path / 'replies'}"


def _arena(tmp_path, name="arena", **options):
    defaults = {"models": ("good=world:expert", "bad=world:terse"), "out": tmp_path / name, "n": 24, "quiet": True}
    return arena.Config(**{**defaults, **options})


def test_arena_ranks_programs_and_is_skipped_when_current(tmp_path):
    config = _arena(tmp_path)
    report = arena.main(config)
    (pair,) = report["pairwise"]
    assert (pair["a"], pair["b"]) == ("bad", "good") and pair["losses"] > pair["wins"]
    assert pair["wins"] + pair["losses"] + pair["ties"] + pair["errors"] == 24
    assert [rating["model"] for rating in report["elo"]] == ["good", "bad"] and report["elo"][0]["elo"] == 1000
    battles = [json.loads(line) for line in (tmp_path / "arena" / "battles.jsonl").read_text().splitlines()]
    assert sum(battle["score"] == 0.0 for battle in battles) == pair["losses"]
    written = (tmp_path / "arena" / "arena.json").stat().st_mtime_ns
    assert arena.main(config) == report == json.loads((tmp_path / "arena" / "arena.json").read_text())
    assert (tmp_path / "arena" / "arena.json").stat().st_mtime_ns == written


# Catches: an arena whose answers and report are lost because no verdict of its judge can be read.
def test_arena_ends_with_its_answers_where_no_verdict_can_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Fake(lambda body, _: answer("Both are very nice.")) as endpoint:
        config = _arena(tmp_path, n=5, judge=(f"openai:judge@{endpoint.url}",), max_missing=1.0, quiet=False)
        report = arena.main(config)
        asked = len(endpoint.asked)
        assert arena.main(config) == report and len(endpoint.asked) == asked > 0
        limited = _arena(tmp_path, "limited", n=5, judge=config.judge)
        with pytest.raises(
            ValueError, match=r"verdicts of openai:judge@.*at most 5 % missing, got 5 of 5 \(unreadable 5"
        ):
            arena.main(limited)
    (pair,) = report["pairwise"]
    assert (pair["errors"], pair["win_rate"], pair["missing"]) == (5, None, {"judge: unreadable": 5})
    assert report["elo"] == [] and report["unrated"] == ["good", "bad"]
    for out in (config.out, limited.out):
        assert len((out / "answers" / "good.jsonl").read_text().splitlines()) == 5
        assert json.loads((out / "arena.json").read_text())["unrated"] == ["good", "bad"]
        battles = [json.loads(line) for line in (out / "battles.jsonl").read_text().splitlines()]
        assert len(battles) == 5 and all("unreadable" in error for line in battles for error in line["errors"])
    assert (config.out / "stage.json").exists() and not (limited.out / "stage.json").exists()
    assert "bad  no rating: no verdict connects it with the anchor" in capsys.readouterr().out


# Catches: a rating of a model that met nobody, or an error because of it.
def test_models_without_a_verdict_stand_apart_from_the_ratings(tmp_path):
    models = ("good=world:expert", "bad=world:terse", "mute=" + scripted(tmp_path, judge="[[1]] [[2]]"))
    report = arena.main(_arena(tmp_path, models=models, n=8, max_missing=1.0))
    assert {rating["model"] for rating in report["elo"]} == {"good", "bad"} and report["unrated"] == ["mute"]
    alone = arena.main(_arena(tmp_path, "alone", models=models, n=8, max_missing=1.0, anchor="mute"))
    assert alone["elo"] == [] and alone["unrated"] == ["good", "bad", "mute"]


# Of the files that the recipes wrote when calls went in blocks.
WRITTEN = {
    "a/battles.jsonl": "77d0f58775866312",
    "a/answers/mid.jsonl": "63d6fbb5aa9b2841",
    "m/ratings.jsonl": "5dffc51f5e8d32fe",
    "m/answers.jsonl": "50f7c69074545679",
}


def test_files_of_the_worlds_programs_are_those_of_calls_in_blocks(tmp_path):
    models = ("good=world:expert", "bad=world:terse", "mid=world:careless")
    arena.main(arena.Config(models=models, out=tmp_path / "a", n=24, quiet=True))
    bench.main(bench.Config(model="world:careless", out=tmp_path / "m", n=16, quiet=True))
    assert {name: file_hash(tmp_path / name)[:16] for name in WRITTEN} == WRITTEN


def test_arena_repeats_no_call_of_an_interrupted_run(tmp_path, monkeypatch):
    config = _arena(tmp_path)
    arena.main(config)
    (tmp_path / "arena" / "stage.json").unlink()
    asked = []
    judge = type(world.program("world:judge"))
    respond = judge.respond
    monkeypatch.setattr(judge, "respond", lambda self, requests: asked.extend(requests) or respond(self, requests))
    arena.main(config)
    assert asked == []


def test_arena_takes_answer_files_in_any_order_and_prompts_from_a_file(tmp_path):
    rows = world.held_out(12, seed=4)
    write_rows(tmp_path / "prompts.jsonl", rows)
    right, wrong = tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"
    lines = [json.dumps({"id": row.id, "answer": row.answer}) for row in rows]
    right.write_text("\n".join(reversed(lines)))
    wrong.write_text("\n".join(json.dumps({"prompt": row.instruction, "greedy": "The answer is 0."}) for row in rows))
    models = (f"wrong={wrong}#greedy", f"right={right}")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"broken\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:13: json: "):
        arena.main(_arena(tmp_path, models=models, prompts=tmp_path / "prompts.jsonl"))
    report = arena.main(_arena(tmp_path, models=models, prompts=tmp_path / "prompts.jsonl", on_error="skip"))
    assert report["prompts"] == 12 and report["pairwise"][0]["wins"] >= 11


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("a=world:expert",), "at least two"),
        (("a=world:expert", "a=world:terse"), "NAME=SPEC with different names"),
        (("world:expert", "b=world:terse"), "NAME=SPEC"),
        (("a=world:exprt", "b=world:terse"), "did you mean 'world:expert'"),
    ],
)
def test_arena_refuses_bad_models(tmp_path, models, message):
    with pytest.raises(ValueError, match=message):
        arena.main(_arena(tmp_path, models=models))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "x", "answer": "1"}', "expected an answer to every prompt, got none with id 'y'"),
        ('{"answer": "1"}', "expected 2 answers in the order of the prompts, got 1"),
        ('{"answer": 1}', r"a\.jsonl:1: answer: "),
        ("{", r"a\.jsonl:1: json: "),
    ],
)
def test_read_answers_names_what_is_missing(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / "a.jsonl", ["x", "y"], ["p", "q"])


def test_read_answers_by_order(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"answer": "1"}\n\n{"answer": "2"}\n')
    assert read_answers(tmp_path / "a.jsonl", ["x", "y"], ["p", "q"]) == ["1", "2"]


def test_mt_bench_recipe_on_world_questions(tmp_path):
    config = bench.Config(model="world:expert", out=tmp_path / "bench", n=16, quiet=True)
    report = bench.main(config)
    assert report["questions"] == 16 and report["overall"]["rated"] == 32 and report["overall"]["score"] > 7
    assert len((tmp_path / "bench" / "ratings.jsonl").read_text().splitlines()) == 32
    assert report["judge"] == "world:judge" and report["parse_errors"] == 0
    assert bench.main(config) == report


def test_mt_bench_recipe_on_the_published_files(tmp_path, shared_data):
    folder = shared_data / "mt_bench"
    files = {"questions": folder / "question.jsonl", "references": folder / "reference_answer_gpt-4.jsonl"}
    with pytest.raises(ValueError, match=r"answers of world:expert: .*\(not of this world 160\); name a reference: or"):
        bench.main(bench.Config(model="world:expert", out=tmp_path / "bench", quiet=True, **files))
    said = scripted(tmp_path, answer="It is 5.", rate="[[4]]")
    report = bench.main(
        bench.Config(model=said, judge=said, out=tmp_path / "bench", overwrite=True, quiet=True, **files)
    )
    assert report["questions"] == 80 and len(report["categories"]) == 8
    assert report["overall"]["rated"] + report["overall"]["missing"] == 160
    assert report["overall"]["missing"] == report["call_errors"] + report["parse_errors"]
    assert "13 published reference answers" in report["notes"][0]


def test_mt_bench_recipe_refuses_another_configuration_in_the_same_place(tmp_path):
    bench.main(bench.Config(model="world:expert", out=tmp_path / "bench", n=8, quiet=True))
    with pytest.raises(ValueError, match="another"):
        bench.main(bench.Config(model="world:terse", out=tmp_path / "bench", n=8, quiet=True))


# Catches: a row without a number that is found after every problem was answered, and not by its line.
def test_accuracy_refuses_a_reference_without_a_number_before_it_asks(tmp_path, caplog):
    texts = ["The answer is 2.", "Because.", "The answer is 3."]
    rows = [conversation(f"{number}+1?", text).to_json() for number, text in enumerate(texts, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = scripted(tmp_path, answer="2")
    options = {"model": said, "data": tmp_path / "rows.jsonl", "out": tmp_path / "out", "quiet": True}
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: reference: expected a number, got 'Because\.'"):
        accuracy.main(accuracy.Config(**options))
    assert not (tmp_path / "out" / "ledger.sqlite").exists()
    result = accuracy.main(accuracy.Config(**options, on_error="skip", overwrite=True))
    assert result["total"] == 2 and result["rejected"] == 1
    assert "1 rows without a reference left out" in caplog.text

"""The recipes on the embedded world: what they write, that they are skipped when done, the same on two ranks."""

import json

import pytest
from forked import ROOT, run_ranks

from recipes import co_teach, evol_answer, evol_instruct, self_teach
from wizard_engine.agents import Ledger
from wizard_engine.agents.replies import FAILURE_CLASSES
from wizard_engine.data.records import read_rows, write_rows
from wizard_engine.world import check_answer, natural_corpus, parse

STUDENT = "world:careless"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, natural_corpus(120, seed=3))
    return path


def read(path, kind=None):
    return read_rows(path, kind=kind, allow_empty=True)


def right(rows):
    """Share of single-turn rows whose answer is right, among problems that have one."""
    problems = [(parse(row.instruction), row.answer) for row in rows if len(row.messages) == 2]
    checked = [check_answer(problem, answer) for problem, answer in problems if problem and not problem.defect]
    return sum(checked) / len(checked)


def test_evol_instruct_makes_harder_rows(data, tmp_path):
    cfg = evol_instruct.Config(
        data=(data,),
        out=tmp_path,
        rounds=2,
        optimise=evol_instruct.Optimise(steps=2, dev_size=30),
        quiet=True,
        agents=evol_instruct.Agents(ranker="world:ranker"),
        evaluation=(data,),
        ngram=6,
    )
    report = evol_instruct.main(cfg)
    rows, classes = read(tmp_path / "rows.jsonl", "conversation"), set(FAILURE_CLASSES)
    assert rows[:120] == read(data) and report["counts"]["evolved"] == len(rows) - 120 > 20
    by_id = {row.id: row for row in rows}
    pairs = [
        (parse(row.instruction), parse(by_id[parent].instruction))
        for row in rows[120:]
        for parent in row.lineage["parents"]
        if parent in by_id
    ]
    harder = [new.operations - old.operations for new, old in pairs if new and old]
    assert sum(harder) / len(harder) > 0.3
    assert report["counts"]["contaminated"] > 0 and (tmp_path / "removed.jsonl").read_text()
    assert {row.prompt for row in read(tmp_path / "rankings.jsonl", "preference")} == {()}
    assert (tmp_path / "method.txt").read_text().startswith("1. List ways")
    first = report["method"]["history"][0]
    assert first["step"] == 0 and report["method"]["measure"] == "classes" and set(first["reasons"]) <= classes
    failures = [json.loads(line) for line in (tmp_path / "method_failures.jsonl").read_text().splitlines()]
    assert {failure["class"] for failure in failures if failure["step"] == 0} == set(first["reasons"]) > set()
    assert report["method"]["calls"]["diagnose"]["asked"] > 30


def test_evol_answer_mends_answers_and_breaks_none(data, tmp_path):
    report = evol_answer.main(evol_answer.Config(data=(data,), out=tmp_path, rounds=3, quiet=True))
    before, after = read(data), read(tmp_path / "rows.jsonl", "conversation")
    assert right(after) > right(before) + 0.05
    broken = [new.id for new, old in zip(after, before) if right_one(old) and not right_one(new)]
    assert len(broken) <= 1
    assert report["rows_changed"] > 10 and read(tmp_path / "preferences.jsonl", "preference")
    chains = [json.loads(line) for line in (tmp_path / "chains.jsonl").read_text().splitlines()]
    assert [chain["row"] for chain in chains] == [row.id for row in before]


def right_one(row):
    problem = parse(row.instruction)
    return problem is not None and not problem.defect and check_answer(problem, row.answer)


def test_co_teach_gives_lessons_that_are_right(data, tmp_path):
    agents = co_teach.Agents(ours=STUDENT, rivals=("world:expert", "world:terse"))
    report = co_teach.main(co_teach.Config(data=(data,), out=tmp_path, agents=agents, quiet=True, lessons=8))
    lessons = read(tmp_path / "sft.jsonl", "conversation")
    assert 0 < len(lessons) <= 8 and right(lessons) > 0.8
    assert report["rivals"]["world:expert"]["mean_gap"] < -0.5 < report["rivals"]["world:terse"]["mean_gap"]
    pairs = read(tmp_path / "preferences.jsonl", "preference")
    assert pairs and all(pair.attributes["gap"] > 2.0 for pair in pairs)
    assert Ledger(tmp_path / "ledger.sqlite").counts()[STUDENT]["answer"]["failures"] == 0


def test_self_teach_prefers_right_samples(data, tmp_path):
    agents = self_teach.Agents(student=STUDENT, labeller="world:judge", evolver="world:evolver")
    report = self_teach.main(self_teach.Config(data=(data,), out=tmp_path, agents=agents, quiet=True))
    assert right(read(tmp_path / "sft.jsonl", "conversation")) > 0.9
    pairs = [pair for pair in read(tmp_path / "preferences.jsonl", "preference") if len(pair.prompt) == 1]
    problems = [(parse(pair.instruction), pair) for pair in pairs]
    better = [
        check_answer(p, pair.chosen) - check_answer(p, pair.rejected) for p, pair in problems if p and not p.defect
    ]
    assert sum(better) / len(better) > 0.8
    processes = read(tmp_path / "processes.jsonl", "process")
    assert {label for row in processes for label in row.labels} == {1, 0, -1}
    assert report["labels"]["kept"] == len(processes) > 100


def test_recipes_are_skipped_when_nothing_changed_and_repeat_no_call(data, tmp_path, capsys):
    cfg = evol_answer.Config(data=(data,), out=tmp_path, rounds=1)
    first = evol_answer.main(cfg)
    tried, accepted = (sum(row.get(name, 0) for row in first["operators"].values()) for name in ("tried", "accepted"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"done: {tmp_path / 'rows.jsonl'}, ") and 0 < accepted < tried
    assert last.endswith(f"report.json; {tried - accepted} of {tried} rewritten answers rejected")
    written = (tmp_path / "rows.jsonl").stat().st_mtime_ns
    assert evol_answer.main(cfg) == first and (tmp_path / "rows.jsonl").stat().st_mtime_ns == written
    calls = Ledger(tmp_path / "ledger.sqlite").counts()
    (tmp_path / "stage.json").unlink()
    assert evol_answer.main(cfg) == first
    assert Ledger(tmp_path / "ledger.sqlite").counts() == calls


def test_recipes_refuse_unknown_agents_and_other_rows(data, tmp_path):
    agents = evol_answer.Agents(judge="world:jugde")
    with pytest.raises(ValueError, match="got 'world:jugde'; did you mean 'world:judge'"):
        evol_answer.main(evol_answer.Config(data=(data,), out=tmp_path / "a", agents=agents))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: record: expected a conversation row"):
        evol_answer.main(evol_answer.Config(data=(pairs,), out=tmp_path / "b"))


def test_two_ranks_write_what_one_writes(data, tmp_path):
    options = ["--data", str(data), "--agents.ours", STUDENT, "--chat-turns", "2", "--limit", "40", "--quiet"]
    options += ["--agents.rivals", "world:expert", "world:rambler"]
    done = run_ranks(2, ROOT / "recipes" / "co_teach.py", *options, "--device", "cpu", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    agents = co_teach.Agents(ours=STUDENT, rivals=("world:expert", "world:rambler"))
    co_teach.main(
        co_teach.Config(data=(data,), out=tmp_path / "one", agents=agents, chat_turns=2, limit=40, quiet=True)
    )
    for name in ("sft.jsonl", "preferences.jsonl", "battles.jsonl", "report.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    calls = [Ledger(tmp_path / out / "ledger.sqlite").counts() for out in ("one", "two")]
    assert calls[0] == calls[1]

"""The real run on GSM8K: its file, what `make real` chooses, and the whole run with a tiny model and few rows."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from gsm8k_files import FILES, write_files
from many_ranks import save_base

from recipes import progressive
from wizard_engine.agents import make_agent, prompts, replies
from wizard_engine.agents.protocol import Request
from wizard_engine.data.records import read_rows
from wizard_engine.data.references import with_reference
from wizard_engine.data.solution_steps import step_texts
from wizard_engine.evaluation.accuracy import accuracy
from wizard_engine.pipeline.plan import Plan
from wizard_engine.pipeline.preflight import has_answers
from wizard_engine.pipeline.run_file import read_run_file

ROOT = Path(__file__).parents[2]
FILE = ROOT / "recipes" / "runs" / "real_gsm8k.toml"
# Fewer rows, steps and tokens than the file has.
FEW = {
    "sample": {"size": 12},
    "sft": {"training": {"max-steps": 2, "pack-tokens": 1024}},
    "self_teach": {"limit": 4, "max-tokens": 24},
    "stage_dpo": {"training": {"max-steps": 2, "pack-tokens": 4096}},
    "process_reward": {"training": {"max-steps": 2, "pack-tokens": 1024}},
    "rleif": {"rollout": {"steps": 1, "prompts-per-step": 2, "max-new-tokens": 16}, "mesh": {"dp-shard": 1}},
    "accuracy": {"max-new-tokens": 16},
    "mt_bench": {"max-new-tokens": 16, "limit": 30},
}


def plan_of(run):
    return Plan(run, progressive.RECIPES, size="135M", has_answers=has_answers(run)).build()


def test_the_run_is_on_the_files_and_needs_no_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("WIZARD_DATA", str(write_files(tmp_path)))
    made = {node.where: node.config for node in plan_of(read_run_file(FILE)).nodes}
    assert made["analysis"].data == (tmp_path / "gsm8k/train.jsonl",) and made["analysis"].checkpoint is None
    assert made["held_out"].data == made["sample"].evaluation == (tmp_path / "gsm8k/test.jsonl",)
    measured = Path("runs/real_gsm8k/held_out/rows.jsonl")
    assert made["slice_1/sft"].held_out == (measured,) and made["slice_2/accuracy_rleif"].data == measured
    # Training rows repeat none of the test rows, measured on or not.
    assert made["slice_2/rows"].evaluation == (tmp_path / "gsm8k/test.jsonl",)
    assert made["mt_bench_rleif"].questions == tmp_path / "mt_bench/question.jsonl"
    assert made["slice_2/pairs"].data[0] == tmp_path / "preferences/dpo_en.json"
    assert not {node for node in made if "evol" in node or "co_teach" in node}
    assert not [node for node, config in made.items() if "scripted:" in repr(config) or "openai:" in repr(config)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"real_gsm8k.toml: rows.data: expected the environment variable WIZARD_DATA, got none; export WIZARD_D"),
        ("", r"real_gsm8k.toml: rows.data: expected the environment variable WIZARD_DATA, got none"),
    ],
)
def test_a_variable_that_is_not_set_is_named(monkeypatch, change, message):
    monkeypatch.delenv("WIZARD_DATA", raising=False)
    if change is not None:
        monkeypatch.setenv("WIZARD_DATA", change)
    with pytest.raises(ValueError, match=message):
        read_run_file(FILE)


def test_variables_stand_in_every_text_but_those_of_the_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "models/a")
    path = tmp_path / "run.toml"
    path.write_text(
        '[agents]\njudge = "${PLACE}"\n[launch]\nprefix = "srun ${PLACE}"\n[sft]\nmodel = "x/${PLACE}/$PLACE"\n'
    )
    run = read_run_file(path)
    assert run.agents.judge == "models/a" and run.launch.prefix == "srun ${PLACE}"
    assert run.options["sft"]["model"] == "x/models/a/$PLACE"


@pytest.mark.parametrize("absent", [None, *FILES])
def test_make_real_takes_the_files_where_all_are_there(tmp_path, absent):
    write_files(tmp_path)
    if absent:
        (tmp_path / absent).unlink()
    command = ["make", "--old-file=runs/smollm2/config.json", "real", "RUN=echo"]
    for folder, name in ((str(tmp_path), "real" if absent else "real_gsm8k"), (None, "real")):
        # Tests may run under make themselves.
        others = {key: value for key, value in os.environ.items() if key != "WIZARD_DATA" and not key.startswith("M")}
        env = others | ({} if folder is None else {"WIZARD_DATA": folder})
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1].split() == (
            f"recipes/progressive.py recipes/runs/{name}.toml --seed 0 --out runs/{name}".split()
        )
        assert (f"no {tmp_path}/{absent}" in done.stdout) == (absent is not None and folder is not None)


def asked(task, **fields):
    agent = make_agent("reference:labeller" if task == "label" else "reference:judge")
    (reply,) = agent.respond([Request(task, prompts.request_messages(task, **fields))])
    assert reply.ok, reply.error
    return reply.text


def check_rows(rows):
    """Judge, labeller and accuracy read the rows' own answers; returns the share of steps without a remark."""
    marks = []
    for row in rows:
        fields = {"instruction": row.instruction, "reference": with_reference(row, "answers").attributes["reference"]}
        steps = step_texts(row.answer)
        labels = replies.read_labels(asked("label", answer_steps="\n".join(steps), **fields), len(steps))
        assert labels[-1] == 1, row
        marks += [label >= 0 for label in labels]
        wrong = row.answer.rpartition("####")[0] + "#### 987654321"
        rated = [replies.read_scores(asked("rate", answer=text, **fields), 1)[0] for text in (row.answer, wrong)]
        assert rated[0] >= 5 > 3 > rated[1], row
    answers = [row.answer for row in rows]
    assert accuracy(answers, answers).accuracy == 1
    assert accuracy(["#### 987654321"] * len(rows), answers).accuracy == 0
    return sum(marks) / len(marks)


def test_judge_labeller_and_accuracy_read_answers_of_gsm8k(tmp_path):
    assert check_rows(read_rows(write_files(tmp_path) / "gsm8k/train.jsonl")) == 1


def test_judge_labeller_and_accuracy_read_real_answers(shared_data):
    # Some solutions have a slip in a step, such as 6*2.5 = 18.
    assert check_rows(read_rows(shared_data / "gsm8k/train.jsonl")[:200]) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, pytest.param(True, id="real_files")])
def test_the_whole_run_with_a_tiny_model(tmp_path, monkeypatch, request, real):
    folder = request.getfixturevalue("shared_data") if real else write_files(tmp_path / "data")
    monkeypatch.setenv("WIZARD_DATA", str(folder))
    texts = [f"{row.instruction} {row.answer}" for row in read_rows(folder / "gsm8k/train.jsonl")[:100]]
    save_base(tmp_path / "base", texts, layers=1, max_positions=2048)
    run = read_run_file(FILE)
    options = {name: {**table, **FEW.get(name, {})} for name, table in run.options.items()}
    rows = replace(run.rows, held_out_limit=5, hold_out_pairs=4)
    run = replace(run, base=replace(run.base, model=tmp_path / "base"), rows=rows, options=options, quiet=True)
    monkeypatch.setattr(progressive, "read_run_file", lambda path: run)
    summary = progressive.main(progressive.Config(FILE, out=tmp_path / "run"))
    assert {(row["slice"], row["name"]) for row in summary["stages"]} >= {(1, "base"), (1, "sft"), (2, "rleif")}
    assert all(row["total"] == 5 for row in summary["stages"])
    taught = tmp_path / "run/slice_2/self_teach"
    assert json.loads((taught / "report.json").read_text())["labels"] and (taught / "processes.jsonl").stat().st_size
    rated = json.loads((tmp_path / "run/mt_bench_base/mt_bench.json").read_text())
    assert rated["questions"] == (30 if real else 2) and (tmp_path / "run/report.html").is_file()

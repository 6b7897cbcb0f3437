"""What a dry run says of a run's base model, rows, pairs and measures."""

import json

import pytest
from many_ranks import save_base

from recipes import progressive

ROWS = [{"instruction": f"Name {n} birds.", "output": "A jay is one. " * (60 if n == 7 else 1)} for n in range(20)]
PAIRS = [
    {"instruction": f"Praise {n} birds.", "chosen": "How fine. " * (60 if n < 5 else 1), "rejected": "No."}
    for n in range(10)
]
RUN = """
out = "{folder}/run"
slices = 1
stages = ["sft", "stage_dpo"]
quiet = true
[rows]
data = ["{folder}/rows.json"]
hold-out = 30
pairs = ["{folder}/pairs.json"]
hold-out-pairs = 4
on-error = "skip"
[base]
model = "{folder}/base"
[sft.training]
pack-tokens = 256
[stage_dpo.training]
pack-tokens = 256
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("overview")
    (made / "rows.json").write_text(json.dumps(ROWS))
    (made / "pairs.json").write_text(json.dumps(PAIRS))
    save_base(made / "base", [row["instruction"] for row in ROWS], layers=1, width=16, heads=2, kv_heads=1)
    return made


def looked(folder, capsys, text=""):
    """What a dry run prints."""
    path = folder / "mine.toml"
    path.write_text(RUN.format(folder=folder) + text)
    progressive.main(progressive.Config(path, dry_run=True))
    return capsys.readouterr().out


# Catches: rows that a stage leaves out, which only its reject file tells of; measures that are missing without a word.
def test_a_dry_run_says_what_is_too_long_and_what_is_measured(folder, capsys):
    out = looked(folder, capsys)
    names = ("base ", "rows ", "pairs ", "measured ")
    told = {line.split()[0]: line for line in out.splitlines() if line.startswith(names)}
    assert "context of 128 tokens; learning rates: the recipes' own" in told["base"]
    assert f"20 in {folder}/rows.json; 10 of them held out; sft leaves out about 5 in 100 (sample: exp" in told["rows"]
    assert "10 in " in told["pairs"] and "stage_dpo leaves out about 50 in 100" in told["pairs"]
    assert "held-out measures of sft, stage_dpo; no exact answers: fewer than nine" in told["measured"]
    assert told["measured"].endswith("no games") and f"start it with: python recipes/progressive.py {folder}" in out


def test_a_dry_run_says_what_a_preference_model_leaves_out(folder, capsys):
    text = RUN.replace('"stage_dpo"]', '"preference_reward"]').replace("[stage_dpo.", "[preference_reward.")
    path = folder / "preference.toml"
    path.write_text(text.format(folder=folder))
    progressive.main(progressive.Config(path, dry_run=True))
    out = capsys.readouterr().out
    assert "for every slice; preference_reward leaves out about 50 in 100 (answer: expected fewer than 128" in out
    assert "held-out measures of sft, preference_reward;" in out and "stage_dpo" not in out
    assert [line for line in out.splitlines() if line.startswith("slice_1/preference_reward ")]


# Catches: held-out rows of a sample that the run does not make; a forecast that asks for that stage.
def test_rows_that_were_drawn_before_come_with_their_held_out_rows(folder, capsys):
    drawn = folder / "before"
    drawn.mkdir()
    (drawn / "stage.json").write_text('{"stage": "sample"}')
    for name, rows in (("slice_1", ROWS[:8]), ("held_out", ROWS[8:])):
        (drawn / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = looked(folder, capsys, f'[sample]\nuse = "{drawn}"\n')
    assert f"20 in {folder}/rows.json; drawn before: {drawn}" in out and "analysis" not in out
    nodes = {
        node.where: node.config for node in progressive.plan_of(progressive.read_run_file(folder / "mine.toml")).nodes
    }
    assert nodes["slice_1/sft"].held_out == nodes["slice_1/rows"].evaluation == (drawn / "held_out.jsonl",)


def test_a_dry_run_ends_with_what_is_missing_before_it_says_what_the_stages_take(folder, capsys):
    with pytest.raises(ValueError, match="expected an endpoint that answers, got"):
        looked(folder, capsys, '[agents]\njudge = "openai:m@http://127.0.0.1:9/v1"\n')
    out = capsys.readouterr().out
    assert "slice_1/sft" in out and "tokens trained" not in out and "nothing is missing" not in out

"""The real run with a tiny model in the place of the pretrained one, few rows and few steps; also killed halfway."""

import json
import sqlite3
import tomllib
from pathlib import Path

import pytest
from killed_runs import moments, results, start_until_done
from many_ranks import save_base

from recipes import progressive
from wizard_engine.agents.ledger import Ledger
from wizard_engine.runtime.files import read_object

ROOT = Path(__file__).parents[2]
# Fewer rows, steps and tokens than the file has; one rank.
FEW = {
    "quiet": True,
    "sample": {"size": 40},
    "targets": {"language": {"en": 0.84, "es": 0.1, "fr": 0.03, "de": 0.03}},
    "measure": {"rows": 6},
    "co_teach": {"limit": 6, "max-tokens": 16},
    "sft": {"training": {"max-steps": 3, "packs-per-step": 1}},
    "self_teach": {"limit": 6, "samples": 2, "max-tokens": 16},
    "stage_dpo": {"training": {"max-steps": 2}},
    "instruction_reward": {"training": {"max-steps": 2}},
    "process_reward": {"training": {"max-steps": 2}},
    "rleif": {
        "rollout": {"steps": 2, "prompts-per-step": 2, "samples-per-prompt": 2, "max-new-tokens": 12},
        "mesh": {"dp-shard": 1},
    },
    "accuracy": {"limit": 6, "max-new-tokens": 12},
    "arena": {"max-new-tokens": 12},
    "mt_bench": {"max-new-tokens": 12},
}


def merged(content, changes):
    """A table with the entries of another one in it, table by table."""
    both = {
        key: merged(content[key], value) if isinstance(content.get(key), dict) and isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return content | both


def toml(table, name=""):
    """A table as text."""
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"[{name}]"] if name else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in inner]
    return "\n".join([*lines, *(toml(value, f"{name}.{key}" if name else key) for key, value in inner.items())])


def write_run(folder, name):
    """The tiny form of recipes/runs/real.toml, whose results are in `folder`/`name`."""
    content = tomllib.loads((ROOT / "recipes/runs/real.toml").read_text())
    content = merged(content, FEW | {"out": str(folder / name)})
    content["base"]["model"] = str(folder / "base")
    for key in ("data", "held-out", "held-out-pairs"):
        content["rows"][key] = [str(ROOT / path) for path in content["rows"][key]]
    held = folder / "held_out.jsonl"
    held.write_text("".join((ROOT / "recipes/runs/real/held_out.jsonl").open().readlines()[:8]))
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join((ROOT / "recipes/runs/real/held_out_pairs.jsonl").open().readlines()[:6]))
    content["rows"] |= {"held-out": [str(held)], "held-out-pairs": [str(pairs)]}
    content["rows"]["questions"] = str(ROOT / content["rows"]["questions"])
    replies = f"scripted:{ROOT}/recipes/runs/real/replies.jsonl"
    content["agents"] |= {"teacher": replies, "rivals": [replies]}
    path = folder / f"{name}.toml"
    path.write_text(toml(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a base model."""
    folder = tmp_path_factory.mktemp("real")
    rows = [json.loads(line) for line in (ROOT / "recipes/runs/real/rows.jsonl").open()]
    texts = [row["instruction"] + "\n" + row["output"] for row in rows]
    save_base(folder / "base", texts, layers=1, max_positions=1024)
    return folder


# Catches: a stage of the real run that its file leaves without rows, a measure that is not there, words of the world.
@pytest.mark.slow
def test_real_run_goes_through_every_stage(folder):
    summary = progressive.main(progressive.Config(write_run(folder, "whole")))
    run = folder / "whole"
    made = {str(path.parent.relative_to(run)) for path in run.rglob("stage.json")}
    stages = ("evol_instruct", "evol_answer", "co_teach", "rows", "sft", "self_teach", "pairs", "stage_dpo", "rleif")
    assert {f"slice_2/{stage}" for stage in (*stages, "instruction_reward", "process_reward")} <= made
    assert {"arena", "mt_bench_base", "mt_bench_rleif"} <= made and not (run / "world").exists()
    asked = set()
    for path in run.rglob("ledger.sqlite"):
        ledger = Ledger(path)
        asked.update(ledger.counts())
        ledger.close()
    assert any("reference:judge" in agent for agent in asked) and any("scripted:" in agent for agent in asked)
    assert not any(agent.startswith(("world", "openai")) for agent in asked)
    rewritten = [json.loads(line) for line in (run / "slice_2/evol_answer/preferences.jsonl").open()]
    assert rewritten, "a result alone loses against its worked answer"
    for stage in ("sft", "stage_dpo", "rleif", "process_reward", "instruction_reward"):
        result = read_object(run / f"slice_2/{stage}/stage.json")["result"]
        assert stage.endswith("reward") or result["held_out"]["before"], stage
    report = (run / "report.html").read_text()
    assert "held-out rows" in report and "embedded world" not in report
    assert summary["pairwise"]


def replies(out):
    """How many replies each ledger holds."""
    counts = {}
    for path in sorted(out.rglob("ledger.sqlite")):
        with sqlite3.connect(path) as ledger:
            counts[str(path.relative_to(out))] = ledger.execute("SELECT COUNT(*) FROM replies").fetchone()[0]
    return counts


# Catches: a call that is made again, a stage that begins anew with other weights, rows of half a stage.
@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.soak)])
def test_real_run_that_is_killed_makes_the_same(folder, kills):
    alone, again = folder / f"left_alone_{kills}", folder / f"killed_{kills}"
    start_until_done(write_run(folder, alone.name), alone)
    start_until_done(write_run(folder, again.name), again, moments(alone, kills, kills))
    assert results(again) == results(alone) != {}
    assert replies(again) == replies(alone)

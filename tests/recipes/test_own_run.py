"""A run on rows, a base model and endpoints that have nothing of the embedded world, from its file to its report."""

import json
import re
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import pytest
from killed_runs import moments, results, start_until_done
from many_ranks import save_base

from recipes import progressive
from wizard_engine.agents.ledger import Ledger
from wizard_engine.runtime.files import read_object

sys.path.append(str(Path(__file__).parents[1] / "agents"))
from fake_endpoint import Fake, teach

KINDS = ("river", "planet", "metal", "poet", "engine", "island", "language", "dance", "bird", "stone")
WORDS = ("old", "small", "famous", "rare", "strange", "cold", "bright", "heavy")
RUN = """
out = "{folder}/run"
slices = 2
threads = 1
quiet = true
on-empty = "skip"
[rows]
data = ["{folder}/rows.jsonl"]
hold-out = 10
hold-out-pairs = 4
on-error = "skip"
[base]
model = "{folder}/base"
size = "135M"
[agents]
teacher = "openai:teacher@{url}"
rivals = ["openai:first@{url}", "openai:second@{url}"]
[measure]
rows = 6
[evol_instruct]
max-tokens = 40
[evol_answer]
rounds = 1
length-cap = 40.0
[co_teach]
chat-turns = 2
max-tokens = 40
on-length = "keep"
[sft.training]
max-steps = 3
pack-tokens = 128
[self_teach]
max-tokens = 16
samples = 2
on-length = "keep"
limit = 8
[stage_dpo.training]
max-steps = 2
pack-tokens = 256
[instruction_reward.training]
max-steps = 2
pack-tokens = 128
[process_reward.training]
max-steps = 2
pack-tokens = 128
[rleif]
rollout = {{ steps = 2, prompts-per-step = 2, samples-per-prompt = 2, max-new-tokens = 16 }}
training = {{ pack-tokens = 256 }}
[arena]
max-new-tokens = 16
"""


def prepare(folder):
    """Rows and a base model."""
    rows = [
        {"instruction": f"Name a {word} {kind} and say why.", "output": f"The {word} one is a {kind}."}
        for kind in KINDS
        for word in WORDS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_base(folder / "base", [row["instruction"] + " " + row["output"] for row in rows], layers=1, max_positions=512)


def write_run(folder, endpoint, name="mine"):
    """The run file."""
    path = folder / f"{name}.toml"
    path.write_text(RUN.format(folder=folder, url=endpoint.url).replace(f"{folder}/run", f"{folder}/{name}"))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run's folder, what the endpoint was asked, and the summary."""
    folder = tmp_path_factory.mktemp("own")
    prepare(folder)
    with Fake(teach) as endpoint:
        yield folder, endpoint, progressive.main(progressive.Config(write_run(folder, endpoint, "run")))


@pytest.mark.slow
def test_a_run_of_ones_own_has_no_word_of_the_world(finished):
    folder, endpoint, _ = finished
    assert endpoint.asked
    asked = " ".join(message["content"] for body in endpoint.asked for message in body["messages"])
    for path in (folder / "run").rglob("ledger.sqlite"):
        ledger = Ledger(path)
        assert not [agent for agent in ledger.counts() if agent.startswith("world")]
        ledger.close()
    made = [asked, *(path.read_text() for path in (folder / "run").rglob("*.jsonl"))]
    made.append((folder / "run" / "report.html").read_text())
    for text in made:
        assert not re.search(r"word problem|Tom has|apples|embedded world", text)
    assert not (folder / "run" / "world").exists()


@pytest.mark.slow
def test_stages_have_the_options_of_the_file_and_battles_reach_stage_dpo(finished):
    folder, _, _ = finished
    run = folder / "run"
    for t in (1, 2):
        config = read_object(run / f"slice_{t}" / "sft" / "config.json")["config"]
        assert (config["training"]["max_steps"], config["training"]["lr"]) == (3, 1e-4)
    battles = [json.loads(line)["id"] for line in (run / "slice_2/co_teach/preferences.jsonl").open()]
    learned = [json.loads(line)["id"] for line in (run / "slice_2/pairs/rows.jsonl").open()]
    held = [json.loads(line)["id"] for line in (run / "slice_2/pairs/held_out.jsonl").open()]
    assert battles and set(battles) <= {*learned, *held} and not {*learned} & {*held}
    counts = read_object(run / "slice_2/pairs/mix.json")["files"]
    assert sum(line["taken"] for line in counts) == len(learned) + len(held)
    given = read_object(run / "slice_2/rows/config.json")["inputs"]
    assert len(given) >= 3, "lessons, self-taught rows, and those of the Evol Lab"


@pytest.mark.slow
def test_a_second_start_asks_nobody_and_the_report_is_about_this_run(finished):
    folder, endpoint, summary = finished
    before = len(endpoint.asked)
    again = progressive.main(progressive.Config(folder / "run.toml"))
    assert len(endpoint.asked) == before and again["pairwise"] == summary["pairwise"]
    report = (folder / "run" / "report.html").read_text()
    assert "openai:teacher" in report and "slice_2/rleif" in report and "make demo" not in report
    assert "24 of 24" in report and "parameters of base" in report and "against base" in report
    assert report.count("<title>slice_") >= 20 and "to run" not in report
    with sqlite3.connect(folder / "run" / "slice_1" / "evol_instruct" / "ledger.sqlite") as ledger:
        assert ledger.execute("SELECT COUNT(*) FROM replies").fetchone()[0]


# Catches: a call that is made again, a stage that begins anew with other weights, rows of half a stage.
@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.soak)])
def test_a_run_that_is_killed_and_started_again_makes_the_same(tmp_path, kills):
    prepare(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Fake(teach) as endpoint:
        start_until_done(write_run(tmp_path, endpoint, "whole"), whole)
        asked = Counter(json.dumps(body, sort_keys=True) for body in endpoint.asked)
        endpoint.asked.clear()
        start_until_done(write_run(tmp_path, endpoint, "killed"), killed, moments(whole, kills, kills))
        again = Counter(json.dumps(body, sort_keys=True) for body in endpoint.asked)
    assert results(killed) == results(whole) != {}
    # What was in flight when it was killed is asked again: at most what runs at once.
    assert again.keys() == asked.keys() and (again - asked).total() <= kills * 3 * 16

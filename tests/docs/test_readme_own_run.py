"""README's section on a run of one's own, followed to the letter, with rows, pairs, a base and a teacher."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forked import ENVIRONMENT
from many_ranks import save_base

from wizard_engine.runtime.files import read_object

sys.path.append(str(Path(__file__).parents[1] / "agents"))
from fake_endpoint import Fake, teach

ROOT = Path(__file__).parents[2]
KINDS = ("river", "planet", "metal", "poet", "island", "bird")
WORDS = ("old", "small", "famous", "rare", "cold", "bright")
# What makes a run short, in the place of what new-run writes.
SHORT = {
    "slices = 3": "slices = 2",
    "hold-out = 200": "hold-out = 12",
    "hold-out-pairs = 50": "hold-out-pairs = 6",
    "max-tokens = 512": "max-tokens = 16\nlimit = 8",
    "pack-tokens = 2048": "pack-tokens = 512\nmax-steps = 2",
    "pack-tokens = 4096": "pack-tokens = 1024\nmax-steps = 2",
    "# rows = 200 ": "rows = 8 ",
    "# [rleif]\n# rollout = { steps = 100 }": "[arena]\nmax-new-tokens = 16\n[rleif]\n"
    "rollout = { steps = 1, prompts-per-step = 4, samples-per-prompt = 2, max-new-tokens = 16 }",
}


def blocks(section):
    """The commands of each shell block of a section of README, on one line each."""
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    joined = [block.replace("\\\n", " ") for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    return [block.splitlines() for block in joined]


def words(command, url):
    """A command as this process can start it; None for those that install."""
    program, *rest = shlex.split(command.replace("http://127.0.0.1:8000/v1", url))
    rest = [str(ROOT / word) if word.startswith("recipes/") else word for word in rest]
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*programs[program], *rest] if program in programs else None


def follow(commands, folder, url, short):
    """Run commands one after the other; their outputs.

    Args:
        short: text of a new run file -> what stands in its place.
    """
    outputs = []
    for command in commands:
        if (argv := words(command, url)) is None:
            continue
        done = subprocess.run(argv, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        outputs.append(done.stdout)
        if "new-run" in command:
            path = folder / argv[argv.index("new-run") + 1] / "run.toml"
            text = path.read_text()
            for before, after in short.items():
                assert before in text, f"expected {before!r} in what new-run writes, got none"
                text = text.replace(before, after)
            path.write_text(text)
    return outputs


@pytest.fixture
def folder(tmp_path):
    """Rows, pairs and a base under README's names."""
    rows = [
        {
            "instruction": f"Name a {word} {kind}.",
            "input": "Say why." if word == "old" else "",
            "output": f"The {kind}.",
        }
        for kind in KINDS
        for word in WORDS
    ]
    pairs = [
        {"instruction": f"Praise a {word} {kind}.", "input": "", "chosen": f"What a {word} {kind}!", "rejected": "No."}
        for kind in KINDS
        for word in WORDS
    ]
    # Rows that a newcomer's file has: without an answer, and too long for the context.
    rows += [{"instruction": "Name a sea.", "input": "", "output": ""}]
    rows += [{"instruction": "Count.", "input": "", "output": " ".join(map(str, range(900)))}]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    texts = [row["instruction"] + row["output"] for row in rows[:-2]]
    save_base(tmp_path / "models" / "base", texts, layers=1, max_positions=1024)
    return tmp_path


# Catches: a command of README that is refused, or a run file of new-run that no run can be made of.
@pytest.mark.slow
def test_the_commands_of_readme_make_a_run(folder):
    whole, _ = blocks("Your own run")
    with Fake(teach) as endpoint:
        _, looked, said = follow(whole, folder, endpoint.url, SHORT)
    assert "37 in alpaca.json" in looked and "36 in pairs.json" in looked and "nothing is missing" in looked
    summary = read_object(folder / "my" / "run" / "summary.json")
    assert {line["stage"] for line in summary["held_out"]} == {"sft", "stage_dpo", "rleif"}
    assert not summary["stages"] and len(summary["pairwise"]) == 6
    report = (folder / "my" / "run" / "report.html").read_text()
    assert "no exact answers" in report and "rejected rows: 1" in report and ": left out: " not in said


@pytest.mark.slow
def test_without_a_teacher_it_is_sft_and_stage_dpo_with_their_measures(folder):
    _, alone = blocks("Your own run")
    follow(alone, folder, "http://127.0.0.1:9/v1", {key: SHORT[key] for key in SHORT if "rleif" not in key})
    out = folder / "tuned" / "run"
    assert not [*out.rglob("ledger.sqlite")]
    measured = read_object(out / "summary.json")["held_out"]
    assert [(line["slice"], line["stage"]) for line in measured] == [
        (t, stage) for t in (1, 2) for stage in ("sft", "stage_dpo")
    ]
    assert {line["rows"] for line in measured} == {12, 6}
    assert all(line["difference"]["loss"][0] < 0 for line in measured if line["stage"] == "sft")

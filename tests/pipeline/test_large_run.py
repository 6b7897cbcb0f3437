"""A run of 8x22B on 16 nodes with four endpoints: what it takes, its commands, and its commands with a tiny mixture.

The base model has all names and shapes of 8x22B; its weights are holes in a file, which take no room.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import ENVIRONMENT, ROOT
from many_ranks import save_base

from recipes import progressive
from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.model import PRESETS
from wizard_engine.model.hugging_face import INDEX, weight_files
from wizard_engine.model.published import pieces, published_config
from wizard_engine.model.safetensors_file import file_header
from wizard_engine.pipeline import preflight
from wizard_engine.pipeline.forecast import COLUMNS
from wizard_engine.pipeline.run_file import read_run_file
from wizard_engine.runtime.files import read_object

sys.path.append(str(Path(__file__).parents[1] / "agents"))
from fake_endpoint import Fake, teach

PRICE = "#price_in=1,price_out=2,requests_per_minute=600"
RUN = """
out = "{folder}/run"
slices = {slices}
stages = {stages}
threads = 1
on-empty = "skip"
[rows]
data = ["{folder}/rows.jsonl"]
hold-out = 8
on-error = "skip"
[base]
model = "{folder}/base"
[agents]
evolver = "openai:evolver@{url}{price}"
answerer = "openai:answerer@{url}{price}"
judge = "openai:judge@{url}{price}"
labeller = "openai:labeller@{url}{price}"
rivals = ["openai:answerer@{url}{price}"]
optimizer = "none"
ranker = "none"
suggester = "none"
user = "none"
[measure]
accuracy = false
rows = 4
[launch]
separate-processes = true
nodes = {nodes}
processes = {processes}
[mesh]
ep = {ep}
[sharding]
recompute = "full"
[rleif.reward]
factors = ["{factor}"]
"""
LARGE = """
[sft.training]
packs-per-step = 128
[stage_dpo.training]
packs-per-step = 128
[process_reward.training]
packs-per-step = 128
[rleif.rollout]
prompts-per-step = 128
tp = 8
"""
# Of a mixture of a few thousand weights.
SMALL = """
[evol_instruct]
max-tokens = 40
[sft.training]
max-steps = 2
pack-tokens = 128
packs-per-step = 2
[self_teach]
max-tokens = 12
samples = 2
on-length = "keep"
limit = 6
[stage_dpo.training]
max-steps = 2
pack-tokens = 256
packs-per-step = 2
[rleif.rollout]
steps = 1
prompts-per-step = 2
samples-per-prompt = 2
max-new-tokens = 8
[rleif.training]
pack-tokens = 256
[arena]
max-new-tokens = 8
"""
TEACHING = ("evol_instruct", "evol_answer", "co_teach")
LEARNING = ("sft", "self_teach", "stage_dpo", "process_reward", "rleif")
FEW = ("evol_instruct", "sft", "self_teach", "stage_dpo", "rleif")


def write_run(folder, url, *, more, **layout):
    """The run file, and the texts of its rows."""
    words = ("old", "small", "famous", "rare", "strange", "cold")
    kinds = ("rivers", "planets", "metals", "poets", "engines", "islands")
    named = [(f"{word} {kind}", number) for number, (word, kind) in enumerate(product(words, kinds))]
    rows = [(f"Add {number} to 9 {name}.", f"{number} + 9 = {number + 9} {name}.") for name, number in named]
    lines = [json.dumps({"instruction": question, "output": answer}) + "\n" for question, answer in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    layout["stages"] = json.dumps(layout["stages"])
    path = folder / "run.toml"
    path.write_text(RUN.format(folder=folder, url=url, price=PRICE, **layout) + more)
    return path, [" ".join(row) for row in rows]


def save_holes(path, config):
    """A model directory without weights, with a tokenizer of about as many ids as its embedding has rows."""
    path.mkdir()
    texts = ("".join(letters) for letters in product("abcdefghijklm", repeat=4))
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size, atoms=CHAT_ATOMS)
    tokenizer.save(path)
    (path / "config.json").write_text(json.dumps(published_config(config, tokenizer, dtype="bfloat16")))
    specs = {piece.name: (torch.bfloat16, piece.shape) for piece in pieces(config)}
    files, index = weight_files(specs, 4 << 30)
    (path / INDEX).write_text(json.dumps(index))
    for name, tensors in files.items():
        text, _, size = file_header({tensor: specs[tensor] for tensor in tensors})
        with (path / name).open("wb") as file:
            file.write(text)
            file.truncate(size)


@pytest.fixture
def large(tmp_path):
    """The run file of 8x22B, and its endpoint."""
    save_holes(tmp_path / "base", PRESETS["8x22b"])
    with Fake(teach) as endpoint:
        layout = {"slices": 2, "nodes": 16, "processes": 8, "ep": 8, "factor": "process"}
        path, _ = write_run(tmp_path, endpoint.url, stages=(*TEACHING, *LEARNING), more=LARGE, **layout)
        yield path, endpoint


def table(text):
    """Stage -> column -> text of a forecast's table, by the places of its columns."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if "GPU-hours" in line)
    titles = [title for title in COLUMNS if f" {title}" in lines[start]]
    width = len(lines[start]) - 15 * len(titles)
    stages = {}
    for line in lines[start + 1 : lines.index("", start)]:
        cells = [line[at : at + 15].strip().replace(",", "") for at in range(width, len(line), 15)]
        stages[line[:width].strip()] = {title: float(cell) for title, cell in zip(titles, cells) if cell}
    return stages


def plenty(monkeypatch, free):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


# The planner looks at every layout of 128 GPUs.
@pytest.mark.slow
def test_a_dry_run_says_what_the_run_takes_and_asks_nobody(large, capsys, monkeypatch):
    path, endpoint = large
    plenty(monkeypatch, 1 << 60)
    assert progressive.main(progressive.Config(path, dry_run=True)) == {} and endpoint.asked == []
    text = capsys.readouterr().out
    nodes = progressive.plan_of(read_run_file(path)).nodes
    assert [line.split()[0] for line in text.splitlines()[: len(nodes)]] == [node.where for node in nodes]
    stages = table(text)
    # 14 rows a slice: an evolution, an answer and a comparison of each.
    assert stages["slice_1/evol_instruct"]["rows"] == 14 and stages["slice_1/evol_instruct"]["calls"] >= 3 * 14
    for name in ("slice_1/evol_instruct", "slice_1/evol_answer", "slice_2/co_teach", "slice_2/self_teach", "arena"):
        line = stages[name]
        assert line["cost"] == pytest.approx((line["tokens in"] + 2 * line["tokens out"]) / 1e6, rel=0.01), name
        # Agents work at the same time, each at most 600 calls a minute; none has all calls of its stage.
        assert line["calls"] / 36_000 / 4 <= line["hours"] * 1.01 and line["hours"] <= line["calls"] / 36_000 * 1.01
    learned = [name for name in stages if name.endswith(LEARNING) and "self_teach" not in name]
    assert len(learned) == 8 and all(stages[name]["GPU-hours"] > 0 for name in learned)
    for column in ("calls", "cost", "hours", "GPU-hours", "GiB of disk"):
        total = sum(line.get(column, 0) for name, line in stages.items() if name != "in all")
        assert stages["in all"][column] == pytest.approx(total, rel=0.02)
    # 140.6 billion weights: a model in bf16, and a checkpoint with both moments in fp32.
    assert stages["slice_1/sft"]["GiB of disk"] == pytest.approx(140.6e9 * (2 + 12) / 2**30, rel=0.01)
    assert "slice_1/self_teach: every rank loads the whole model, 524 GiB, which no H100 holds" in text
    assert "slice_1/rleif: " not in text.partition("models and checkpoints")[2]
    plenty(monkeypatch, 1 << 40)
    with pytest.raises(ValueError, match=r"run: expected \d+.\d GiB for models and checkpoints, got 1024.0 GiB free"):
        progressive.main(progressive.Config(path, dry_run=True))


def test_every_stage_is_one_command_and_one_step_of_the_slurm_script(large, capsys):
    path, endpoint = large
    nodes = progressive.plan_of(read_run_file(path)).nodes
    progressive.main(progressive.Config(path, print_commands=True))
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == len(nodes)
    for node, command in zip(nodes, commands):
        assert f"recipes/{node.recipe}.py" in command and f"--out {node.out} " in f"{command} "
        single = node.recipe in ("sample", "mix", "arena")
        launcher = "python " if single else "torchrun --nproc-per-node 8 --nnodes 16 "
        assert command.startswith(launcher), command
        assert ("--mesh.ep 8" in command) == hasattr(node.config, "mesh")
    script = path.with_name("run.sh")
    progressive.main(progressive.Config(path, slurm=script))
    steps = [line for line in script.read_text().splitlines() if "recipes/" in line]
    assert [step.removeprefix("srun --nodes=16 --ntasks-per-node=1 ") for step in steps] == commands
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0 and endpoint.asked == []


def test_steps_that_the_ranks_do_not_divide_are_found_by_a_dry_run(large, monkeypatch):
    path, endpoint = large
    plenty(monkeypatch, 1 << 60)
    text = path.read_text()
    path.write_text(text.replace("ep = 8", "ep = 3"))
    with pytest.raises(ValueError, match=r"sft: mesh.ep must divide dp_shard x cp x tp: ep=3, .* = 128; choose from"):
        progressive.main(progressive.Config(path, dry_run=True))
    path.write_text(text.replace("packs-per-step = 128", "packs-per-step = 8", 1))
    with pytest.raises(ValueError, match=r"^sft.training.packs-per-step: expected a multiple of 128, .* got 8$"):
        progressive.main(progressive.Config(path, dry_run=True))
    assert endpoint.asked == []


# Catches: a printed command that does something else than the driver, or that a shell cannot run.
@pytest.mark.slow
def test_printed_commands_run_and_the_driver_reports_what_they_made(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    environment = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with Fake(teach) as endpoint:
        layout = {"slices": 1, "nodes": 1, "processes": 2, "ep": 2, "factor": "checked"}
        path, texts = write_run(tmp_path, endpoint.url, stages=FEW, more=SMALL, **layout)
        save_base(tmp_path / "base", texts, layers=1, experts=2, max_positions=512)
        nodes = progressive.plan_of(read_run_file(path)).nodes
        progressive.main(progressive.Config(path, print_commands=True))
        commands = capsys.readouterr().out.splitlines()
        assert len(commands) == len(nodes) == 10
        for command in commands:
            done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        asked, times = len(endpoint.asked), {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("stage.json")}
        assert asked and len(times) == len(nodes)
        progressive.main(progressive.Config(path))
        assert len(endpoint.asked) == asked and times == {path: path.stat().st_mtime_ns for path in times}
    assert "openai:evolver" in (tmp_path / "run/report.html").read_text()
    assert read_object(tmp_path / "run/summary.json")["pairwise"]
    assert read_object(tmp_path / "run/slice_1/rleif/model/config.json")["num_local_experts"] == 2

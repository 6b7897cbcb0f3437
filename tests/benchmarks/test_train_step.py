"""The throughput benchmark: what its rows say of the recipes' own steps on 1, 2 and 4 ranks, and what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import ROOT, run_python, run_ranks

from benchmarks import train_single, train_step, train_sweep
from benchmarks.communication import Communication, CommunicationMeter
from benchmarks.train_plan import Pass, PassLog, gathers
from benchmarks.train_recipes import WordTokenizer, Work, forward_flops, rollout_flops
from wizard_engine.data.chat import Sample
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.parallel import Mesh, MeshOptions
from wizard_engine.planning.estimate import _times_gathered
from wizard_engine.planning.flops import flops_per_token, matrix_parameters
from wizard_engine.rl.trajectories import Rollout

CPU = torch.device("cpu")
RECIPES = ["sft", "stage_dpo", "reward", "rleif"]
SMALL = {"recipe": RECIPES, "preset": "tiny", "device": "cpu", "warmup": 1, "steps": 1}
WHOLE = SMALL | {"tokens": 128, "packs": 2}
CHUNKS = SMALL | {"tokens": 256, "document_tokens": 64, "sharding": {"recompute": "full"}}
LAYOUTS = {
    1: {"whole documents": WHOLE, "parts": CHUNKS},
    2: {"whole documents": WHOLE, "tp": CHUNKS | {"mesh": {"tp": 2}}},
    4: {"shard and copies": WHOLE | {"mesh": {"dp_replicate": 2}}, "shard and cp": CHUNKS | {"mesh": {"cp": 2}}},
}


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def results(request, tmp_path_factory):
    """Ranks and their rows by layout: one start of the ranks for all recipes and layouts."""
    out = tmp_path_factory.mktemp("rows") / "rows.json"
    script = ROOT / "tests" / "benchmarks" / "train_cases.py"
    done = run_ranks(request.param, script, out, json.dumps(LAYOUTS[request.param]), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, json.loads(out.read_text())


def rows_of(results):
    return [row for rows in results[1].values() for row in rows]


# Catches: a collective that is not counted, or counted on another axis; closed forms that are not those of the engine.
def test_bytes_are_those_of_the_closed_form(results):
    for row in rows_of(results):
        assert row["bytes_as_planned"] is True, row
        assert bool(row["bytes"]) == bool(row["planned_bytes"]) == (results[0] > 1), row
        if row["recipe"] != "rleif":
            assert row["bytes"] == row["planned_bytes"]


# Catches: tokens of ranks that share rows counted twice; steps of the warm-up among those measured.
def test_tokens_are_those_of_the_log(results):
    for row in rows_of(results):
        assert row["logged_tokens"] == sum(row["step_tokens"]) > 0, row
        sharing = 2 if row["name"] in ("tp 2", "dp_shard 2 x cp 2") else 1
        if row["recipe"] != "rleif":
            assert row["step_tokens"] == [row["tokens"] * row["packs"] * results[0] // sharing]


# Catches: attention over the length of the pack instead of each document's; a head that reward models do not have.
def test_operations_are_those_of_the_log(results):
    config = PRESETS["tiny"]
    for row in rows_of(results):
        if row["recipe"] == "rleif":
            continue
        each = row["step_flops"][0] / row["step_tokens"][0]
        head = 6 * config.width * config.vocab_size if row["recipe"] == "reward" else 0
        length = row["document_tokens"]
        assert each == pytest.approx(3 * flops_per_token(config, length) - head, rel=1e-9)
        assert each == pytest.approx(row["logged_flops_per_token"], rel=1e-9)


# Catches: a rate by the ranks with rows of their own instead of all ranks.
def test_rates_are_those_of_all_ranks(results):
    for row in rows_of(results):
        seconds, (tokens,), (flops,) = row["seconds"]["p50"], row["step_tokens"], row["step_flops"]
        assert row["tokens_per_second_per_gpu"] == pytest.approx(tokens / seconds / results[0])
        assert row["mfu"] == pytest.approx(flops / seconds / results[0] / (1e12 * row["peak_tflops"]))
        assert row["ranks"] == results[0] and row["backend"] == "gloo"


def test_rows_say_what_waits_what_phases_take_and_what_is_planned(results):
    for row in rows_of(results):
        axes = {name.split()[1] for name in row["bytes"]}
        assert axes <= set(row["exposed_seconds"]) <= axes | {"numbers"}
        assert 0 <= sum(row["exposed_share"].values()) < 1
        online = row["recipe"] == "rleif"
        assert len(row["phases"]) == (4 if online else 0)
        assert all(seconds > 0 for seconds in row["phases"].values())
        planned = row["predicted"]
        assert planned["seconds"] > 0 and planned["peak_memory_gib"] > 0 and row["peak_memory_gib"] > 0
        assert (planned["tokens_per_second_per_gpu"] is None) == online


# What a row is made of


def step(seconds, tokens, flops, waited=None, moved=None):
    return train_step.Step(seconds, Work(tokens, flops), Communication(moved or {}, waited or {}), {})


# Catches: a denominator of ranks with rows of their own; the mean of the ranks' seconds instead of the slowest.
def test_summary_counts_shared_rows_once_and_divides_by_all_ranks():
    first, second = [step(2.0, 100, 8e3, {"tp": 0.5})], [step(4.0, 100, 8e3, {"tp": 1.5})]
    row = train_step.summary("sft", [first, second], sharing=2, peak=1e3)
    assert row["step_tokens"] == [100] and row["seconds"]["p50"] == 4.0
    assert row["tokens_per_second_per_gpu"] == 12.5 and row["mfu"] == 1.0
    assert row["exposed_seconds"] == {"tp": 1.0} and row["exposed_share"] == {"tp": 0.25}
    unshared = train_step.summary("sft", [first, second], sharing=1, peak=1e3)
    assert unshared["step_tokens"] == [200] and unshared["tokens_per_second_per_gpu"] == 25.0


def test_bytes_that_differ_are_not_as_planned():
    one, two = {("gather", "shard"): 8}, {("gather", "shard"): 8, ("gather", "tp"): 4}
    assert train_step.as_planned("sft", one, one) and not train_step.as_planned("sft", two, one)
    assert train_step.as_planned("rleif", two, one) and not train_step.as_planned("rleif", two, {("sum", "copy"): 1})
    assert train_step.as_planned("rleif", one, {}) is None and train_step.as_planned("rleif", {}, {})
    assert train_step.as_planned("sft", one | {("sum", "numbers"): 8}, one)


def test_chunks_of_a_document_cost_as_much_as_the_document():
    config = PRESETS["tiny-mistral"]
    whole = forward_flops(config, [(0, 40)], 40)
    assert whole == pytest.approx(40 * flops_per_token(config, 40))
    assert forward_flops(config, [(0, 15), (15, 40)], 40) == pytest.approx(whole)
    head = 2 * config.width * config.vocab_size
    assert whole - forward_flops(config, [(0, 40)], 0) == pytest.approx(40 * head)


def test_online_step_reads_each_prompt_once():
    config = PRESETS["tiny"]

    def sample(prompt, answer):
        return Sample(np.asarray([*prompt, *answer], dtype=np.int32), np.zeros(len(prompt) + len(answer), np.float32))

    samples = [sample([1, 5, 6], [7, 8]), sample([1, 5, 6], [9, 9, 2])]
    rollout = Rollout([()] * 2, samples, ["", ""], [True, True], [2, 3], torch.zeros(5))
    head = config.width * config.vocab_size
    body, keys = 2 * (matrix_parameters(config) - head), 4 * config.layers * config.heads * config.head_width
    fed = 6 * body + keys * (1 + 2 + 3 + 4 + 4 + 5)
    read = 8 * body + keys * (1 + 2 + 3 + 4 + 5 + 4 + 5 + 6)
    expected = 5 * (fed + 5 * 2 * head) + 4 * fed + read + 8 * 2 * head + 3 * body + keys * 6
    assert rollout_flops(config, rollout) == pytest.approx(expected)


@pytest.mark.parametrize("layers", [2, 3, 4, 5])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_gathers_of_training_passes_are_those_of_the_planner(layers, tied, micro_batches):
    with torch.device("meta"):
        model = Transformer(replace(PRESETS["tiny"], layers=layers, tied=tied))
    counts = gathers(layers if tied else layers + 2, tied, [True] * micro_batches)
    times = _times_gathered(model, micro_batches)
    blocks = counts if tied else counts[1:-1]
    assert sum(blocks) == times["block"]
    if not tied:
        assert (counts[0], counts[-1]) == (times["embedding"], times["head"])


def test_what_a_place_still_holds_is_not_gathered_again():
    assert gathers(2, True, [False, False]) == [1, 1] and gathers(2, True, [False], again=True) == [0, 0]
    assert gathers(3, True, [False, False]) == [2, 1, 2] and gathers(4, True, [False] * 2) == [2, 2, 2, 2]


def test_passes_are_noted_with_their_tokens():
    log, model = PassLog(), Transformer(PRESETS["tiny"], seed=0)
    log.watch({"policy": model})
    inputs = torch.zeros(5, dtype=torch.int64), torch.arange(5), torch.tensor([0, 5], dtype=torch.int32), 5
    model(*inputs)
    with torch.no_grad():
        model(*inputs)
    assert log.take() == [Pass("policy", 5, True), Pass("policy", 5, False)] and log.take() == []


# Catches: a collective that goes on being counted, or no longer works, behind the block.
def test_meter_counts_inside_its_block_alone(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        before = {name: vars(dist.ProcessGroup).get(name) for name in ("allreduce", "allgather", "barrier")}
        with CommunicationMeter(Mesh(CPU)) as meter:
            dist.all_reduce(torch.ones(3))
            dist.all_reduce(torch.ones(3, dtype=torch.float64))
            dist.broadcast(torch.ones(2), 0, async_op=True).wait()
        dist.all_reduce(torch.ones(3))
        assert {name: vars(dist.ProcessGroup).get(name) for name in before} == before
        communication = meter.take()
        assert communication.bytes == {("sum", "world"): 12, ("sum", "numbers"): 24, ("broadcast", "numbers"): 8}
        assert set(communication.seconds) == {"world", "numbers"} and min(communication.seconds.values()) > 0
        assert meter.take() == Communication()
    finally:
        dist.destroy_process_group()


def test_word_tokenizer_round_trip():
    tokenizer = WordTokenizer(50)
    ids = [3, 49, 2, 17]
    text = tokenizer.decode(ids)
    assert text == "w3 w49 w17" and tokenizer.encode(text) == [3, 49, 17]
    assert [text[a:b] for a, b in tokenizer.offsets(ids)] == ["w3", "w49", "", "w17"]
    assert all(3 <= index < 50 for index in tokenizer.encode("USER: w2 w50 w wx tell me"))


# Files


def names_in(path):
    return {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}


# Catches: a trace that is made before the rows, or of all layers.
def test_row_is_on_the_disk_before_the_trace_which_is_of_one_layer(tmp_path, monkeypatch):
    rows, path, write = tmp_path / "rows.jsonl", tmp_path / "trace.json", train_step.write_trace

    def slow(*args):
        assert len(rows.read_text().splitlines()) == 1
        write(*args)
        raise OSError("the disk is full")

    monkeypatch.setattr(train_step, "write_trace", slow)
    arguments = ["--preset", "tiny", "--tokens", "64", "--steps", "1", "--device", "cpu"]
    assert train_step.main([*arguments, "--json", str(rows), "--trace", str(path)]) == 2
    assert json.loads(rows.read_text())["recipe"] == "sft"
    names = names_in(path)
    assert {"sft step", "policy", "policy.blocks.0", "policy.blocks.0.feed_forward.down", "policy.norm"} <= names
    assert not any("blocks.1" in str(name) for name in names)


def test_trace_of_the_single_gpu_step_has_ranges_by_module(tmp_path):
    train_single.trace(CPU, tmp_path / "trace.json", PRESETS["tiny"])
    assert {"forward", "backward", "update", "policy.blocks.0.attention_norm"} <= names_in(tmp_path / "trace.json")


TINY_RUN = ["--device", "cpu", "--preset", "tiny", "--tokens", "128"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--recipe", "stage-dpo"],
            "recipe: expected one of sft, stage_dpo, reward, rleif, got 'stage-dpo'; the nearest",
        ),
        (["--preset", "tinny"], "preset: expected one of .*got 'tinny'; the nearest is tiny"),
        (["--tokens", "1024"], r"document_tokens: expected 2 to 512 \(the model's context\), got 1024"),
        (["--document-tokens", "48"], "tokens: expected a whole number of documents of 48 .*got 128; give .*16, say"),
        (["--recipe", "reward", "--document-tokens", "128"], "whole number of pairs of documents of 128"),
        (["--preset", "70b", "--tokens", "4096"], "expected a step that fits .* GiB of a rank, got a planned peak of"),
        (["--mesh.tp", "2"], "tp=2, ranks = 1; .*start `torchrun --nproc-per-node"),
        (["--mesh.dp-shard", "4"], "mesh.dp_shard must divide .*torchrun"),
        (["--memory", "PATH"], r"memory: expected a GPU \(CUDA\), got --device cpu"),
        (["--plot", "PATH"], "plot: expected --sweep beside it"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--rates", "PATH"], "expected a JSON object of rates"),
        (["--sweep", "PATH"], "expected a file of layouts"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(arguments, message, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    arguments = [argument.replace("PATH", str(tmp_path / "absent")) for argument in arguments]
    assert train_step.main([*TINY_RUN, *arguments, "--json", str(rows)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("train_step: error: ")
    assert re.search(message, printed), printed
    assert list(tmp_path.iterdir()) == []


def test_unknown_option_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_step.main([*TINY_RUN, "--sharding.recompue", "full"])
    assert stopped.value.code == 2 and "the nearest is --sharding.recompute" in capsys.readouterr().err


def test_tp_that_does_not_divide_the_model_is_refused_before_the_ranks_meet():
    options = train_step.Options(preset="tiny", tokens=64, mesh=MeshOptions(tp=4))
    with pytest.raises(ValueError, match=r"mesh\.tp must divide kv_heads: tp=4, kv_heads=2"):
        train_step.check(options, 4, True)
    options = replace(options, mesh=MeshOptions(ep=2))
    with pytest.raises(ValueError, match=r"mesh\.ep: expected 1 for a model without experts, got 2"):
        train_step.check(options, 4, True)


# The sweep

SWEEP = """
preset = "tiny"
tokens = 64
steps = 1
device = "cpu"

[[layout]]
name = "does not divide"
mesh.tp = 3

[[layout]]
name = "one rank"
"""


@pytest.mark.slow
def test_sweep_goes_on_behind_a_layout_that_fails(tmp_path):
    file, rows, plot = tmp_path / "layouts.toml", tmp_path / "rows.jsonl", tmp_path / "plot.svg"
    file.write_text(SWEEP)
    done = run_python("-m", "benchmarks.train_step", "--sweep", file, "--json", rows, "--plot", plot)
    assert done.returncode == 1, done.stderr
    rows_read = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["name"] for row in rows_read] == ["does not divide", "one rank"]
    assert ["error" in row for row in rows_read] == [True, False]
    assert "mesh.tp must divide the ranks: tp=3" in rows_read[0]["error"] and rows_read[0]["recipe"] == "sft"
    assert "failed: train_step: error: mesh.tp must divide" in done.stdout and done.stdout.count("tokens/s/GPU") == 1
    picture = plot.read_text()
    assert picture.startswith("<svg") and "sft: tokens/s per GPU" in picture and "planned, dashed" in picture


def test_layouts_of_json_lines_override_the_command_line(tmp_path):
    path = tmp_path / "layouts.jsonl"
    path.write_text(
        '{"ranks": 2, "mesh.tp": 2}\n\n{"name": "b", "sharding": {"offload-optimizer": true}, "tokens": 8}\n'
    )
    layouts = train_sweep.read_layouts(path, {"tokens": 16, "recipe": ("sft", "reward")})
    assert [(one.name, one.ranks, one.recipes) for one in layouts] == [
        ("2 ranks", 2, ("sft", "reward")),
        ("b", 1, ("sft", "reward")),
    ]
    assert layouts[0].flags == ("--tokens", "16", "--recipe", "sft", "reward", "--mesh.tp", "2")
    assert layouts[1].flags[:2] == ("--tokens", "8") and layouts[1].flags[-1] == "--sharding.offload-optimizer"
    assert train_sweep.flags_of("sharding.offload_optimizer", False) == ["--sharding.no-offload-optimizer"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "tokens = ", "a.toml: expected TOML"),
        ("a.toml", "tokens = 4", "expected at least one layout, got none"),
        ("a.toml", "layout = 3", r"layout: expected tables \[\[layout\]\]"),
        ("a.toml", "[[layout]]\nmesh.tpp = 2", r"layout 1: mesh.tpp: expected a known option; the nearest is mesh.tp"),
        ("a.toml", "[[layout]]\nranks = 0", "ranks: expected a whole number of at least 1, got 0"),
        ("a.toml", "[[layout]]\npreset = 'tinny'", "layout 1: preset: expected one of"),
        ("a.jsonl", "{}\n{", "a.jsonl:2: expected a JSON object"),
        ("a.jsonl", "[1]", "a.jsonl:1: expected a JSON object, got"),
    ],
)
def test_bad_file_of_layouts_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        train_sweep.read_layouts(tmp_path / name, {})


def test_committed_layouts_can_be_read():
    layouts = train_sweep.read_layouts(Path(ROOT, "benchmarks", "layouts_cpu.toml"), {})
    assert sorted({layout.ranks for layout in layouts}) == [1, 2, 4]
    assert len({layout.name for layout in layouts}) == 2


@pytest.mark.parametrize(
    ("printed", "line"),
    [
        ("W noise\ntrain_step: error: tokens: expected 2\nRoot cause: x", "train_step: error: tokens: expected 2"),
        ("noise\n[rank1]: ValueError: no\nmore", "[rank1]: ValueError: no"),
        ("", "it printed nothing"),
    ],
)
def test_reason_of_a_failed_start(printed, line):
    assert train_sweep.reason(printed) == line

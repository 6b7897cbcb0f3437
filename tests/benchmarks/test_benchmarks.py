"""The benchmark harness: ratios, lines, absent peers, and that what is compared is the same work."""

import importlib.util
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmarks.__main__ as harness
from benchmarks.timing import interleave
from benchmarks.train import Ours, Theirs, check_same, pad
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample


def sample(*tokens: int, learned: int = 1) -> Sample:
    weights = np.zeros(len(tokens), np.float32)
    weights[-learned:] = 1
    return Sample(np.asarray(tokens, np.int32), weights)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `advance` moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_interleave_gives_rate_spread_and_ratio_to_the_peer(clock):
    waits = {"ours": iter([9.0, 1.0, 2.0, 3.0]), "theirs": iter([9.0, 4.0, 4.0, 4.0])}
    order = []

    def work(name: str):
        return lambda: (order.append(name), clock(next(waits[name])))

    ours, theirs = interleave(
        "op", {name: work(name) for name in waits}, items=10, unit="x/s", repeats=3, peer="theirs"
    )
    assert order[2:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert ours["seconds"]["p50"] == 2.0 and ours["rate"] == 5.0
    assert ours["ratio"]["p50"] == 2.0 and ours["ratio"]["peer"] == "theirs"
    assert ours["ratio"]["p20"] == pytest.approx(np.percentile([4.0, 2.0, 4 / 3], 20))
    assert "ratio" not in theirs


def test_line_holds_median_spread_rate_and_ratio():
    row = {"op": "packing", "shape": "N=5", "variant": "C++", "rate": 1234.5, "unit": "sequences/s"}
    row |= {"seconds": {"p20": 0.001, "p50": 0.002, "p80": 0.003}}
    row |= {"ratio": {"peer": "Python", "p50": 30.0, "p20": 29.0, "p80": 31.0}}
    for expected in ("packing", "N=5", "2.00 ms (1.00 to 3.00)", "1,234 sequences/s", "30.00x Python (29.00 to 31.00)"):
        assert expected in harness.line_of(row)


def test_absent_peer_is_said_and_the_rest_is_measured(monkeypatch, capsys):
    asked = []
    module = SimpleNamespace(PEER="no_such_peer", run=lambda **options: asked.append(options) or [])
    monkeypatch.setattr(harness.importlib, "import_module", lambda name: module)
    assert harness.measure("train", quick=True) == []
    assert asked == [{"quick": True, "peer": False}]
    assert "train: no_such_peer is not installed" in capsys.readouterr().out


def test_main_writes_json_lines_with_what_numbers_depend_on(tmp_path, capsys):
    assert harness.main(["packing", "--quick", "--json", str(tmp_path / "out.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["C++", "Python"]
    assert {"commit", "hardware", "python", "torch", "date", "seed", "threads", "shape"} <= lines[0].keys()
    assert lines[0]["ratio"]["p50"] == pytest.approx(lines[1]["seconds"]["p50"] / lines[0]["seconds"]["p50"])
    assert "x Python" in capsys.readouterr().out


def test_main_refuses_an_unknown_name(capsys):
    with pytest.raises(SystemExit) as stopped:
        harness.main(["packign"])
    assert stopped.value.code == 2 and "got packign" in capsys.readouterr().err


def test_pad_holds_the_positions_that_collate_packs():
    samples = [sample(1, 5, 6, 7, learned=2), sample(1, 8)]
    tokens, targets, mask = pad(samples)
    batch = collate(samples)
    assert torch.equal(tokens[mask.bool()], batch.tokens)
    assert torch.equal(targets[mask.bool()] >= 0, batch.weights > 0)
    assert torch.equal(targets[targets >= 0], batch.targets[batch.weights > 0])
    assert targets[1, 1:].tolist() == [-100, -100] and pad(samples[1:])[2] is None


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_train_step_is_that_of_transformers_from_the_same_weights():
    from benchmarks.peers import build, examples, transformers_twin

    tokenizer, samples = examples(4)
    ours = Ours(build("tiny", tokenizer))
    theirs = Theirs(transformers_twin(ours.model, tokenizer))
    check_same(ours, theirs, samples)
    for step in (ours.step, theirs.step):
        step(samples)
    check_same(ours, theirs, samples)
    with torch.no_grad():
        ours.model.norm.weight[0] += 0.1
    with pytest.raises(AssertionError, match=r"loss|gradient norm"):
        check_same(ours, theirs, samples)

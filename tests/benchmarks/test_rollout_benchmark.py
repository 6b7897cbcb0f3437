"""The rollout benchmark on tiny shapes, and the server's under a small load."""

import json
from itertools import count

import pytest
import torch

from benchmarks import rollout, serve
from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.model import PRESETS

CPU = torch.device("cpu")


def test_rollout_benchmark_measures_what_it_says():
    decode_1, decode_4, whole = rollout.measure("tiny", CPU, small=True)
    assert (decode_1["batch"], decode_4["batch"]) == (1, 4) and decode_4["bytes"] > decode_1["bytes"] > 0
    assert decode_1["seconds"]["p50"] > 0 and decode_4["tokens_per_second"] > decode_1["tokens_per_second"]
    assert whole["sequences"] == 8 and whole["preemptions"] == 0 and whole["steps"] >= 16
    assert "8 x 16 tokens" in rollout.text_of(whole) and "batch 4" in rollout.text_of(decode_4)
    assert not any("error" in row for row in (decode_1, decode_4, whole))


# Catches: limits that the first sequences reach before the last one is timed.
@pytest.mark.parametrize("lookahead", [False, True])
def test_the_timed_batch_is_constant_while_prompts_take_many_steps(lookahead, monkeypatch):
    seen = []

    class Watched(Engine):
        def __init__(self, model, **options):
            super().__init__(model, **options, lookahead=lookahead)

        def step(self):
            grown = super().step()
            seen.append(len(grown))
            return grown

    monkeypatch.setattr(rollout, "Engine", Watched)
    row = rollout.decode(rollout.empty(PRESETS["tiny"], CPU), 48, 32, 8, most=100)
    assert "error" not in row and row["seconds"]["p50"] > 0
    assert seen[-8:] == [48] * 8 and len([n for n in seen if n < 48]) > 15


def test_a_batch_that_changes_and_a_capture_are_errors_and_no_figures(monkeypatch):
    model = rollout.empty(PRESETS["tiny"], CPU)
    engine = Engine(model, cache_tokens=640, max_sequences=3)
    for new in (40, 40, 9):
        engine.add([1, 2, 3], Sampling(new))
    engine.step()
    seconds, error = rollout.timed_steps(engine, 3, 20)
    assert seconds == [] and error == "step 7: expected a batch of 3, got 3, 2 after it"
    captures = count()
    monkeypatch.setattr(Engine, "captures", property(lambda self: next(captures)))
    decode, _, whole = rollout.measure("tiny", CPU, small=True)
    for row in (decode, whole):
        assert "seconds" not in row and "expected no capture of a graph while" in row["error"]
        assert "error: expected no capture" in rollout.text_of(row)


def test_rows_are_written_as_they_come(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"

    def rows(preset, device):
        for batch in (1, 2):
            assert len(out.read_text().splitlines()) == batch - 1
            yield {"op": "decode_step", "batch": batch, "keys": 5, "error": "planted"}
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rollout.gpu_timing, "environment", lambda device: {"gpu": "none"})
    monkeypatch.setattr(rollout, "measure", rows)
    with pytest.raises(RuntimeError, match="the device is lost"):
        rollout.main(["--out", str(out)])
    assert [json.loads(line)["batch"] for line in out.read_text().splitlines()] == [1, 2]
    monkeypatch.setattr(
        rollout, "measure", lambda preset, device: iter([{"op": "rollout", "sequences": 4, "error": "x"}])
    )
    assert rollout.main(["--out", str(out)]) == 1 and "rollout      4 sequences   error: x" in capsys.readouterr().out


def test_rollout_benchmark_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rollout.main([]) == 2 and "expected a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_server_benchmark_loses_nothing():
    pytest.importorskip("uvicorn")
    first, whole = serve.run(quick=True)
    assert first["variant"] == "first token" and 0 < first["seconds"]["p50"] < whole["seconds"]["p99"]
    assert whole["requests_per_second"] > 0 and "100, 64 at once" in whole["shape"]

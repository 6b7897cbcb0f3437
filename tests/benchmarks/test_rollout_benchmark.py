"""The rollout benchmark on tiny shapes, and the server's under a small load."""

import pytest
import torch

from benchmarks import rollout, serve


def test_rollout_benchmark_measures_what_it_says():
    decode_1, decode_4, whole = rollout.measure("tiny", torch.device("cpu"), small=True)
    assert (decode_1["batch"], decode_4["batch"]) == (1, 4) and decode_4["bytes"] > decode_1["bytes"] > 0
    assert decode_1["seconds"]["p50"] > 0 and decode_4["tokens_per_second"] > decode_1["tokens_per_second"]
    assert whole["sequences"] == 8 and whole["preemptions"] == 0 and whole["steps"] >= 16
    assert "8 x 16 tokens" in rollout.text_of(whole) and "batch 4" in rollout.text_of(decode_4)


def test_rollout_benchmark_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rollout.main([]) == 2 and "expected a GPU" in capsys.readouterr().err


def test_server_benchmark_loses_nothing():
    pytest.importorskip("uvicorn")
    first, whole = serve.run(quick=True)
    assert first["variant"] == "first token" and 0 < first["seconds"]["p50"] < whole["seconds"]["p99"]
    assert whole["requests_per_second"] > 0 and "100, 64 at once" in whole["shape"]

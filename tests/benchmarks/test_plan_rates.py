"""The rates that the planner assumes, measured on a CPU with small shapes: what they are and what they add up to."""

import dataclasses
import json

import pytest
import torch

from benchmarks import plan_rates
from wizard_engine.model import PRESETS
from wizard_engine.planning import planner as plan
from wizard_engine.planning import rates

GPU = plan.Gpu(8.0, 1e11, 1e10, 1e9, 1e9)


@pytest.mark.parametrize("preset", ["tiny-mistral", "tiny-mixtral"])
def test_every_rate_is_measured_and_makes_a_plan(monkeypatch, tmp_path, preset):
    config = dataclasses.replace(PRESETS[preset], max_positions=512)
    measured = plan_rates.measure(config, 128, torch.device("cpu"), GPU)
    assert set(measured) == {"matrix", "attention_forward", "attention_backward", "memory", "block_seconds"} | (
        {"grouped"} if config.experts else set()
    )
    assert all(value > 0 for value in measured.values())
    monkeypatch.setitem(plan.GPUS, "H200", GPU)
    whole = plan_rates.compared(measured, preset, config, 128, "H200")
    assert whole["planned_over_measured"] == pytest.approx(whole["planned_block_seconds"] / measured["block_seconds"])
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(whole))
    assert rates.rates_of(path).matrix == measured["matrix"]


def test_a_machine_without_a_gpu_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert plan_rates.main([]) == 2 and "expected a GPU, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan_rates.main(["--preset", "7c"])

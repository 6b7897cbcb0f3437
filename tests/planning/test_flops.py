"""Operation counts against counted ones, peaks, the stopwatch."""

import itertools
import time
from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wizard_engine.planning import flops as throughput


@dataclass
class Shapes:
    vocab_size: int = 50
    width: int = 12
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 6
    ffn_width: int = 20
    window: int | None = None
    experts: int = 0
    experts_per_token: int = 2


@pytest.mark.parametrize("experts", [0, 5])
def test_flops_are_those_of_the_matrix_products(experts):
    """Counted by torch over the products of one full (unmasked) forward; the mask is counted by hand."""
    c, s = Shapes(experts=experts), 7
    x = torch.randn(s, c.width)
    with FlopCounterMode(display=False) as counter:
        for _ in range(c.layers):
            for outputs in (c.heads * c.head_width, c.kv_heads * c.head_width, c.kv_heads * c.head_width):
                x @ torch.randn(c.width, outputs)
            torch.randn(s, c.heads * c.head_width) @ torch.randn(c.heads * c.head_width, c.width)
            for _ in range(3 * (c.experts_per_token if experts else 1)):
                x @ torch.randn(c.width, c.ffn_width)
            if experts:
                x @ torch.randn(c.width, experts)
            for token, _ in itertools.product(range(s), range(c.heads)):
                torch.randn(1, c.head_width) @ torch.randn(c.head_width, token + 1)
                torch.randn(1, token + 1) @ torch.randn(token + 1, c.head_width)
        x @ torch.randn(c.width, c.vocab_size)
    assert throughput.flops_per_token(c, s) * s == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 9), (5, 1)])
def test_mean_keys_is_the_mean_over_the_sequence(length, window):
    seen = [min(token + 1, window or length) for token in range(length)]
    assert throughput.mean_keys(length, window) == pytest.approx(sum(seen) / length, rel=1e-12)


def test_flops_refuse_an_empty_sequence():
    with pytest.raises(ValueError, match="sequence_length: expected at least 1"):
        throughput.flops_per_token(Shapes(), 0)


def test_peak_is_measured_once_and_plausible():
    peak = throughput.peak_flops("cpu")
    began = time.perf_counter()
    assert throughput.peak_flops(torch.device("cpu")) == peak
    assert time.perf_counter() - began < 0.1
    assert 1e8 < peak < 1e14


def test_peak_of_a_known_gpu_is_the_table_s(monkeypatch):
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert throughput.peak_flops("cuda") == peak


def test_meter_divides_by_the_time_since_the_last_step(monkeypatch):
    clock = iter([100.0, 101.0, 101.5, 104.0, 105.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1000.0)
    meter = throughput.Meter(10.0, "cpu", world_size=2)
    with meter.waiting():
        pass
    first = meter.step(800)
    assert first["tokens_per_second"] == 200 and first["tokens_per_second_per_device"] == 100
    assert (first["mfu"], first["seconds"], first["wait_seconds"]) == (1.0, 4.0, 0.5)
    assert meter.step(5)["tokens_per_second"] == 5
    assert first["peak_memory_gib"] > 0.01

"""Operation counts against counted ones, peaks, the stopwatch."""

import itertools
import time
from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wizard_engine.planning import flops, rates


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
    assert flops.flops_per_token(c, s) * s == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 9), (5, 1)])
def test_mean_keys_is_the_mean_over_the_sequence(length, window):
    seen = [min(token + 1, window or length) for token in range(length)]
    assert flops.mean_keys(length, window) == pytest.approx(sum(seen) / length, rel=1e-12)


def test_flops_refuse_an_empty_sequence():
    with pytest.raises(ValueError, match="sequence_length: expected at least 1"):
        flops.flops_per_token(Shapes(), 0)


def test_peak_is_measured_once_and_plausible():
    peak = rates.peak_flops("cpu")
    began = time.perf_counter()
    assert rates.peak_flops(torch.device("cpu")) == peak
    assert time.perf_counter() - began < 0.1
    assert 1e8 < peak < 1e14


def test_peak_of_a_known_gpu_is_the_table_s(monkeypatch):
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert rates.peak_flops("cuda") == peak

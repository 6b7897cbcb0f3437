"""Rates of hardware: what data sheets promise, what work of each kind gets of it, and what a machine is measured at."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from wizard_engine.data.text_files import read_json

# Dense peak of tensor cores in bf16, operations per second, from the makers' data sheets; the first name that fits.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Gpu:
    """A GPU of the makers' data sheets and its links, per direction.

    Attributes:
        memory_gib: what torch sees.   flops: dense bf16, per second.   bandwidth: of its memory, bytes/s.
        node_link: to the GPUs of its node, bytes/s.   network: to other nodes, bytes/s.   node: GPUs of a node.
    """

    memory_gib: float
    flops: float
    bandwidth: float
    node_link: float
    network: float
    node: int = 8


GPUS = {
    "A100-80GB": Gpu(79.2, PEAK_FLOPS["A100"], 2.04e12, 300e9, 25e9),
    "H100": Gpu(79.1, PEAK_FLOPS["H100"], 3.35e12, 450e9, 50e9),
    "H200": Gpu(139.8, PEAK_FLOPS["H200"], 4.8e12, 450e9, 50e9),
    "B200": Gpu(178.0, PEAK_FLOPS["B200"], 8.0e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class Rates:
    """Shares of what the data sheet promises that work of each kind gets.

    `python -m benchmarks.plan_rates` measures those of one GPU and writes a file for --rates.
    """

    matrix: float = 0.75
    """Products with matrices."""
    grouped: float = 0.62
    """Products of experts."""
    attention_forward: float = 0.60
    attention_backward: float = 0.45
    memory: float = 0.80
    """What reads and writes memory: norms, activations, the optimizer."""
    link: float = 0.80
    """Collectives, of the slowest link that they need."""
    latency: float = 20e-6
    """Start of a collective, seconds."""
    reserve_gib: float = 4.0
    """Of a GPU's memory, what the context, the communication library and fragments take, GiB."""


def rates_of(path: Path | None) -> Rates:
    """Rates of a JSON file, or the assumptions.

    Raises:
        ValueError: the file is no JSON object of rates.
    """
    if path is None:
        return Rates()
    try:
        fields = read_json(path)
        known = {name: float(value) for name, value in fields.items() if name in Rates.__dataclass_fields__}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON object of rates, got {error}") from error
    if not known or not all(0 < value < float("inf") for value in known.values()):
        raise ValueError(f"{path}: expected positive {', '.join(Rates.__dataclass_fields__)}, got {fields}")
    return Rates(**known)


def peak_flops(device: torch.device | str) -> float:
    """Operations per second that the device can do: bf16 tensor cores of a known GPU, else a measured fp32 GEMM.

    The measurement takes about a quarter of a second, uses torch's threads, and is made once per process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((flops for model, flops in PEAK_FLOPS.items() if model in name), None)
        if known is not None:
            return known
    return _measured_peak(str(device), torch.get_num_threads())


@functools.cache
def _measured_peak(device: str, threads: int, size: int = 512, seconds: float = 0.25) -> float:
    """Best rate of a square fp32 GEMM, operations per second."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    out, best, deadline = a @ b, float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        float(out[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best

"""How fast a run is against what the machine can do: operations per token, the machine's peak, a stopwatch.

A forward pass takes, per token, 2 operations (a multiplication and an addition) for every weight of a matrix that the
token is multiplied with (N: all blocks, of experts those that it is sent to, and the output head, not the input
embedding, which is looked up), and in every layer 2 H C operations for each key it is scored against and 2 H C for each
value it adds up. With causal masking a token of a sequence of length s sees (s + 1) / 2 keys on average, fewer with a
sliding window:

    forward  = 2 N + 4 L H C keys          training = 3 forward (backward takes twice the forward) = 6 N + 12 L H C keys

MFU = training operations per second and device / peak of the device. Recomputation does not count as work.
"""

import functools
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

TRAINING_FACTOR = 3
# Dense peak of tensor cores in bf16, operations per second, from the makers' data sheets; the first name that fits.
GPU_PEAKS = (
    ("B200", 2250e12), ("GB200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12),
    ("H800", 989e12), ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12), ("A10", 125e12), ("RTX 4090", 165e12),
)  # fmt: skip


class Shapes(Protocol):
    """The sizes of a transformer that the count needs (a ModelConfig has them)."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    window: int | None
    experts: int
    experts_per_token: int


def matrix_parameters(config: Shapes) -> int:
    """N: weights of all matrices that a token is multiplied with, its experts' alone and the output head included."""
    attention = config.width * config.head_width * 2 * (config.heads + config.kv_heads)
    feed_forward = 3 * config.width * config.ffn_width * (config.experts_per_token if config.experts else 1)
    router = config.width * config.experts
    return config.layers * (attention + feed_forward + router) + config.width * config.vocab_size


def mean_keys(sequence_length: float, window: int | None = None) -> float:
    """Keys that a token of a causal sequence sees on average, itself included.

    Without a window (s + 1) / 2; with a window w < s: (w (w + 1) / 2 + (s - w) w) / s.
    """
    seen = min(window or sequence_length, sequence_length)
    return (seen * (seen + 1) / 2 + (sequence_length - seen) * seen) / sequence_length


def flops_per_token(config: Shapes, sequence_length: float) -> float:
    """Operations of a forward pass per token; times TRAINING_FACTOR for a training step (formula above).

    Args:
        config: the transformer's sizes.
        sequence_length: tokens of a sequence (of one document, not of a packed row).
    Raises:
        ValueError: sequence_length is below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length: expected at least 1, got {sequence_length}")
    keys = mean_keys(sequence_length, config.window)
    return 2 * matrix_parameters(config) + 4 * config.layers * config.heads * config.head_width * keys


def peak_flops(device: torch.device | str) -> float:
    """Operations per second that the device can do: bf16 tensor cores of a known GPU, else a measured fp32 GEMM.

    The measurement takes about a quarter of a second, uses torch's threads, and is made once per process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in GPU_PEAKS if part in name), None)
        if known is not None:
            return known
    return _measured_peak(str(device), torch.get_num_threads())


@functools.cache
def _measured_peak(device: str, threads: int, size: int = 512, seconds: float = 0.25) -> float:
    """Best rate of a square fp32 GEMM, operations per second."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    out, best, deadline = left @ right, float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        float(out[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device | str) -> float:
    """Largest memory so far, GiB: allocated on a GPU, the process's resident set on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """Stopwatch of a training loop.

    Args:
        flops_per_token: of the work that is timed, so a training step's is TRAINING_FACTOR x the forward's.
        device: whose peak the MFU refers to.
        world_size: devices that share the tokens.
    """

    def __init__(self, flops_per_token: float, device: torch.device | str, world_size: int = 1) -> None:
        self.flops_per_token, self.device, self.world_size = flops_per_token, torch.device(device), world_size
        self._waited = 0.0
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in this block counts as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def step(self, tokens: float) -> dict[str, float]:
        """Figures of the time since the last call (or the start), for `tokens` of all ranks together.

        Returns:
            tokens_per_second, tokens_per_second_per_device, mfu (share of peak, 0 to 1), seconds, wait_seconds,
            peak_memory_gib.
        """
        now = time.perf_counter()
        seconds, waited = now - self._began, self._waited
        self._began, self._waited = now, 0.0
        per_device = tokens / seconds / self.world_size
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": per_device,
            "mfu": per_device * self.flops_per_token / peak_flops(self.device),
            "seconds": seconds,
            "wait_seconds": waited,
            "peak_memory_gib": peak_memory_gib(self.device),
        }

"""A supervised training step of the 7B shapes in bf16 on one GPU, with as many layers as fit: tokens/s, MFU, memory.

What gpu_check measures; the step of any preset, recipe and number of ranks is benchmarks/train_step.py. The engine's
own step: forward over packed sequences, log-probabilities of the targets, backward, clip, AdamW with fp32 masters,
gradients and moments. How many layers fit follows from the peaks of models with one and with two layers.

    MFU = 3 sum_i len_i flops_per_token(len_i) / seconds / peak, recomputation not counted
"""

import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks.gpu_timing import percentiles
from benchmarks.train_trace import activities, module_ranges
from wizard_engine.loss import sft_loss
from wizard_engine.model.config import PRESETS, ModelConfig
from wizard_engine.model.transformer import Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import Sharding, parallelize
from wizard_engine.parallel.mesh import Mesh
from wizard_engine.planning.flops import TRAINING_FACTOR, flops_per_token
from wizard_engine.planning.rates import peak_flops
from wizard_engine.runtime.memory import peak_memory_gib

DOCUMENTS = (3900, 2700, 2100, 1700, 1400, 1100, 900, 700, 550, 430, 330, 240, 170, 110, 44, 10)
# Share of the memory that the estimate fills: allocations do not pack without gaps.
FILLED = 0.97
SEQUENCE = 4096
LR, CLIP = 1e-5, 1.0
# Recomputation and lengths of what gpu_check measures, the most telling first.
CASES = (("full", (SEQUENCE,) * 4), ("none", (SEQUENCE,)), ("none", DOCUMENTS))


@dataclass
class State:
    """A model that computes in bf16, and its optimizer."""

    model: Transformer
    optimizer: AdamW


def build(config: ModelConfig, device: torch.device, recompute: str = "none") -> State:
    """Random weights of a configuration, made on the device."""
    with torch.device("meta"):
        model = Transformer(config)
    parallelize(model, Mesh(device), Sharding(dtype="bfloat16", recompute=recompute))
    optimizer = AdamW(model, weight_decay=0.1)
    engine = optimizer.sharded
    engine.master.normal_(std=config.init_std, generator=torch.Generator(device).manual_seed(0))
    for name, _, values in engine.shards(engine.master):
        if len(engine.shapes[name]) == 1:
            values.fill_(1.0)
    engine.publish()
    return State(model, optimizer)


@dataclass(frozen=True)
class Packed:
    """A packed row of random tokens in documents, each token's successor its target."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    marks: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], vocab_size: int, device: torch.device) -> "Packed":
        """Documents of these lengths."""
        total = sum(lengths)
        drawn = torch.randint(0, vocab_size, (total + 1,), generator=torch.Generator().manual_seed(1)).to(device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        marks = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        return cls(drawn[:-1], drawn[1:], positions, marks, max(lengths))


def step_phases(state: State, batch: Packed):
    """The step in three calls: forward to the loss, backward, update."""
    loss: list[Tensor] = []

    def forward() -> None:
        hidden = state.model(batch.tokens, batch.positions, batch.marks, batch.longest)
        weights = torch.ones_like(batch.targets, dtype=torch.float32)
        out = sft_loss(hidden, state.model.head_weight, batch.targets, weights, num_tokens=len(batch.targets))
        loss.append(out.loss)

    def backward() -> None:
        loss.pop().backward()

    def update() -> None:
        state.optimizer.sharded.finish()
        state.optimizer.clip(CLIP)
        state.optimizer.step(LR)
        state.optimizer.zero_grad()

    return {"forward": forward, "backward": backward, "update": update}


def timed_step(state: State, batch: Packed) -> dict[str, float]:
    """Seconds of each part of one step on a GPU, and of the whole."""
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    calls = step_phases(state, batch)
    for call in calls.values():
        call()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    torch.cuda.synchronize()
    seconds = [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return dict(zip(calls, seconds)) | {"step": sum(seconds)}


def training_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Operations of a training step over documents of these lengths."""
    return TRAINING_FACTOR * sum(length * flops_per_token(config, length) for length in lengths)


def layers_that_fit(one: float, two: float, whole: float, most: int) -> int:
    """Layers of a model that takes `one` bytes with one layer and `two` with two, in `whole` bytes; at least one."""
    return max(1, min(most, 1 + int((FILLED * whole - one) / max(1.0, two - one))))


def _peak_memory(config: ModelConfig, batch: Packed, device: torch.device, recompute: str) -> float:
    """Largest memory of one step, bytes; the model is gone afterwards."""
    torch.cuda.reset_peak_memory_stats(device)
    state = build(config, device, recompute)
    for call in step_phases(state, batch).values():
        call()
    torch.cuda.synchronize(device)
    return peak_memory_gib(device) * 2**30


def _forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run(
    device: torch.device, *, recompute: str = "none", lengths: Sequence[int] = DOCUMENTS, steps: int = 5
) -> dict[str, Any]:
    """Figures of the largest model that fits: fewer layers are tried where memory runs out all the same.

    Args:
        recompute: none, selective or full.   lengths: of the packed sequences, tokens.
        steps: that are measured.
    """
    full = PRESETS["7b"]
    batch = Packed.of(lengths, full.vocab_size, device)
    peaks = []
    for layers in (1, 2):
        peaks.append(_peak_memory(replace(full, layers=layers), batch, device, recompute))
        _forget()
    layers = layers_that_fit(*peaks, torch.cuda.mem_get_info(device)[0], full.layers)
    while True:
        try:
            return _measured(replace(full, layers=layers), batch, lengths, device, recompute, steps)
        except torch.OutOfMemoryError:
            if layers == 1:
                raise
            print(f"{layers} layers do not fit, trying {layers - 1}")
            layers -= 1
        _forget()


def _measured(
    config: ModelConfig, batch: Packed, lengths: Sequence[int], device: torch.device, recompute: str, steps: int
) -> dict[str, Any]:
    state = build(config, device, recompute)
    for _ in range(2):
        timed_step(state, batch)
    torch.cuda.reset_peak_memory_stats(device)
    timed_steps = [timed_step(state, batch) for _ in range(steps)]
    memory = peak_memory_gib(device)
    seconds = {name: percentiles([step[name] for step in timed_steps]) for name in timed_steps[0]}
    flops, median = training_flops(config, lengths), seconds["step"]["p50"]
    return {
        "preset": "7b",
        "layers": config.layers,
        "layers_of_preset": PRESETS["7b"].layers,
        "tokens": sum(lengths),
        "documents": len(lengths),
        "recompute": recompute,
        "parameters": config.num_parameters,
        "seconds": seconds,
        "tokens_per_second": sum(lengths) / median,
        "flops": flops,
        "tflops": flops / median / 1e12,
        "mfu": flops / median / peak_flops(device),
        "peak_tflops": peak_flops(device) / 1e12,
        "peak_memory_gib": memory,
        "steps": steps,
    }


def trace(device: torch.device, path: Path, config: ModelConfig | None = None) -> None:
    """Write a Chrome trace of one step of one layer, ranges named by module; call it when all rows are written.

    Args:
        config: of the model; None: the 7B shapes.
    """
    one = replace(config or PRESETS["7b"], layers=1)
    state, batch = build(one, device), Packed.of((min(SEQUENCE, one.max_positions),), one.vocab_size, device)
    for call in step_phases(state, batch).values():
        call()
    kinds = activities(device)
    with module_ranges({"policy": state.model}), torch.profiler.profile(activities=kinds) as profile:
        for name, call in step_phases(state, batch).items():
            with record_function(name):
                call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profile.export_chrome_trace(str(path))


def text_of(row: dict[str, Any]) -> str:
    """One line of figures."""
    times = ", ".join(f"{name} {1e3 * value['p50']:.0f} ms" for name, value in row["seconds"].items())
    return (
        f"7B shapes, {row['layers']} of {row['layers_of_preset']} layers, {row['tokens']} tokens in "
        f"{row['documents']} documents, bf16, recomputation {row['recompute']}: "
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['tflops']:.0f} TFLOP/s, MFU {row['mfu']:.1%} of "
        f"{row['peak_tflops']:.0f} TFLOP/s (3 x forward operations, documents apart, recomputation not counted), "
        f"peak {row['peak_memory_gib']:.1f} GiB; {times}"
    )

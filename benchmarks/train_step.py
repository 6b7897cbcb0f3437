"""One training step of the 7B shapes in bf16 on one GPU, with as many layers as fit: tokens/s, MFU, peak memory.

Forward over a packed row of documents, log-probabilities of the targets, backward, AdamW with an fp32 master copy. bf16
parameters and gradients and fp32 master and moments take 16 bytes a parameter. How many layers fit follows from the
peaks of models with one and with two layers.

    MFU = 3 sum_i len_i flops_per_token(len_i) / seconds / peak
"""

import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_timing import spread
from kernels.adamw import adamw
from wizard_engine.loss import sft_loss
from wizard_engine.model.config import PRESETS, ModelConfig
from wizard_engine.model.transformer import Transformer
from wizard_engine.throughput import TRAINING_FACTOR, flops_per_token, peak_flops

DOCUMENTS = (3900, 2700, 2100, 1700, 1400, 1100, 900, 700, 550, 430, 330, 240, 170, 110, 44, 10)
# Share of the memory that the estimate fills: allocations do not pack without gaps.
FILLED = 0.93
NUMBERS = {"lr": 1e-5, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}


@dataclass
class State:
    """A model whose parameters and gradients are views of flat buffers, with fp32 master and moments."""

    model: Transformer
    parameters: Tensor
    gradients: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> State:
    """Random weights of a configuration, made on the device."""
    with torch.device("meta"):
        model = Transformer(config)
    flat = torch.empty(config.num_parameters, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    flat.normal_(std=config.init_std, generator=generator)
    state = State(model, flat, torch.zeros_like(flat), flat.float(), *(_zeros(flat) for _ in range(2)))
    offset = 0
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = slice(offset, offset + parameter.numel())
            offset = part.stop
            if parameter.dim() == 1:
                flat[part] = 1.0
                state.master[part] = 1.0
            view = nn.Parameter(flat[part].view(parameter.shape))
            view.grad = state.gradients[part].view(parameter.shape)
            setattr(module, name, view)
    assert offset == flat.numel(), f"{offset} parameters of {flat.numel()} placed"
    return state


def _zeros(flat: Tensor) -> Tensor:
    return torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)


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


def parts(state: State, batch: Packed):
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
        state.step += 1
        buffers = (state.master, state.exp_avg, state.exp_avg_sq, state.gradients)
        adamw(*buffers, step=state.step, copy=state.parameters, **NUMBERS)
        state.gradients.zero_()

    return {"forward": forward, "backward": backward, "update": update}


def timed_step(state: State, batch: Packed) -> dict[str, float]:
    """Seconds of each part of one step on a GPU, and of the whole."""
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    calls = parts(state, batch)
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


def _peak(config: ModelConfig, batch: Packed, device: torch.device) -> float:
    """Largest memory of one step, bytes; the model is gone afterwards."""
    torch.cuda.reset_peak_memory_stats(device)
    state = build(config, device)
    for call in parts(state, batch).values():
        call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run(device: torch.device, steps: int = 5) -> dict[str, Any]:
    """Figures of the largest model that fits: fewer layers are tried where memory runs out all the same."""
    full, lengths = PRESETS["7b"], DOCUMENTS
    batch = Packed.of(lengths, full.vocab_size, device)
    peaks = []
    for layers in (1, 2):
        peaks.append(_peak(replace(full, layers=layers), batch, device))
        _forget()
    layers = layers_that_fit(*peaks, torch.cuda.mem_get_info(device)[0], full.layers)
    while True:
        try:
            return _measured(replace(full, layers=layers), batch, lengths, device, steps)
        except torch.OutOfMemoryError:
            if layers == 1:
                raise
            print(f"{layers} layers do not fit, trying {layers - 1}")
            layers -= 1
        _forget()


def _measured(
    config: ModelConfig, batch: Packed, lengths: Sequence[int], device: torch.device, steps: int
) -> dict[str, Any]:
    state = build(config, device)
    for _ in range(2):
        timed_step(state, batch)
    torch.cuda.reset_peak_memory_stats(device)
    found = [timed_step(state, batch) for _ in range(steps)]
    seconds = {name: spread([step[name] for step in found]) for name in found[0]}
    flops, median = training_flops(config, lengths), seconds["step"]["p50"]
    return {
        "preset": "7b", "layers": config.layers, "layers_of_preset": PRESETS["7b"].layers, "tokens": sum(lengths),
        "documents": len(lengths), "parameters": config.num_parameters, "seconds": seconds,
        "tokens_per_second": sum(lengths) / median, "flops": flops, "tflops": flops / median / 1e12,
        "mfu": flops / median / peak_flops(device), "peak_tflops": peak_flops(device) / 1e12,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30, "steps": steps,
    }  # fmt: skip

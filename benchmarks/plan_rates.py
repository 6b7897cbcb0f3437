"""The rates that `python -m wizard_engine plan` assumes of one GPU, measured at a model's shapes, and its seconds for
one block against the block itself.

    python -m benchmarks.plan_rates --preset 7b --tokens 8192 --gpu H200 --out rates.json
    python -m wizard_engine plan --preset 7b --gpus 8 --gpu H200 --rates rates.json

Rates are shares of the data sheet's: of its bf16 rate for products, attention and experts, of its bandwidth for what
reads and writes memory. Times are medians of kernels with a cold L2 (benchmarks/gpu_timing.py). The goal is a block
within 10 % of its plan.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.command_line import Parser
from benchmarks.gpu_timing import Call, normal, time_calls
from kernels.adamw import adamw
from kernels.attention import attention
from kernels.grouped_matmul import expert_mlp
from kernels.moe_route import moe_route
from kernels.rms_norm import rms_norm
from kernels.rope import rope_tables
from kernels.swiglu import swiglu
from wizard_engine.model import PRESETS, ModelConfig, Transformer
from wizard_engine.parallel.mesh import MeshShape
from wizard_engine.planning import planner as plan
from wizard_engine.planning.flops import mean_keys

GOAL = 0.10


def both(forward: Call, inputs: list[Tensor]) -> tuple[Call, Call]:
    """Calls of a forward, and of a forward and its backward."""

    def whole() -> Any:
        out = forward()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return forward, whole


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is timed, and the sizes that its operations and bytes follow from."""

    calls: dict[str, Call]
    shapes: list[tuple[int, int]]
    state_elements: int


def calls_of(config: ModelConfig, tokens: int, device: torch.device) -> Problem:
    """The parts of a block over a packed row of one document, and the block."""
    c, dtype = config, torch.bfloat16 if device.type == "cuda" else torch.float32
    like = {"dtype": dtype, "device": device}
    marks = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    x = normal(tokens, c.width, seed=1, **like).requires_grad_()
    qkv_width = (c.heads + 2 * c.kv_heads) * c.head_width
    shapes = [(qkv_width, c.width), (c.width, c.heads * c.head_width)]
    shapes += [] if c.experts else [(2 * c.ffn_width, c.width), (c.width, c.ffn_width)]
    weights = [(0.02 * normal(*shape, seed=n, **like)).requires_grad_() for n, shape in enumerate(shapes)]
    rows = [normal(tokens, shape[1], seed=9, **like).requires_grad_() for shape in shapes]
    calls: dict[str, Call] = {}
    for n, (row, weight) in enumerate(zip(rows, weights)):
        _, calls[f"matrix {n}"] = both(lambda r=row, w=weight: r @ w.T, [row, weight])
    q, k, v = (
        normal(tokens, n, c.head_width, seed=n, **like).requires_grad_() for n in (c.heads, c.kv_heads, c.kv_heads)
    )
    calls["attention forward"], calls["attention"] = both(
        lambda: attention(q, k, v, marks, tokens, window=c.window), [q, k, v]
    )
    if c.experts:
        gate_up = (0.02 * normal(c.experts, 2 * c.ffn_width, c.width, seed=5, **like)).requires_grad_()
        down = (0.02 * normal(c.experts, c.width, c.ffn_width, seed=6, **like)).requires_grad_()
        with torch.no_grad():
            routing = moe_route(x, normal(c.experts, c.width, seed=7, **like), experts_per_token=c.experts_per_token)
        _, calls["experts"] = both(lambda: expert_mlp(x, gate_up, down, routing), [x, gate_up, down])
    scale, inner = torch.ones(c.width, **like), normal(tokens, 2 * c.ffn_width, seed=8, **like)
    calls["norm"], calls["activation"] = lambda: rms_norm(x.detach(), scale, 1e-5), lambda: swiglu(inner)
    size = min(2**26, c.width * c.ffn_width)
    state = [torch.zeros(size, device=device) for _ in range(4)]
    copy = torch.zeros(size, dtype=torch.bfloat16, device=device)
    calls["optimizer"] = lambda: adamw(
        *state, lr=1e-4, betas=(0.9, 0.95), epsilon=1e-8, step=1, weight_decay=0.1, copy=copy
    )
    calls["block"] = _block(config, tokens, device, dtype, marks)
    return Problem(calls, shapes, size)


def measure(config: ModelConfig, tokens: int, device: torch.device, gpu: plan.Gpu) -> dict[str, float]:
    """Rates of a GPU as `plan.Rates` has them, and `block_seconds`, forward and backward of one block.

    Args:
        tokens: of a packed row of one document.   gpu: whose data sheet the rates are shares of.
    """
    c, problem = config, calls_of(config, tokens, device)
    shapes, size = problem.shapes, problem.state_elements
    itemsize = 2 if device.type == "cuda" else 4
    us = {name: timing.us for name, timing in time_calls(problem.calls, device).items()}
    products = sum(6 * tokens * a * b for a, b in shapes)
    scores = 4 * c.heads * c.head_width * mean_keys(tokens, c.window) * tokens
    moved = itemsize * tokens * (2 * c.width + 3 * c.ffn_width) + size * (28 + 2)
    measured = {
        "matrix": products / sum(us[f"matrix {n}"] for n in range(len(shapes))) * 1e6 / gpu.flops,
        "attention_forward": scores / us["attention forward"] * 1e6 / gpu.flops,
        "attention_backward": 2.5 * scores / (us["attention"] - us["attention forward"]) * 1e6 / gpu.flops,
        "memory": moved / (us["norm"] + us["activation"] + us["optimizer"]) * 1e6 / gpu.bandwidth,
        "block_seconds": us["block"] * 1e-6,
    }
    if c.experts:
        work = 6 * tokens * c.experts_per_token * 3 * c.width * c.ffn_width
        measured["grouped"] = work / us["experts"] * 1e6 / gpu.flops
    return measured


def _block(config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype, marks: Tensor) -> Call:
    """Forward and backward of one block."""
    one = dataclasses.replace(config, layers=1, vocab_size=64)
    with device:
        block = Transformer(one, seed=None).blocks[0].to(dtype)
    cos_sin = rope_tables(torch.arange(tokens, device=device), config.head_width, config.rope_base)
    x = normal(tokens, config.width, dtype=dtype, device=device, seed=3).requires_grad_()
    return both(lambda: block(x, None, *cos_sin, marks, tokens)[1], [x, *block.parameters()])[1]


def compared(measured: dict[str, float], preset: str, config: ModelConfig, tokens: int, gpu: str) -> dict[str, Any]:
    """The measured rates, the plan of one block with them, and how far it is from the block."""
    rates = plan.Rates(**{name: x for name, x in measured.items() if name in plan.Rates.__dataclass_fields__})
    one = dataclasses.replace(config, layers=1)
    planner = plan.Planner(plan.Options(preset, 1, gpu=gpu, sequence=tokens), rates, one)
    layout = plan.Layout(MeshShape(1, 1, 1, 1, 1), "none", 1, 1)
    planned = sum(planner.computing(layout, tokens, head=False).values())
    return measured | {"planned_block_seconds": planned, "planned_over_measured": planned / measured["block_seconds"]}


def main(args: list[str] | None = None) -> int:
    """Measure and write; returns the exit status: 1 where the block's plan is further off than the goal."""
    reader = Parser("python -m benchmarks.plan_rates", __doc__)
    reader.add_argument("--preset", default="7b", help="of the model; default: %(default)s")
    reader.add_argument("--tokens", type=int, default=8192, help="of a row of one document; default: %(default)s")
    reader.add_argument("--gpu", default="H200", help=f"of {', '.join(plan.GPUS)}; default: %(default)s")
    reader.add_argument("--out", type=Path, default=Path("rates.json"), help="default: %(default)s")
    options = reader.parse_args(args)
    reader.names("--preset", [options.preset], list(PRESETS))
    reader.names("--gpu", [options.gpu], list(plan.GPUS))
    if not torch.cuda.is_available():
        print("plan_rates: expected a GPU, got none; nothing was measured", file=sys.stderr)
        return 2
    device, config = torch.device("cuda:0"), PRESETS[options.preset]
    comparison = compared(
        measure(config, options.tokens, device, plan.GPUS[options.gpu]),
        options.preset,
        config,
        options.tokens,
        options.gpu,
    )
    about = gpu_timing.environment(device)
    options.out.write_text(
        json.dumps(comparison | {"tokens": options.tokens, "preset": options.preset} | about, indent=1)
    )
    for name, value in comparison.items():
        print(f"{name:24}{value:.4g}")
    return int(abs(comparison["planned_over_measured"] - 1) > GOAL)


if __name__ == "__main__":
    sys.exit(main())

"""A training step of every recipe with a tiny random model, against the CPU: loss, gradient norm, every gradient.

    python -m benchmarks.tiny_steps                  on the GPU, in fp32 and bf16

The reference is the plain path in float64 on the CPU, with the weights that the tested dtype holds; the allowance is
twice what the same path in the tested dtype is off by, as for kernels, and 16 units of fp32: a step is a chain of them.
Gradients are taken relative to the largest element of each, all together: the worst of them counts. A mixture replays
the reference's choice of experts.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.check_cases import Case, Row
from benchmarks.command_line import Parser
from benchmarks.kernel_checks import UNIT
from kernels import use_backend
from wizard_engine.data.batch import Batch, collate
from wizard_engine.data.chat import Sample
from wizard_engine.loss import dpo_loss, policy_loss, process_loss, ranking_loss, sft_loss, value_loss
from wizard_engine.model import ModelConfig, Routes, ScoringModel, Transformer
from wizard_engine.optim import AdamW
from wizard_engine.parallel import Sharding, parallelize
from wizard_engine.parallel.mesh import Mesh
from wizard_engine.rl.answer_batches import answer_batch

VOCABULARY, PROMPT = 97, 6
LENGTHS = (9, 17, 5, 12)
LAYERS, KV_HEADS = 2, 2
# A clip that nothing reaches: at its edge a rounding decides whether a token has a gradient.
FAR = 50.0
CPU = torch.device("cpu")


def config(experts: int = 0, device: torch.device = CPU) -> ModelConfig:
    """Grouped heads, a window, a head of its own; on a GPU of 7B's widths, whose kernels are compiled already."""
    width, head, ffn, layers = (4096, 128, 2048, 1) if device.type == "cuda" else (48, 16, 40, LAYERS)
    return ModelConfig(
        vocab_size=VOCABULARY,
        width=width,
        layers=layers,
        heads=2 * KV_HEADS,
        kv_heads=KV_HEADS,
        head_width=head,
        ffn_width=ffn // 4 if experts else ffn,
        window=8,
        tied=False,
        init_std=0.7 * width**-0.5,
        experts=experts,
    )


def samples(seed: int) -> list[Sample]:
    """Sequences that begin with one of two prompts, uneven weights behind it."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, VOCABULARY, (2, PROMPT))
    sample_list = []
    for number, length in enumerate(LENGTHS):
        answer = rng.integers(0, VOCABULARY, length)
        weights = np.concatenate((np.zeros(PROMPT), 0.5 + rng.random(length))).astype(np.float32)
        sample_list.append(Sample(np.concatenate((prompts[number % 2], answer)).astype(np.int32), weights))
    return sample_list


def batch(seed: int) -> Batch:
    """The samples, packed."""
    return collate(samples(seed))


def _drawn(count: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _wide(model: nn.Module) -> torch.dtype:
    """Of what a loss takes beside hidden states."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def _sft(model: Transformer, device: torch.device, routes: Routes) -> Tensor:
    packed = batch(0).to(device)
    hidden, weights = model(*packed.inputs, routes), packed.weights.to(_wide(model))
    return sft_loss(hidden, model.head_weight, packed.targets, weights, num_tokens=43.0, shard=model.shard).loss


def _dpo(model: Transformer, device: torch.device, routes: Routes) -> Tensor:
    packed = batch(1).to(device)
    reference = -40 + _drawn(len(LENGTHS), device, _wide(model), 1)
    out = dpo_loss(
        model(*packed.inputs, routes),
        model.head_weight,
        packed.targets,
        packed.weights.to(_wide(model)),
        packed.cu_seqlens,
        reference,
        beta=0.3,
        num_pairs=2,
        nll=0.2,
        num_chosen_tokens=26.0,
        shard=model.shard,
    )
    return out.loss


def _last_scores(model: ScoringModel, device: torch.device, routes: Routes) -> Tensor:
    packed = batch(2).to(device)
    return model(*packed.inputs, routes)[packed.cu_seqlens[1:].long() - 1]


def _ranking(model: ScoringModel, device: torch.device, routes: Routes) -> Tensor:
    better, worse = _last_scores(model, device, routes)[:, 0].chunk(2)
    return ranking_loss(better, worse, _drawn(len(better), device, _wide(model), 3).abs(), num_pairs=2)


def _process(model: ScoringModel, device: torch.device, routes: Routes) -> Tensor:
    scores = _last_scores(model, device, routes)
    return process_loss(scores, torch.arange(len(scores), device=device) % 3 - 1, num_steps=len(scores))


def _answers(model: nn.Module, device: torch.device):
    parallel = getattr(model, "body", model).parallel
    return answer_batch(samples(4), [PROMPT] * len(LENGTHS), parallel, device)


def _policy(model: Transformer, device: torch.device, routes: Routes) -> Tensor:
    answers, wide = _answers(model, device), _wide(model)
    hidden = answers.hidden(model, model(*answers.inputs, routes))
    count = len(answers.targets)
    behaviour, advantages = -5 + 0.3 * _drawn(count, device, wide, 5), _drawn(count, device, wide, 6)
    out = policy_loss(
        hidden,
        model.head_weight,
        answers.targets,
        behaviour,
        advantages,
        clip=FAR,
        num_tokens=float(count),
        cu_seqlens=answers.cu_seqlens,
        reference=behaviour - 0.1,
        kl=0.1,
        entropy=0.05,
        sampled=behaviour + 0.05,
        importance_cap=FAR,
        temperature=0.9,
        shard=model.shard,
    )
    return out.loss


def _critic(model: ScoringModel, device: torch.device, routes: Routes) -> Tensor:
    answers = _answers(model, device)
    values = answers.scores_before(model(*answers.inputs, routes))[:, 0]
    old, returns = (_drawn(len(values), device, values.dtype, seed) for seed in (7, 8))
    return value_loss(values, old, returns, clip=FAR, num_tokens=float(len(values)))[0]


@dataclass(frozen=True)
class Step:
    """A recipe's step: what makes its model in fp32 on the CPU, of the sizes for a device, and its loss."""

    name: str
    build: Callable[[torch.device], nn.Module]
    loss: Callable[[nn.Module, torch.device, Routes], Tensor]


def _language(experts: int = 0) -> Callable[[torch.device], Transformer]:
    return lambda device: Transformer(config(experts, device), seed=3)


def _scoring(outputs: int, *, surprise: bool = False) -> Callable[[torch.device], ScoringModel]:
    def build(device: torch.device) -> ScoringModel:
        model = ScoringModel(config(device=device), outputs, surprise=surprise)
        model.body.initialise(5)
        last = list(model.score.modules())[-1]
        std = 0.7 * last.weight.shape[1] ** -0.5
        nn.init.normal_(last.weight, std=std, generator=torch.Generator().manual_seed(1))
        return model

    return build


STEPS = (
    Step("sft", _language(), _sft),
    Step("sft of a mixture", _language(4), _sft),
    Step("stage_dpo", _language(), _dpo),
    Step("reward ranking", _scoring(1), _ranking),
    Step("reward process", _scoring(3), _process),
    Step("reward process, body frozen", _scoring(3, surprise=True), _process),
    Step("rleif policy", _language(), _policy),
    Step("rleif critic", _scoring(1), _critic),
)


@dataclass
class Figures:
    """Loss and gradients by parameter, in float64 on the CPU."""

    loss: Tensor
    grads: dict[str, Tensor]

    @property
    def norm(self) -> float:
        """Of all gradients."""
        return float(torch.cat([grad.flatten() for grad in self.grads.values()]).norm())


def figures(
    step: Step, model: nn.Module, device: torch.device, experts: Tensor | None = None
) -> tuple[Figures, Routes]:
    """Loss and gradients of a step with this model, on the device; experts as given, or the router's."""
    routes = Routes() if experts is None else Routes(experts.to(device))
    model.zero_grad()
    loss = step.loss(model, device, routes)
    (loss + routes.loss(getattr(model, "config", None), 43.0)).backward()
    grads = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return Figures(loss.detach().double().cpu(), grads), routes


def engine_norm(step: Step, model: nn.Module, device: torch.device, experts: Tensor | None) -> float:
    """The gradient norm that the engine finds for the same step."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    parallelize(model, Mesh(device), Sharding(dtype=dtype))
    optimizer = AdamW(model, weight_decay=0.1)
    routes = Routes() if experts is None else Routes(experts.to(device))
    loss = step.loss(model, device, routes)
    (loss + routes.loss(model.config, 43.0)).backward()
    optimizer.sharded.finish()
    return float(optimizer.clip(0.0))


def largest_error(measured: Figures, ref: Figures) -> float:
    """Worst error of the loss and the gradients, each relative to its largest element; infinite for NaN."""
    pairs = [(measured.loss, ref.loss), *((measured.grads[name], grad) for name, grad in ref.grads.items())]
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
    return max(float("inf") if error != error else error for error in errors)


def rows(step: Step, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """What a step on the device, on the backend of the moment, is off by."""
    model = step.build(device)
    # Scores stay in fp32, as in training.
    getattr(model, "body", model).to(dtype)
    with use_backend("reference"):
        ref, routes = figures(step, copy.deepcopy(model).double(), CPU)
        experts = routes.stacked() if model.config.experts else None
        base, _ = figures(step, copy.deepcopy(model), CPU, experts)
    measured, _ = figures(step, copy.deepcopy(model).to(device), device, experts)
    norm = engine_norm(step, model.to(device), device, experts)
    error, allowed = largest_error(measured, ref), 2 * largest_error(base, ref) + 16 * UNIT
    norm_error = abs(norm - ref.norm) / ref.norm
    right = measured.grads.keys() == ref.grads.keys() and error <= allowed and norm_error <= allowed
    worst = max(ref.grads, key=lambda name: float((measured.grads[name] - ref.grads[name]).abs().max()))
    return [
        {
            "status": "right" if right else "wrong",
            "loss": float(measured.loss),
            "reference_loss": float(ref.loss),
            "norm": norm,
            "reference_norm": ref.norm,
            "error": error,
            "norm_error": norm_error,
            "allowed": allowed,
            "note": "" if right else f"error {error:.2e}, of the norm {norm_error:.2e}, allowed {allowed:.2e}; {worst}",
        }
    ]


def cases(device: torch.device) -> list[Case]:
    """Name of each step in each dtype, and what gives its rows."""
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)
    return [
        (f"{step.name} {str(dtype).removeprefix('torch.')}", lambda s=step, d=dtype: rows(s, device, d))
        for dtype in dtypes
        for step in STEPS
    ]


def main(args: list[str] | None = None) -> int:
    """Run and print every step; returns the exit status: 1 where one is wrong, 2 without a GPU."""
    Parser("python -m benchmarks.tiny_steps", __doc__).parse_args(args)
    if not torch.cuda.is_available():
        print("tiny_steps: expected a GPU, got none; nothing was run", file=sys.stderr)
        return 2
    all_rows = [{"case": name} | row for name, run in cases(torch.device("cuda:0")) for row in run()]
    print("\n".join(json.dumps(row) for row in all_rows))
    return int(any(row["status"] == "wrong" for row in all_rows))


if __name__ == "__main__":
    sys.exit(main())

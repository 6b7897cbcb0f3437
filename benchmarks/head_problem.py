"""Log-probabilities of targets under a language model's head, as a measured operation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.gpu_timing import normal
from benchmarks.kernel_problems import SEED_STEP, Problem, Tensors, Work, whole_numbers


def linear_logprob_formula(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits in the dtype of the inputs, their log-softmax in at least fp32."""
    logits = hidden @ weight.T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, targets.long()[:, None])[:, 0]


@dataclass(frozen=True)
class LinearLogprob(Problem):
    """T tokens, V vocabulary entries, width D. The backward recomputes the logits: 6 T V D FLOPs count that product."""

    tokens: int
    vocab_size: int
    width: int

    op: ClassVar[str] = "linear_logprob"
    rough: ClassVar[tuple[str, ...]] = ("hidden", "dlogprob")
    gradients: ClassVar[tuple[str, ...]] = ("hidden", "weight")
    whole: ClassVar[frozenset[str]] = frozenset(("weight", "dweight"))
    is_matrix: ClassVar[bool] = True

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob",)

    @property
    def row_elements(self) -> int:
        return self.vocab_size

    @property
    def label(self) -> str:
        return f"T={self.tokens} V={self.vocab_size} D={self.width}"

    def work(self, phase: str, itemsize: int) -> Work:
        operands = (self.tokens + self.vocab_size) * self.width * itemsize
        products, passes = (3, 2) if phase == "backward" else (1, 1)
        return Work(products * 2 * self.tokens * self.vocab_size * self.width, passes * operands + 4 * self.tokens)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        def draw(i: int, *shape: int, kind: torch.dtype = dtype) -> Tensor:
            return normal(*shape, dtype=kind, device=device, seed=seed * SEED_STEP + i)

        weight = draw(1, self.vocab_size, self.width, kind=torch.float32) * self.width**-0.5
        return {
            "hidden": draw(0, self.tokens, self.width),
            "weight": weight.to(dtype),
            "targets": self._targets(device, seed),
            "dlogprob": draw(3, self.tokens, kind=torch.float32),
        }

    def _targets(self, device: torch.device, seed: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(self.tokens, dtype=torch.int64, device=device)
        return whole_numbers(torch.int64, device, seed)(0, self.vocab_size - 1, self.tokens)

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["LinearLogprob", Tensors]:
        """Hidden states whose largest logit is 128 above the others, so that its probability is 1."""
        draw = whole_numbers(dtype, device, seed)
        pick = whole_numbers(torch.int64, device, seed + 1)
        weight, best = draw(-2, 2, self.vocab_size, self.width), pick(0, self.vocab_size - 1, self.width)
        weight[best, torch.arange(self.width, device=device)] = 3
        hidden = torch.zeros(self.tokens, self.width, dtype=dtype, device=device)
        hidden[torch.arange(self.tokens, device=device), pick(0, self.width - 1, self.tokens)] = 128
        cotangents = draw(-2, 2, self.tokens).float()
        return self, {
            "hidden": hidden,
            "weight": weight,
            "targets": self._targets(device, seed + 2),
            "dlogprob": cotangents,
        }

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.linear_logprob import linear_logprob

        return (linear_logprob(tensors["hidden"], tensors["weight"], tensors["targets"])[0],)

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return (linear_logprob_formula(tensors["hidden"], tensors["weight"], tensors["targets"]),)

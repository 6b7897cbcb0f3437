"""The check of one operation: its inputs, its results on a device, and the rule that says whether they are right.

`ref` is the plain path in float64 on the CPU, with the numbers that the tested dtype holds; `base` the same path in the
tested dtype; the rule is that of benchmarks/kernel_checks.py. Gradients are results like others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.check_cases import Row
from benchmarks.kernel_checks import UNIT, largest_error
from kernels import use_backend

Tensors = dict[str, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Widths of a head, a row, a feed-forward block, of the hidden states of losses, and a vocabulary."""

    head: int
    width: int
    ffn: int
    hidden: int
    vocab: int

    @classmethod
    def of(cls, device: torch.device) -> "Sizes":
        """Those of 7B on a GPU, smaller ones of the same kernels for losses; small ones for the interpreter."""
        return cls(128, 4096, 14336, 1024, 3200) if device.type == "cuda" else cls(16, 24, 40, 24, 70)


@dataclass(frozen=True)
class Operation:
    """A name, the public functions that it covers, inputs in float64, and the function of them by name.

    grads: inputs whose gradients are results.   wide: inputs that stay in fp32, whatever the dtype.
    """

    name: str
    covers: tuple[str, ...]
    inputs: Callable[[Sizes], Tensors]
    function: Callable[..., Any]
    grads: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()

    def __call__(self, device: torch.device, dtype: torch.dtype) -> list[Triple]:
        """(out, ref, base) of each result, by the backend of the moment and by the plain path."""
        rounded = self._drawn(device, dtype)
        out = self._results({name: x.to(device) for name, x in rounded.items()})
        with use_backend("reference"):
            base = self._results(rounded)
            ref = self._results({name: x.double() if x.is_floating_point() else x for name, x in rounded.items()})
        return list(zip(out, ref, base, strict=True))

    def run(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The results on the device alone."""
        return self._results({name: x.to(device) for name, x in self._drawn(device, dtype).items()})

    def _drawn(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        return {name: self._rounded(name, x, dtype) for name, x in self.inputs(Sizes.of(device)).items()}

    def _rounded(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if not x.is_floating_point() else x.to(torch.float32 if name in self.wide else dtype)

    def _results(self, tensors: Tensors) -> list[Tensor]:
        """Outputs, then gradients of the differentiable ones, each weighed by numbers of its own."""
        leaves = {name: x.clone().requires_grad_(name in self.grads) for name, x in tensors.items()}
        outs = self.function(**leaves)
        outs = [x for x in (outs if isinstance(outs, tuple) else (outs,)) if isinstance(x, Tensor)]
        results = [x.detach().cpu() for x in outs]
        if self.grads:
            live = [x for x in outs if x.requires_grad]
            cotangents = [_cotangent(x, place) for place, x in enumerate(live)]
            grads = torch.autograd.grad(live, [leaves[name] for name in self.grads], cotangents)
            results += [grad.cpu() for grad in grads]
        return results


def _cotangent(x: Tensor, place: int) -> Tensor:
    """Numbers that every dtype holds."""
    drawn = torch.randint(-8, 9, x.shape, generator=torch.Generator().manual_seed(50 + place))
    return (drawn / 8).to(x.device, x.dtype)


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, float64."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(low: int, high: int, *shape: int, seed: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers from low to high - 1."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def marks(*lengths: int) -> Tensor:
    """Where sequences of these lengths start, and where the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What is tested: bf16 first, on a GPU alone."""
    return (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)


def verdict(triples: Sequence[Triple]) -> Row:
    """The row of an operation: right, or which of its results is off by how much."""
    wrong, worst = [], 0.0
    for place, (out, ref, base) in enumerate(triples):
        error = largest_error(out, ref) if out.shape == ref.shape else float("inf")
        limit = 2 * largest_error(base, ref) + 4 * UNIT * largest_error(ref, torch.zeros_like(ref))
        if limit:
            worst = max(worst, error / limit)
        if not error <= limit:
            wrong.append(f"result {place} of {len(triples)}: error {error:.3e}, limit {limit:.3e}")
    return {"status": "wrong" if wrong else "right", "error_over_limit": worst, "note": "; ".join(wrong)[:500]}


def rows(operation: Callable[..., list[Triple]], device: torch.device, dtype: torch.dtype) -> list[Row]:
    """What became of an operation on the device, by the backend of the moment."""
    return [verdict(operation(device, dtype))]

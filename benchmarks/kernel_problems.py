"""What a measured operation is: names of its tensors, inputs, plain formula, counts of work; and the row operations.

Tensors go by name: inputs, outputs, and `d` + name for the gradient of either.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import normal

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], tuple[Tensor, ...]]
# Distance of the seeds of two cases, more than the tensors that one case draws.
SEED_STEP = 101


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one call."""

    flops: int
    bytes: int


class Problem:
    """One operation at one shape.

    Class attributes: its `op`, prefixes of its kernels' `tables` where they are others, its `phases` and those of them
    that are `timed`; inputs that have a gradient (`gradients`), tensors whose rows may have any scale (`rough`),
    tensors without a row dim (`whole`), whether products of matrices are most of its work (`is_matrix`), whether it
    writes its inputs (`in_place`).
    """

    op: ClassVar[str]
    tables: ClassVar[tuple[str, ...]] = ()
    phases: ClassVar[tuple[str, ...]] = ("forward", "backward")
    timed: ClassVar[tuple[str, ...]] = ("forward", "backward")
    rough: ClassVar[tuple[str, ...]] = ()
    gradients: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[frozenset[str]] = frozenset()
    is_matrix: ClassVar[bool] = False
    in_place: ClassVar[bool] = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the function returns."""
        raise NotImplementedError

    @property
    def row_elements(self) -> int:
        """Elements that the plain formula makes of each row besides its tensors."""
        return 0

    @property
    def label(self) -> str:
        """The shape as text."""
        raise NotImplementedError

    def work(self, phase: str, itemsize: int) -> Work:
        """Operations and bytes of a call in a dtype of that many bytes."""
        raise NotImplementedError

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        """Random inputs, and gradients that come in."""
        raise NotImplementedError

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["Problem", Tensors]:
        """The problem and inputs of small whole numbers whose results are exact but for their own rounding."""
        raise NotImplementedError

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """This project's function."""
        raise NotImplementedError

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The same in plain PyTorch, in the dtype of the tensors."""
        raise NotImplementedError

    def other_forms(self) -> tuple[Function, ...]:
        """Further plain forms, whose rounding is as good a measure of the dtype as the formula's."""
        return ()


def call_of(problem: Problem, function: Function, tensors: Tensors, phase: str) -> Callable[[], Tensors]:
    """What is timed: the forward with what a backward needs kept, or the backward alone into fresh gradients."""
    leaves = {name: tensor.detach() for name, tensor in tensors.items()}
    for name in problem.gradients:
        if name in leaves:
            leaves[name].requires_grad_()
    leaf_names = [name for name in problem.gradients if name in leaves]
    if phase != "backward":
        return lambda: dict(zip(problem.outputs, function(leaves)))
    outs = function(leaves)
    coming = [tensors[f"d{name}"] for name in problem.outputs]

    def backward() -> Tensors:
        grads = torch.autograd.grad(outs, [leaves[name] for name in leaf_names], coming, retain_graph=True)
        return dict(zip((f"d{name}" for name in leaf_names), grads))

    return backward


def whole_numbers(dtype: torch.dtype, device: torch.device, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from low to high."""
        return torch.randint(low, high + 1, shape, generator=generator).to(device=device, dtype=dtype)

    return draw


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def rms_norm_formula(x: Tensor, weight: Tensor, residual: Tensor | None = None, epsilon: float = 1e-5):
    """Llama's: statistics in at least fp32, cast, weight; with a residual, of the sum, which is returned too."""
    residual_sum = x if residual is None else x + residual
    wide = residual_sum if residual_sum.dtype == torch.float64 else residual_sum.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    y = normed.to(x.dtype) * weight
    return y if residual is None else (y, residual_sum)


@dataclass(frozen=True)
class RmsNorm(Problem):
    """Root-mean-square norm of (T, D) rows, alone or of their sum with a residual stream, which is returned too."""

    tokens: int
    width: int
    residual: bool = False
    epsilon: float = 1e-5

    op: ClassVar[str] = "rms_norm"
    rough: ClassVar[tuple[str, ...]] = ("x", "residual", "dy", "ds")
    gradients: ClassVar[tuple[str, ...]] = ("x", "weight", "residual")
    whole: ClassVar[frozenset[str]] = frozenset(("weight", "dweight"))

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("y", "s") if self.residual else ("y",)

    @property
    def label(self) -> str:
        return f"T={self.tokens} D={self.width}" + (" residual" if self.residual else "")

    def work(self, phase: str, itemsize: int) -> Work:
        passes = {("forward", False): 2, ("backward", False): 3}.get((phase, self.residual), 4)
        operations = (8 if phase == "backward" else 4) + self.residual
        elements = self.tokens * self.width
        return Work(operations * elements, passes * elements * itemsize)

    def _names(self) -> list[str]:
        return ["x", "dy"] + (["residual", "ds"] if self.residual else [])

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        drawn = {
            name: normal(self.tokens, self.width, dtype=dtype, device=device, seed=seed * SEED_STEP + i)
            for i, name in enumerate(self._names())
        }
        weight = normal(self.width, dtype=torch.float32, device=device, seed=seed * SEED_STEP + 9)
        return drawn | {"weight": (1 + 0.1 * weight).to(dtype)}

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["RmsNorm", Tensors]:
        """Rows of signs times a power of two, so that the root mean square is that power."""
        draw = whole_numbers(dtype, device, seed)
        x = (2 * draw(0, 1, self.tokens, self.width) - 1) * 2.0 ** draw(-2, 2, self.tokens, 1)
        tensors = {"x": x, "weight": draw(-2, 2, self.width), "dy": draw(-2, 2, self.tokens, self.width)}
        if self.residual:
            tensors |= {"x": 3 * x, "residual": -2 * x, "ds": draw(-2, 2, self.tokens, self.width)}
        return replace(self, epsilon=1e-30), tensors

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.rms_norm import rms_norm

        more = (tensors["residual"],) if self.residual else ()
        return _as_tuple(rms_norm(tensors["x"], tensors["weight"], self.epsilon, *more))

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return _as_tuple(rms_norm_formula(tensors["x"], tensors["weight"], tensors.get("residual"), self.epsilon))


def rope_formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of (T, heads, C) by tables of (T, C/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (t.reshape(x.shape[0], 1, -1).to(x.dtype) for t in (cos, sin))
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class Rope(Problem):
    """Rotation of the queries and keys of T tokens; its backward, the turn by the negative angle, is not timed."""

    tokens: int
    heads: int
    kv_heads: int
    width: int

    op: ClassVar[str] = "rope"
    timed: ClassVar[tuple[str, ...]] = ("forward",)
    rough: ClassVar[tuple[str, ...]] = ("q", "k", "dq_turned", "dk_turned")
    gradients: ClassVar[tuple[str, ...]] = ("q", "k")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("q_turned", "k_turned")

    @property
    def label(self) -> str:
        return f"T={self.tokens} H={self.heads} K={self.kv_heads} C={self.width}"

    def work(self, phase: str, itemsize: int) -> Work:
        elements = (self.heads + self.kv_heads) * self.tokens * self.width
        return Work(3 * elements, 2 * elements * itemsize)

    def _tables(self, device: torch.device) -> Tensors:
        from kernels.rope import rope_tables

        cos, sin = rope_tables(torch.arange(self.tokens, device=device), self.width, 10_000.0)
        return {"cos": cos, "sin": sin}

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        heads = {"q": self.heads, "k": self.kv_heads, "dq_turned": self.heads, "dk_turned": self.kv_heads}
        drawn = {
            name: normal(self.tokens, count, self.width, dtype=dtype, device=device, seed=seed * SEED_STEP + i)
            for i, (name, count) in enumerate(heads.items())
        }
        return drawn | self._tables(device)

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["Rope", Tensors]:
        """Turns by quarters of a circle."""
        draw = whole_numbers(dtype, device, seed)
        heads = {"q": self.heads, "k": self.kv_heads, "dq_turned": self.heads, "dk_turned": self.kv_heads}
        drawn = {name: draw(-9, 9, self.tokens, count, self.width) for name, count in heads.items()}
        tables = self._tables(device)
        quarter = draw(0, 3, self.tokens, self.width // 2).float()
        cos = (quarter == 0).float() - (quarter == 2).float()
        sin = (quarter == 1).float() - (quarter == 3).float()
        return self, drawn | {name: x.reshape(tables[name].shape) for name, x in (("cos", cos), ("sin", sin))}

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.rope import rope

        return rope(*(tensors[name] for name in ("q", "k", "cos", "sin")))

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return tuple(rope_formula(tensors[name], tensors["cos"], tensors["sin"]) for name in ("q", "k"))


def swiglu_formula(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class SwiGlu(Problem):
    """Gated activation of (T, 2 F) rows."""

    tokens: int
    width: int

    op: ClassVar[str] = "swiglu"
    rough: ClassVar[tuple[str, ...]] = ("gate_up", "dy")
    gradients: ClassVar[tuple[str, ...]] = ("gate_up",)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("y",)

    @property
    def label(self) -> str:
        return f"T={self.tokens} F={self.width}"

    def work(self, phase: str, itemsize: int) -> Work:
        operations, passes = (10, 5) if phase == "backward" else (5, 3)
        elements = self.tokens * self.width
        return Work(operations * elements, passes * elements * itemsize)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        sizes = {"gate_up": 2 * self.width, "dy": self.width}
        return {
            name: normal(self.tokens, size, dtype=dtype, device=device, seed=seed * SEED_STEP + i)
            for i, (name, size) in enumerate(sizes.items())
        }

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["SwiGlu", Tensors]:
        """Gates of 0, 64 or 128, whose sigmoid is a half or one."""
        draw = whole_numbers(dtype, device, seed)
        gate, up = 64 * draw(0, 2, self.tokens, self.width), draw(-2, 2, self.tokens, self.width)
        return self, {"gate_up": torch.cat((gate, up), -1), "dy": draw(-2, 2, self.tokens, self.width)}

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.swiglu import swiglu

        return (swiglu(tensors["gate_up"]),)

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return (swiglu_formula(tensors["gate_up"]),)


def adamw_formula(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, copy: Tensor | None, options: dict
) -> None:
    """One update in place: decay apart from the gradient, bias-corrected moments, then the copy."""
    (beta1, beta2), step, lr = options["betas"], options["step"], options["lr"]
    wide = gradient.to(master.dtype)
    exp_avg.lerp_(wide, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(options["epsilon"])
    master.mul_(1 - lr * options["weight_decay"]).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if copy is not None:
        copy.copy_(master)


@dataclass(frozen=True)
class AdamW(Problem):
    """One update of P parameters; `step` and the other numbers are those of a running training."""

    parameters: int
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    step: int = 10

    op: ClassVar[str] = "adamw"
    phases: ClassVar[tuple[str, ...]] = ("step",)
    timed: ClassVar[tuple[str, ...]] = ("step",)
    rough: ClassVar[tuple[str, ...]] = ("gradient",)
    in_place: ClassVar[bool] = True
    STATE: ClassVar[tuple[str, ...]] = ("master", "exp_avg", "exp_avg_sq")

    @property
    def outputs(self) -> tuple[str, ...]:
        return (*self.STATE, "copy")

    @property
    def label(self) -> str:
        return f"P={self.parameters}"

    @property
    def options(self) -> dict[str, Any]:
        """The numbers that the function takes by name."""
        names = ("lr", "betas", "epsilon", "weight_decay", "step")
        return {name: getattr(self, name) for name in names}

    def work(self, phase: str, itemsize: int) -> Work:
        return Work(14 * self.parameters, 28 * self.parameters)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        def draw(i: int, kind: torch.dtype) -> Tensor:
            return normal(self.parameters, dtype=kind, device=device, seed=seed * SEED_STEP + i)

        state = {name: draw(i, torch.float32) for i, name in enumerate(self.STATE)}
        state["exp_avg"].mul_(0.1)
        state["exp_avg_sq"].square_().mul_(0.01)
        return self._with_copy(state | {"gradient": draw(3, dtype)})

    def _with_copy(self, tensors: Tensors) -> Tensors:
        """A copy in the gradient's dtype, where that has two bytes."""
        gradient = tensors["gradient"]
        return tensors | ({"copy": torch.zeros_like(gradient)} if gradient.element_size() == 2 else {})

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["AdamW", Tensors]:
        """The first step: the moments are zero, the update is the gradient's sign times the learning rate."""
        draw = whole_numbers(torch.float32, device, seed)
        state = {"master": draw(-8, 8, self.parameters), "gradient": draw(-2, 2, self.parameters).to(dtype)}
        state |= {name: torch.zeros(self.parameters, device=device) for name in self.STATE[1:]}
        easy = replace(self, lr=2.0**-4, betas=(0.5, 0.75), epsilon=1e-12, weight_decay=0.25, step=1)
        return easy, self._with_copy(state)

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.adamw import adamw

        adamw(*(tensors[name] for name in (*self.STATE, "gradient")), copy=tensors.get("copy"), **self.options)
        return self.written(tensors)

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        adamw_formula(*(tensors[name] for name in (*self.STATE, "gradient")), tensors.get("copy"), self.options)
        return self.written(tensors)

    def written(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What an update has changed."""
        return tuple(tensors[name] for name in self.outputs if name in tensors)

"""The parts of a mixture of experts as measured operations: routing, the experts' products, copies and sums of rows."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import normal
from benchmarks.kernel_problems import SEED_STEP, Problem, Tensors, Work, whole_numbers
from kernels.expert_tiles import num_slots
from kernels.moe_route import Routing, layout_reference

LAYOUT = ("rows", "positions", "offsets", "tiles")
LOADS = ("uniform", "zipf", "one", "idle")


def chosen(load: str, tokens: int, experts: int, per_token: int, seed: int) -> Tensor:
    """(T, A) int32 different experts of each token: even, by Zipf's law, one that all choose, or every fourth idle."""
    generator = torch.Generator().manual_seed(seed)
    expert_ids = torch.arange(experts)
    weights = {
        "uniform": torch.ones(experts),
        "zipf": 1 / (expert_ids + 1).float(),
        "one": torch.where(expert_ids == experts // 2, 1.0, 1e-6),
        "idle": torch.where(expert_ids % 4 == 0, 1e-9, 1.0),
    }[load]
    return (torch.rand(tokens, experts, generator=generator).log() / weights).topk(per_token).indices.int()


def layout(experts: Tensor, num_experts: int) -> Tensors:
    """The numbers of a Routing by name; on the meta device only their shapes."""
    if experts.is_meta:
        rows = experts.numel()
        shapes = ((num_experts + 1,), (rows,), tuple(experts.shape), (2, num_slots(rows, num_experts)))
        tensors = [torch.empty(shape, dtype=torch.int32, device="meta") for shape in shapes]
    else:
        tensors = list(layout_reference(experts, num_experts))
    return dict(zip(("offsets", "rows", "positions", "tiles"), tensors))


def experts_formula(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor) -> Tensor:
    """Each expert in turn on the rows of the tokens that chose it, in the dtype of x."""
    out = torch.zeros_like(x)
    for expert, (first, second) in enumerate(zip(gate_up, down)):
        token, choice = (experts.long() == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ first.T).chunk(2, dim=-1)
        weighted = gates[token, choice, None].to(x.dtype) * ((F.silu(gate) * up) @ second.T)
        out = out.index_add(0, token, weighted)
    return out


@dataclass(frozen=True)
class Experts(Problem):
    """T tokens through their A of E gated feed-forward blocks, D wide, F inside; where they go is given."""

    tokens: int
    width: int
    ffn_width: int
    experts: int = 8
    per_token: int = 2
    load: str = "uniform"

    op: ClassVar[str] = "experts"
    tables: ClassVar[tuple[str, ...]] = ("grouped",)
    rough: ClassVar[tuple[str, ...]] = ("x", "dy")
    gradients: ClassVar[tuple[str, ...]] = ("x", "gates", "gate_up", "down")
    whole: ClassVar[frozenset[str]] = frozenset(("gate_up", "down", "dgate_up", "ddown", *LAYOUT))
    is_matrix: ClassVar[bool] = True

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("y",)

    @property
    def row_elements(self) -> int:
        return 4 * self.per_token * self.ffn_width

    @property
    def label(self) -> str:
        return f"T={self.tokens} D={self.width} F={self.ffn_width} E={self.experts} A={self.per_token} {self.load}"

    def work(self, phase: str, itemsize: int) -> Work:
        rows = self.tokens * self.per_token
        weights, ends = 3 * self.experts * self.width * self.ffn_width, 2 * self.tokens * self.width
        inner = 3 * rows * self.ffn_width
        passes = 2 if phase == "backward" else 1
        return Work(passes * 6 * rows * self.width * self.ffn_width, passes * (weights + ends + inner) * itemsize)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        def draw(i: int, *shape: int, kind: torch.dtype = dtype) -> Tensor:
            return normal(*shape, dtype=kind, device=device, seed=seed * SEED_STEP + i)

        scaled = {
            "gate_up": (self.experts, 2 * self.ffn_width, self.width),
            "down": (self.experts, self.width, self.ffn_width),
        }
        weights = {name: draw(i, *shape) * shape[-1] ** -0.5 for i, (name, shape) in enumerate(scaled.items(), 4)}
        gates = draw(1, self.tokens, self.per_token, kind=torch.float32).softmax(-1)
        return self._with_layout(
            {"x": draw(0, self.tokens, self.width), "gates": gates, **weights, "dy": draw(3, self.tokens, self.width)},
            device,
            seed,
        )

    def _with_layout(self, tensors: Tensors, device: torch.device, seed: int) -> Tensors:
        experts = chosen(self.load, self.tokens, self.experts, self.per_token, seed).to(device)
        return tensors | {"experts": experts} | layout(experts, self.experts)

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["Experts", Tensors]:
        """Tokens that pick one column, whose gates are 64: a sigmoid of one, and sums of a few small whole numbers."""
        draw, pick = whole_numbers(dtype, device, seed), whole_numbers(torch.int64, device, seed + 1)
        x = torch.zeros(self.tokens, self.width, dtype=dtype, device=device)
        x[torch.arange(self.tokens, device=device), pick(0, self.width - 1, self.tokens)] = 1
        up = draw(-1, 1, self.experts, self.ffn_width, self.width)
        down = torch.zeros(self.experts, self.width, self.ffn_width, dtype=dtype, device=device)
        rows = torch.arange(self.width, device=device)
        down[:, rows, rows % self.ffn_width] = draw(-1, 1, self.experts, self.width) / 64
        dy = torch.zeros(self.tokens, self.width, dtype=dtype, device=device)
        dy[torch.arange(self.tokens, device=device), pick(0, self.width - 1, self.tokens)] = 1
        gates = torch.full((self.tokens, self.per_token), 0.5, device=device)
        gate_up = torch.cat((torch.full_like(up, 64), up), 1)
        tensors = {"x": x, "gates": gates, "gate_up": gate_up, "down": down, "dy": dy}
        return self, self._with_layout(tensors, device, seed)

    def routing(self, tensors: Tensors) -> Routing:
        """The problem's expert choices and gates as a Routing."""
        layout_tensors = {name: tensors[name] for name in LAYOUT}
        return Routing(tensors["gates"], tensors["gates"], tensors["experts"], **layout_tensors)

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.grouped_matmul import expert_mlp

        return (expert_mlp(tensors["x"], tensors["gate_up"], tensors["down"], self.routing(tensors)),)

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return (experts_formula(*(tensors[name] for name in ("x", "gates", "gate_up", "down", "experts"))),)

    def other_forms(self) -> tuple:
        """The choices of a token the other way round: the same numbers, added up in another order."""

        def flipped(tensors: Tensors) -> tuple[Tensor, ...]:
            turned = {name: tensors[name].flip(1) for name in ("gates", "experts")}
            return self.formula(tensors | turned)

        return (flipped,)


@dataclass(frozen=True)
class MoeRoute(Problem):
    """Router logits of T tokens over E experts, and the weights of the A best."""

    tokens: int
    width: int
    experts: int = 8
    per_token: int = 2

    op: ClassVar[str] = "moe_route"
    rough: ClassVar[tuple[str, ...]] = ("dlogits", "dgates")
    gradients: ClassVar[tuple[str, ...]] = ("hidden", "router")
    whole: ClassVar[frozenset[str]] = frozenset(("router", "drouter"))

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logits", "gates")

    @property
    def label(self) -> str:
        return f"T={self.tokens} D={self.width} E={self.experts} A={self.per_token}"

    def work(self, phase: str, itemsize: int) -> Work:
        passes = 2 if phase == "backward" else 1
        moved = self.tokens * (self.width * itemsize + 4 * self.experts)
        return Work(passes * 2 * self.tokens * self.width * self.experts, passes * moved)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        def draw(i: int, *shape: int, kind: torch.dtype = dtype) -> Tensor:
            return normal(*shape, dtype=kind, device=device, seed=seed * SEED_STEP + i)

        return {
            "hidden": draw(0, self.tokens, self.width),
            "router": draw(1, self.experts, self.width) * self.width**-0.5,
            "dlogits": draw(2, self.tokens, self.experts, kind=torch.float32),
            "dgates": draw(3, self.tokens, self.per_token, kind=torch.float32),
        }

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple["MoeRoute", Tensors]:
        """Hidden states that pick a column of different whole logits, far enough apart that the best has all weight."""
        draw, pick = whole_numbers(dtype, device, seed), whole_numbers(torch.int64, device, seed + 1)
        order = torch.argsort(torch.rand(self.experts, self.width, generator=torch.Generator().manual_seed(seed)), 0)
        hidden = torch.zeros(self.tokens, self.width, dtype=dtype, device=device)
        hidden[torch.arange(self.tokens, device=device), pick(0, self.width - 1, self.tokens)] = 128
        return self, {
            "hidden": hidden,
            "router": order.to(device=device, dtype=dtype),
            "dgates": torch.zeros(self.tokens, self.per_token, device=device),
            "dlogits": draw(-2, 2, self.tokens, self.experts).float(),
        }

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.moe_route import moe_route

        routing = moe_route(tensors["hidden"], tensors["router"], experts_per_token=self.per_token)
        return routing.logits, routing.gates

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        hidden, router = tensors["hidden"], tensors["router"]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(wide) @ router.to(wide).T
        return logits, logits.topk(self.per_token).values.softmax(-1)

    def other_forms(self) -> tuple:
        """Gradients of the logits, rounded to the dtype before the products as the kernels document."""

        def rounded(tensors: Tensors) -> tuple[Tensor, ...]:
            logits, _ = self.formula(tensors)
            if logits.requires_grad:
                dtype = tensors["hidden"].dtype
                logits.register_hook(lambda grad: grad.to(dtype).to(grad.dtype))
            return logits, logits.topk(self.per_token).values.softmax(-1)

        return (rounded,)


@dataclass(frozen=True)
class _Rows(Problem):
    """Rows of T tokens, D wide, and of their A experts each."""

    tokens: int
    width: int
    experts: int = 8
    per_token: int = 2

    phases: ClassVar[tuple[str, ...]] = ("forward",)
    timed: ClassVar[tuple[str, ...]] = ("forward",)
    gradients: ClassVar[tuple[str, ...]] = ()

    @property
    def label(self) -> str:
        return f"T={self.tokens} D={self.width} E={self.experts} A={self.per_token}"

    def _layout(self, device: torch.device, seed: int) -> Tensors:
        experts = chosen("uniform", self.tokens, self.experts, self.per_token, seed).to(device)
        return layout(experts, self.experts)

    def exact(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Any, Tensors]:
        draw = whole_numbers(dtype, device, seed)
        tensors = self.inputs(dtype, device, seed)
        rows = {name: draw(-9, 9, *tensors[name].shape) for name in self.rough}
        return self, tensors | rows


@dataclass(frozen=True)
class MoePermute(_Rows):
    """Tokens copied to the sorted rows of their experts."""

    op: ClassVar[str] = "moe_permute"
    rough: ClassVar[tuple[str, ...]] = ("x",)
    whole: ClassVar[frozenset[str]] = frozenset(("x",))

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("y",)

    def work(self, phase: str, itemsize: int) -> Work:
        return Work(0, (1 + self.per_token) * self.tokens * self.width * itemsize)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        x = normal(self.tokens, self.width, dtype=dtype, device=device, seed=seed * SEED_STEP)
        return {"x": x, "rows": self._layout(device, seed)["rows"]}

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.backend import runs_triton

        if not runs_triton(tensors["x"], "x"):
            return self.formula(tensors)
        from kernels._expert_rows import moe_permute

        return (moe_permute(tensors["x"], tensors["rows"], self.per_token),)

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return (tensors["x"].index_select(0, tensors["rows"].long() // self.per_token),)


@dataclass(frozen=True)
class MoeCombine(_Rows):
    """Each token's weighted sum of its experts' rows."""

    op: ClassVar[str] = "moe_combine"
    rough: ClassVar[tuple[str, ...]] = ("outer",)
    whole: ClassVar[frozenset[str]] = frozenset(("outer",))

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("y",)

    def work(self, phase: str, itemsize: int) -> Work:
        elements = self.tokens * self.width
        return Work(2 * self.per_token * elements, (1 + self.per_token) * elements * itemsize)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
        rows = self.tokens * self.per_token
        gates = normal(self.tokens, self.per_token, dtype=torch.float32, device=device, seed=seed * SEED_STEP + 1)
        return {
            "outer": normal(rows, self.width, dtype=dtype, device=device, seed=seed * SEED_STEP),
            "gates": (4 * gates).round() / 4,
            "positions": self._layout(device, seed)["positions"],
        }

    def ours(self, tensors: Tensors) -> tuple[Tensor, ...]:
        from kernels.backend import runs_triton

        if not runs_triton(tensors["outer"], "outer"):
            return self.formula(tensors)
        from kernels._expert_rows import moe_combine

        return (moe_combine(tensors["outer"], tensors["gates"], tensors["positions"]),)

    def formula(self, tensors: Tensors) -> tuple[Tensor, ...]:
        outer = tensors["outer"]
        rows = outer[tensors["positions"].long()]
        return ((tensors["gates"].to(outer.dtype)[..., None] * rows).sum(1),)

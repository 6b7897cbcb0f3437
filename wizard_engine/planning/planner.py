"""What a training run costs before it starts: memory of a GPU by component, bytes moved by axis of the mesh, seconds of
a step, for any preset and layout; the best layouts, and why a run cannot fit.

    memory    the closed forms of planning/estimate.py, which tests hold against the engine on simulated ranks
    traffic   the same, byte for byte what the engine moves when experts have even loads
    seconds   a model: each kind of work at a rate of its own (`Rates`), each collective at the speed of the links that
              its group spans; the gathers and reductions of parameters run beside the computation, and what is longer
              counts; what moves tokens is waited for

The rates are assumptions until they are measured; the plan prints them.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from wizard_engine.model import PRESETS, ModelConfig, Transformer
from wizard_engine.parallel import MeshOptions, Sharding
from wizard_engine.parallel.mesh import MeshShape, divisors, resolve
from wizard_engine.parallel.parallelize import partitions_of
from wizard_engine.runtime.ranges import Checked, Count

from .estimate import Estimate, estimate, mesh_of, sizes_of_units
from .flops import TRAINING_FACTOR, flops_per_token, mean_keys
from .presets import SCALES
from .rates import GPUS, Gpu, Rates

GIB = 2**30
# Work of one GPU; the rest of a step waits for others.
COMPUTED = ("matrices", "experts", "attention", "memory", "optimizer")
META = torch.device("meta")
RECOMPUTE = ("none", "selective", "full")
ROWS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Options(Checked):
    """What to plan: memory, traffic and time of a training step, and the best layouts."""

    preset: str
    """Shape of the model: tiny, 7b, 70b, 8x22b or another; the --preset of recipes, such as 7b-8, is a whole run."""
    gpus: Count[int]
    """GPUs in all, at least 1."""
    gpu: str = "H100"
    """Which: A100-80GB, H100, H200, B200."""
    layout: str | None = None
    """Plan this one alone: dp_replicate, dp_shard, cp, tp, ep, recompute, rows, as in tp=2,ep=8,rows=2."""
    sequence: Count[int] = 4096
    """Tokens of a document; a packed row holds one, or several."""
    step_tokens: Count[int] = 2**20
    """Tokens of an optimizer step over all GPUs; where too few, a row on each rank with rows of its own."""
    best: Count[int] = 5
    """Layouts to show."""
    simulate: bool = True
    """Run the best layout on simulated ranks, and compare memory and traffic."""
    rates: Path | None = None
    """JSON file of measured rates; default: assumptions, which are printed."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (("preset", self.preset, PRESETS), ("gpu", self.gpu, GPUS)):
            if value not in known:
                run = f"; the run {value} of the recipes has the model {SCALES[value].model}" if value in SCALES else ""
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}{run}")


@dataclass(frozen=True)
class Layout:
    """A mesh, what is computed again, and how a step's rows are cut.

    rows: documents of a packed row.   micro_batches: packed rows of a step of each rank with rows of its own.
    """

    mesh: MeshShape
    recompute: Literal["none", "selective", "full"]
    rows: int
    micro_batches: int

    @property
    def flags(self) -> str:
        """As in --layout."""
        m = self.mesh
        sizes = {"dp_replicate": m.replicate, "dp_shard": m.dp_shard, "cp": m.cp, "tp": m.tp, "ep": m.ep}
        shown = [f"{name}={size}" for name, size in sizes.items() if size > 1]
        return ",".join([*shown, f"recompute={self.recompute}", f"rows={self.rows}"])


@dataclass(frozen=True)
class Plan:
    """A layout's cost.

    Attributes:
        memory: component -> bytes of a GPU.   peak: largest memory at one time, bytes.   fits: whether the GPU has it.
        traffic: "kind axis" -> bytes of a step, whole buffers.   seconds: kind of work -> seconds of a step; overlapped
            work counts with its exposed rest.   step: their sum.
        tokens_per_second: of a GPU.   mfu: formula of flops.py.   bottleneck: the longest kind of work.
        waits: fraction of the step that waits for other GPUs.   hidden: seconds that overlap with computation.
    """

    layout: Layout
    memory: dict[str, int]
    peak: int
    fits: bool
    traffic: dict[str, int]
    seconds: dict[str, float]
    step: float
    tokens_per_second: float
    mfu: float
    bottleneck: str
    waits: float
    hidden: dict[str, float]


class Planner:
    """Plans of one model on one kind of GPU.

    Args:
        options: see Options.   rates: see Rates.   config: of the model; None: the preset's.
        gpu: the device; None: the one in the options.
    """

    def __init__(
        self, options: Options, rates: Rates, config: ModelConfig | None = None, gpu: Gpu | None = None
    ) -> None:
        self.options, self.rates, self.gpu = options, rates, GPUS[options.gpu] if gpu is None else gpu
        self.config: ModelConfig = PRESETS[options.preset] if config is None else config
        with META:
            self.model = Transformer(self.config)
        self._units: dict[tuple[int, ...], list] = {}

    # Which layouts

    def layouts(self) -> Iterator[Layout]:
        """All that divide the model and the GPUs, tensor parallelism within a node."""
        c, gpus = self.config, self.options.gpus
        for tp in divisors(math.gcd(c.heads, c.kv_heads, c.vocab_size, c.ffn_width)):
            if tp > self.gpu.node or gpus % tp:
                continue
            for cp in divisors(gpus // tp):
                if cp > 1 and (cp & (cp - 1) or self.options.sequence // cp < 2048):
                    continue
                for replicate in divisors(gpus // tp // cp):
                    yield from self._with_experts(replicate, gpus // tp // cp // replicate, cp, tp)

    def _with_experts(self, replicate: int, dp_shard: int, cp: int, tp: int) -> Iterator[Layout]:
        copy = dp_shard * cp * tp
        for ep in divisors(math.gcd(self.config.experts, copy)) if self.config.experts else (1,):
            mesh = MeshShape(replicate, dp_shard, cp, tp, ep)
            for recompute in RECOMPUTE:
                yield from self.layouts_of(mesh, recompute)

    def layouts_of(self, mesh: MeshShape, recompute: Any, rows: int | None = None) -> Iterator[Layout]:
        """Layouts of a mesh, one for each number of rows in a micro-batch."""
        each = max(1, self.options.step_tokens // self.options.sequence // (mesh.replicate * mesh.dp_shard))
        for count in ROWS if rows is None else (rows,):
            if count <= each or rows is not None:
                yield Layout(mesh, recompute, count, max(1, each // count))

    def layout_of(self, flags: str) -> list[Layout]:
        """The layouts that --layout allows.

        Raises:
            ValueError: an unknown word, or sizes that do not divide the GPUs or the model.
        """
        sizes: dict[str, Any] = {}
        known = ("dp_replicate", "dp_shard", "cp", "tp", "ep", "rows", "recompute")
        for option in filter(None, flags.split(",")):
            name, sign, value = option.partition("=")
            name = name.strip().replace("-", "_")
            if name not in known or not sign:
                raise ValueError(f"layout: expected options like tp=2 of {', '.join(known)}, got {option!r}")
            if name == "recompute" and value not in RECOMPUTE:
                raise ValueError(f"layout: recompute: expected one of {', '.join(RECOMPUTE)}, got {value!r}")
            if name != "recompute" and not value.isdecimal():
                raise ValueError(f"layout: {name}: expected a number, got {value!r}")
            sizes[name] = value if name == "recompute" else int(value)
        rows, recompute = sizes.pop("rows", None), sizes.pop("recompute", None)
        mesh = resolve(MeshOptions(**sizes), self.options.gpus)
        if mesh.ep > 1 and not self.config.experts:
            raise ValueError(f"mesh.ep: expected 1 for a model without experts, got {mesh.ep}")
        partitions_of(self.model, self.model, mesh_of(mesh, META))
        modes = RECOMPUTE if recompute is None else (recompute,)
        return [layout for mode in modes for layout in self.layouts_of(mesh, mode, rows)]

    # What one costs

    def plan(self, layout: Layout, sharding: Sharding | None = None) -> Plan:
        """Memory, traffic and time of a layout; sharding: with a dtype that is named, default bf16."""
        tokens = self.row_tokens(layout)
        sharding = sharding or Sharding(dtype="bfloat16", recompute=layout.recompute)
        mesh = mesh_of(layout.mesh, META)
        divided = mesh.tp.size, mesh.shard.size, mesh.copy.size, mesh.efsdp.size, mesh.ep.size
        if divided not in self._units:
            self._units[divided] = sizes_of_units(self.model, mesh, torch.bfloat16)
        memory = estimate(
            self.model, mesh, sharding, tokens=tokens, micro_batches=layout.micro_batches, units=self._units[divided]
        )
        peak = memory.peak + memory.workspace
        seconds, hidden = self._seconds(layout, memory, tokens)
        step = sum(seconds.values())
        data = layout.mesh.replicate * layout.mesh.dp_shard
        done = layout.rows * self.options.sequence * layout.micro_batches * data
        rate = done / step / self.options.gpus
        work = TRAINING_FACTOR * flops_per_token(self.config, self.options.sequence)
        waits = sum(s for name, s in seconds.items() if name not in COMPUTED)
        return Plan(
            layout=layout,
            memory={
                "parameters, gradients, moments": memory.shards,
                "gathered units": memory.buffers,
                "activations": memory.activations,
                "kernels' workspace": memory.workspace,
                "not there at once": -memory.saved,
            },
            peak=peak,
            fits=peak <= self.room,
            traffic={f"{kind} {axis}": size for (kind, axis), size in memory.traffic.items()},
            seconds=seconds,
            step=step,
            tokens_per_second=rate,
            mfu=rate * work / self.gpu.flops,
            bottleneck=max(seconds, key=seconds.get),
            waits=waits / step,
            hidden=hidden,
        )

    @property
    def room(self) -> float:
        """Bytes of a GPU that a plan may take."""
        return (self.gpu.memory_gib - self.rates.reserve_gib) * GIB

    def row_tokens(self, layout: Layout) -> int:
        """Tokens of a packed row, padded to what divides evenly."""
        least = layout.mesh.tp * (2 * layout.mesh.cp if layout.mesh.cp > 1 else 1)
        return -(-layout.rows * self.options.sequence // least) * least

    def _seconds(self, layout: Layout, memory: Estimate, tokens: int) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of a step by kind of work, and those of what runs beside it."""
        seconds = {name: layout.micro_batches * s for name, s in self.computing(layout, tokens).items()}
        computed = sum(seconds.values())
        # Master, gradient, moments read, three of them written, the copy written; the gradient's norm. A bf16 gradient
        # takes 4 bytes less there, and 4 to be copied together.
        seconds["optimizer"] = memory.elements * 34 / (self.gpu.bandwidth * self.rates.memory)
        hidden: dict[str, float] = {}
        for (kind, axis), size in memory.traffic.items():
            took = self._collectives(kind, axis, size, layout)
            if axis in ("shard", "copy", "efsdp"):
                hidden["parameters"] = hidden.get("parameters", 0.0) + took
            else:
                name = {"tp": "tensor parallel", "cp": "context parallel", "ep": "expert exchange"}.get(axis, "copies")
                seconds[name] = seconds.get(name, 0.0) + took
        # The first unit of a pass and the last gradients have nothing to run beside.
        ends = 2 / (2 * len(self.model.blocks) + 1)
        moved = hidden.get("parameters", 0.0)
        seconds["parameters, waited for"] = max(moved - computed, ends * moved)
        return {name: s for name, s in seconds.items() if s}, hidden

    def computing(self, layout: Layout, tokens: int, *, head: bool = True) -> dict[str, float]:
        """Seconds of forward and backward of one rank over one row, by kind of work, other GPUs aside.

        Args:
            tokens: of the row.   head: with the vocabulary's products.
        """
        rates, gpu, work = self.rates, self.gpu, self._work(layout, tokens)
        again = 1 if layout.recompute == "full" else 0
        matrix, grouped = gpu.flops * rates.matrix, gpu.flops * rates.grouped
        forward_rate, backward_rate = (gpu.flops * x for x in (rates.attention_forward, rates.attention_backward))
        return {
            # The head's kernel makes its logits anew in the backward.
            "matrices": ((3 + again) * work["matrices"] + (4 * work["head"] if head else 0.0)) / matrix,
            "experts": (3 + again) * work["experts"] / grouped,
            # The backward makes the scores anew: five products where the forward has two.
            "attention": work["attention"] * ((1 + again) / forward_rate + 2.5 / backward_rate),
            "memory": (3 + again) * work["bytes"] / (gpu.bandwidth * rates.memory),
        }

    def _work(self, layout: Layout, tokens: int) -> dict[str, float]:
        """Operations, and bytes of what is bound by memory, of a forward pass of one rank over one row."""
        c, mesh = self.config, layout.mesh
        row, local_tokens = tokens / mesh.cp, tokens / mesh.cp / mesh.tp
        attention = c.width * c.head_width * 2 * (c.heads + c.kv_heads)
        dense = 0 if c.experts else 3 * c.width * c.ffn_width
        expert_rows = local_tokens * c.experts_per_token if c.experts else 0
        streams = 10 * local_tokens * c.width + 3 * row * (c.heads + 2 * c.kv_heads) * c.head_width / mesh.tp
        streams += 5 * expert_rows * c.width + 3 * expert_rows * c.ffn_width
        streams += 0 if c.experts else 3 * row * c.ffn_width / mesh.tp
        keys = mean_keys(self.options.sequence, c.window)
        return {
            "matrices": c.layers * (2 * row * (attention + dense) / mesh.tp + 2 * local_tokens * c.width * c.experts),
            "head": 2 * row * c.width * c.vocab_size / mesh.tp,
            "experts": c.layers * 2 * expert_rows * 3 * c.width * c.ffn_width,
            "attention": 4 * c.layers * c.heads / mesh.tp * c.head_width * keys * row,
            "bytes": c.layers * 2 * streams,
        }

    def _collectives(self, kind: str, axis: str, size: int, layout: Layout) -> float:
        """Seconds of all collectives of a kind on an axis, given the bytes of their whole buffers."""
        mesh, gpu = layout.mesh, self.gpu
        sizes = {
            "replicate": (mesh.replicate, mesh.copy),
            "shard": (mesh.dp_shard * mesh.cp, mesh.tp),
            "copy": (mesh.copy, 1),
            "tp": (mesh.tp, 1),
            "cp": (mesh.cp, mesh.tp),
            "efsdp": (mesh.efsdp, mesh.ep),
            "ep": (mesh.ep, 1),
        }
        ranks, stride = sizes[axis]
        inside = max(1, min(ranks, gpu.node // stride))
        nodes = -(-ranks // inside)
        within, between = gpu.node_link * self.rates.link, gpu.network * self.rates.link
        if kind == "exchange":
            bytes_between, bytes_within = size * (ranks - inside) / ranks, size * (inside - 1) / ranks
        else:
            times = 2 if kind == "sum" else 1
            # What a node has not got comes in over the links of all its GPUs of the group.
            bytes_between = times * size * (nodes - 1) / nodes / inside
            bytes_within = times * size * (inside - 1) / inside
        count = self._starts(kind, axis, layout)
        return max(bytes_between / between, bytes_within / within) + count * self.rates.latency

    def _starts(self, kind: str, axis: str, layout: Layout) -> int:
        """About how many collectives of a kind a step has on an axis."""
        per_pass = {"tp": 4 if not self.config.experts else 2, "cp": 2, "ep": 3}.get(axis, 1)
        return layout.micro_batches * len(self.model.blocks) * per_pass if axis not in ("replicate", "copy") else 1

    def best(self) -> list[Plan]:
        """Plans that fit, fastest first; one for each mesh."""
        best_plans: dict[MeshShape, Plan] = {}
        for layout in self.layouts() if self.options.layout is None else self.layout_of(self.options.layout):
            plan = self.plan(layout)
            known = best_plans.get(layout.mesh)
            if plan.fits and (known is None or plan.tokens_per_second > known.tokens_per_second):
                best_plans[layout.mesh] = plan
        return sorted(best_plans.values(), key=lambda plan: -plan.tokens_per_second)

    def smallest(self) -> Plan:
        """The plan that takes least memory."""
        layouts: Iterable[Layout] = self.layout_of(self.options.layout or "recompute=full,rows=1")
        if self.options.layout is None:
            layouts = (one for one in self.layouts() if one.recompute == "full" and one.rows == 1)
        return min((self.plan(layout) for layout in layouts), key=lambda plan: plan.peak)

    def refusal(self) -> str:
        """Why nothing fits, and what would."""
        least = self.smallest()
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in least.memory.items() if size > 0)
        text = (
            f"{self.options.preset} does not fit on {self.options.gpus} {self.options.gpu}: the smallest layout, "
            f"{least.layout.flags}, takes {least.peak / GIB:.1f} GiB of a GPU ({shown}), and there are "
            f"{self.room / GIB:.1f}"
        )
        gpus = self.options.gpus
        while self.options.layout is None and gpus < 4096:
            gpus *= 2
            more = Planner(replace(self.options, gpus=gpus), self.rates)
            if more.smallest().fits:
                return f"{text}; it fits on {gpus}"
        return text

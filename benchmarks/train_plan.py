"""What the closed forms and the planner say of a training step before it runs: bytes by axis, peak memory, seconds.

    bytes    planning/estimate.py for language models; for scoring models the same with scores in place of the
             vocabulary; of an online step the parameters that its passes gather and reduce, and the weights that go to
             the sampler, but not what moves tokens
    memory   planning/estimate.py, kernels' workspace included
    seconds  planning/planner.py with the rates of --rates, or its assumptions; on a CPU the peak, the bandwidth of
             the memory and that of the ranks' links are measured first

The planner has no plan of generation: of an online step it predicts the phase that trains.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.communication import Key
from benchmarks.train_recipes import PAIRED, Shape
from wizard_engine.model import ModelConfig, ScoringModel, Transformer
from wizard_engine.parallel import Mesh, MeshOptions, Sharding, compute_dtype
from wizard_engine.parallel.flat_layout import Layout
from wizard_engine.parallel.mesh import resolve
from wizard_engine.planning import planner as plan
from wizard_engine.planning.estimate import Estimate, estimate, sizes_of_units
from wizard_engine.planning.flops import TRAINING_FACTOR, flops_per_token
from wizard_engine.planning.rates import peak_flops
from wizard_engine.planning.simulate import axis_names
from wizard_engine.runtime.object_collectives import gather_objects

PARAMETER_AXES = ("shard", "copy", "efsdp", "replicate")
WIDE = 4
META = torch.device("meta")


@dataclass(frozen=True)
class Pass:
    """One call of a model: the model's role, tokens of the row, whether a backward follows."""

    role: str
    tokens: int
    trains: bool


@dataclass
class PassLog:
    """The calls of some models, in their order; `take` gives them and forgets them."""

    calls: list[Pass] = field(default_factory=list)

    def watch(self, models: dict[str, nn.Module]) -> None:
        """Write down the calls of these models from now on."""
        for role, model in models.items():
            model.register_forward_pre_hook(partial(self._note, role))

    def _note(self, role: str, model: nn.Module, args: tuple) -> None:
        self.calls.append(Pass(role, args[0].shape[0], torch.is_grad_enabled()))

    def take(self) -> list[Pass]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


# Bytes


def padded(tokens: int, mesh: Mesh) -> int:
    """Tokens of a row that divides evenly over the ranks that share it."""
    least = mesh.tp.size * (2 * mesh.cp.size if mesh.cp.size > 1 else 1)
    return -(-tokens // least) * least


class ClosedForm:
    """Bytes that the passes of a step move, by (kind, axis), on this rank.

    Args:
        config, mesh, sharding: of all models of the step.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, sharding: Sharding) -> None:
        self.config, self.mesh = config, mesh
        self.dtype = compute_dtype(sharding, mesh.device)
        self.sharding = replace(sharding, dtype=str(self.dtype).removeprefix("torch."))
        with META:
            self.model = Transformer(config)
        self.units = sizes_of_units(self.model, mesh, self.dtype)
        self.names = axis_names(mesh)

    def of_step(self, recipe: str, models: dict[str, nn.Module], passes: Sequence[Pass]) -> dict[Key, int]:
        """Bytes of a step of a recipe."""
        if recipe == "rleif":
            return self._online(models, passes)
        ((_, model),) = models.items()
        traffic = Counter(self._language([one.tokens for one in passes]))
        if isinstance(model, ScoringModel):
            traffic.update(self._scores(model, len(passes)))
            for one in passes:
                traffic.update(self._scored_tokens(model, one.tokens))
        return self._by_group(traffic)

    def estimate(self, tokens: int, micro_batches: int) -> Estimate:
        """The closed form of a language model's step."""
        return estimate(
            self.model,
            self.mesh,
            self.sharding,
            tokens=padded(tokens, self.mesh),
            micro_batches=micro_batches,
            units=self.units,
        )

    def _language(self, tokens: Sequence[int]) -> dict[Key, int]:
        """A language model's step over rows of these tokens."""
        traffic: Counter[Key] = Counter()
        whole = self.estimate(1, len(tokens)).traffic
        traffic.update({key: size for key, size in whole.items() if key[1] in PARAMETER_AXES})
        for count in tokens:
            row = self.estimate(count, 1).traffic
            traffic.update({key: size for key, size in row.items() if key[1] not in PARAMETER_AXES})
        return traffic

    def _scores(self, model: ScoringModel, micro_batches: int, *, frozen: bool = False) -> dict[Key, int]:
        """Parameters of a scoring model's head, which all ranks of a copy divide, in fp32; they stay gathered."""
        if self.mesh.copy.size == 1 and self.mesh.replicate.size == 1:
            return {}
        layout = self._score_layout(model)
        traffic: dict[Key, int] = {}
        if self.mesh.copy.size > 1 and not frozen:
            times = 1 if self.sharding.accumulate == "whole" else micro_batches
            traffic = {("gather", "copy"): layout.size * WIDE, ("reduce", "copy"): layout.size * WIDE * times}
        if self.mesh.replicate.size > 1 and not frozen:
            traffic["sum", "replicate"] = layout.shard_size * WIDE
        return traffic

    def _score_layout(self, model: ScoringModel) -> Layout:
        with META:
            head = ScoringModel(self.config, model.outputs, surprise=model.surprise).score
        return Layout([(name, tuple(p.shape)) for name, p in head.named_parameters()], self.mesh.copy.size)

    def _scored_tokens(self, model: ScoringModel, tokens: int) -> dict[Key, int]:
        """A row's tokens: scores instead of log-probabilities, and hidden states that are not gathered at the end."""
        mesh, tokens = self.mesh, padded(tokens, self.mesh)
        row = tokens // mesh.cp.size
        stream, scores = row * self.config.width * self.dtype.itemsize, 4 * WIDE * row
        traffic: dict[Key, int] = {}
        if mesh.tp.size > 1:
            traffic["gather", "tp"] = -stream - mesh.tp.size * scores
            traffic["reduce", "tp"] = -stream
        if mesh.cp.size > 1:
            traffic["gather", "cp"] = -mesh.cp.size * scores
        if mesh.row.size > 1:
            traffic["gather", "row"] = tokens * model.outputs * WIDE
        return traffic

    # An online step

    def _online(self, models: dict[str, nn.Module], passes: Sequence[Pass]) -> dict[Key, int]:
        """Parameters alone, of dense models; nothing for a mixture."""
        if self.config.experts:
            return {}
        traffic: Counter[Key] = Counter()
        trained = {one.role for one in passes if one.trains}
        for role, model in models.items():
            role_passes = [one for one in passes if one.role == role]
            updates = sum(one.trains for one in role_passes)
            traffic.update(self._gathered(role_passes, frozen=role not in trained))
            if updates:
                whole = self.estimate(1, updates).traffic
                traffic.update(
                    {key: size for key, size in whole.items() if key[0] != "gather" and key[1] in PARAMETER_AXES}
                )
            if isinstance(model, ScoringModel):
                traffic.update(self._scores(model, updates, frozen=role not in trained))
        n = self.mesh.copy.size
        # Every rank sends its part to all others; of a copy, together, that is the model n - 1 times.
        traffic["exchange", "copy"] = (n - 1) * self.config.num_parameters / n * self.dtype.itemsize
        return self._by_group(traffic)

    def _gathered(self, passes: Sequence[Pass], *, frozen: bool) -> dict[Key, int]:
        """Of a model that was updated since the last step, or of one that is frozen and was used as now before."""
        rotating = [unit for unit in self.units if not unit.resident]
        counts = gathers(len(rotating), self.config.tied, [one.trains for one in passes], again=frozen)
        traffic: Counter[Key] = Counter()
        for unit, times in [*zip(rotating, counts), *((unit, int(not frozen)) for unit in self.units if unit.resident)]:
            if getattr(self.mesh, unit.over).size > 1:
                traffic["gather", unit.over] += unit.size * self.dtype.itemsize * times
        return traffic

    def _by_group(self, traffic: dict[Key, float]) -> dict[Key, int]:
        """Axes by the names that the meter gives their groups."""
        by_group: Counter[Key] = Counter()
        for (kind, axis), size in traffic.items():
            groups = getattr(self.mesh, axis)
            if groups.size > 1 and size:
                by_group[kind, self.names[groups.group.group_name]] += size
        return {key: size for key, size in by_group.items() if size}


def gathers(units: int, tied: bool, passes: Sequence[bool], *, again: bool = False) -> list[int]:
    """How often each rotating unit of a dense model is gathered.

    Two places take the units in turn; what a place still holds is not gathered again.

    Args:
        units: of them; of a model with a head of its own the first is the embedding, which a backward does not need,
            and the last the head.
        passes: whether a backward follows each forward.   again: the same passes have been made just before.
    """
    places: list[int | None] = [None, None]
    counts = [0] * units

    def ask(unit: int) -> None:
        if places[unit % 2] != unit:
            places[unit % 2] = unit
            counts[unit] += 1

    first, last = (0, units - 1) if tied else (1, units - 2)
    for _turn in range(2 if again else 1):
        counts[:] = [0] * units
        for trains in passes:
            for unit in range(units):
                ask(unit)
                if unit + 1 < units:
                    ask(unit + 1)
            for unit in range(last, first - 1, -1) if trains else ():
                ask(unit)
                if unit > first:
                    ask(unit - 1)
    return counts


# Seconds and memory


def device_of_plan(device: torch.device, mesh: Mesh) -> tuple[plan.Gpu | None, str]:
    """The planner's figures of a device, and where they are from; None for a GPU that it does not know."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((key for key in plan.GPUS if key.split("-")[0] in name), None)
        return (None, f"{name} is none of {', '.join(plan.GPUS)}") if known is None else (plan.GPUS[known], known)
    measured = _measured(mesh)
    slowest = [min(values) for values in zip(*gather_objects(measured))]
    memory = memory_bytes(device) / 2**30
    return plan.Gpu(memory, *slowest, network=slowest[-1]), "measured in this run"


def memory_bytes(device: torch.device) -> float:
    """Memory that a rank may take: the GPU's, or the machine's shared among its ranks."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def _measured(mesh: Mesh) -> tuple[float, float, float]:
    """Operations, bytes of memory and bytes from other ranks, each per second."""
    source = torch.zeros(2**22)
    target, small = torch.empty_like(source), torch.zeros(2**18)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    arriving = copied
    if mesh.world_size > 1:
        gathered = [torch.empty_like(small) for _ in range(mesh.world_size)]
        arriving = (mesh.world_size - 1) * small.nbytes / _seconds(lambda: dist.all_gather(gathered, small))
    return peak_flops("cpu"), copied, arriving


def _seconds(call: Any, times: int = 5) -> float:
    """Of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@dataclass(frozen=True)
class Prediction:
    """What the planner says of a step: seconds, tokens/s of a GPU, MFU, peak memory of a rank; whose rates it took."""

    seconds: float | None
    tokens_per_second: float | None
    mfu: float | None
    peak_bytes: float
    rates: str


def predict(
    recipe: str, shape: Shape, preset: str, options: MeshOptions, form: ClosedForm, rates: plan.Rates
) -> Prediction:
    """The plan of a step of this shape on this mesh; every rank makes the call."""
    mesh, peak = form.mesh, peak_bytes(recipe, shape, form)
    gpu, origin = device_of_plan(mesh.device, mesh)
    if gpu is None:
        return Prediction(None, None, None, peak, origin)
    planner_options = plan.Options(preset, mesh.world_size, sequence=shape.document_tokens)
    planner = plan.Planner(planner_options, rates, form.config, gpu)
    layout = plan.Layout(resolve(options, mesh.world_size), form.sharding.recompute, shape.rows, shape.packs)
    planned = planner.plan(layout, form.sharding)
    if recipe == "rleif":
        return Prediction(2 * planned.step, None, None, peak, origin)
    seconds = planned.step
    rate = shape.packs * shape.tokens * mesh.data.size / seconds / mesh.world_size
    work = TRAINING_FACTOR * flops_per_token(form.config, shape.document_tokens)
    return Prediction(seconds, rate, rate * work / gpu.flops, peak, origin)


def peak_bytes(recipe: str, shape: Shape, form: ClosedForm) -> float:
    """Bound of what a rank holds at once; of an online step while policy and critic train."""
    memory = form.estimate(shape.tokens, shape.packs)
    peak = float(memory.peak + memory.workspace)
    if recipe == "rleif":
        frozen = form.config.num_parameters / form.mesh.copy.size * form.dtype.itemsize
        peak += memory.shards + memory.buffers + 3 * frozen
    return peak


def check_shape(recipe: str, shape: Shape) -> None:
    """ValueError unless documents fill packed rows, fit the context, and come in pairs where a recipe takes pairs."""
    context, length = shape.config.max_positions, shape.document_tokens
    least = 2 if recipe in PAIRED else 1
    if not 2 <= length <= context:
        raise ValueError(
            f"document_tokens: expected 2 to {context} (the model's context), got {length}; lower --tokens or give "
            "--document-tokens"
        )
    if shape.tokens % (least * length):
        unit = "pairs of documents" if least == 2 else "documents"
        fitting = math.gcd(shape.tokens // least, length) if shape.tokens % least == 0 else 0
        hint = f"give --document-tokens {fitting}, say" if fitting > 1 else "choose other --tokens"
        raise ValueError(
            f"tokens: expected a whole number of {unit} of {length} tokens in a packed row, got {shape.tokens}; {hint}"
        )


def check_memory(peak: float, room: float, shape: Shape) -> None:
    """ValueError where a step is bound to need more memory than a rank has."""
    if peak > room:
        raise ValueError(
            f"tokens: expected a step that fits {room / 2**30:.1f} GiB of a rank, got a planned peak of "
            f"{peak / 2**30:.1f} GiB with rows of {shape.tokens} tokens; lower --tokens, raise --sharding.recompute, "
            "divide the model over more ranks, or give --layers"
        )

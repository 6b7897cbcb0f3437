"""Throughput per GPU of the training step of every recipe, on one GPU or under torchrun.

    torchrun --nproc-per-node 8 -m benchmarks.train_step --recipe sft --preset 7b --tokens 16384 --document-tokens 4096
    python -m benchmarks.train_step --recipe sft rleif --preset demo --tokens 256 --json rows.jsonl
    python -m benchmarks.train_step --sweep layouts.toml --json rows.jsonl --plot scaling.svg

The step is the recipe's own, on random tokens and weights (benchmarks/train_recipes.py). Reported are

    tokens/s per GPU   tokens of all ranks with rows of their own / seconds / ranks; of rleif, tokens of answers
    MFU                operations of each document (flops.py) / seconds / ranks / peak; recomputation not counted
    waits              exposed communication by axis of the mesh (benchmarks/communication.py)
    bytes, memory      moved by axis, and the peak of a rank: on a CPU the resident set of the process

beside what the planner says of the same layout (benchmarks/train_plan.py). Every row is written as soon as it exists;
the trace and the memory snapshot come last.
"""

import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import environment
from benchmarks.communication import NUMBERS_KEY, Communication, CommunicationMeter
from benchmarks.gpu_timing import percentiles
from benchmarks.train_plan import (
    PARAMETER_AXES,
    ClosedForm,
    Pass,
    PassLog,
    Prediction,
    check_memory,
    check_shape,
    memory_bytes,
    peak_bytes,
    predict,
)
from benchmarks.train_recipes import PAIRED, RECIPES, Place, Shape, Work, phases
from benchmarks.train_row import Options, append, check_values, line_of
from benchmarks.train_single import CASES, run, text_of, trace
from benchmarks.train_sweep import sweep
from benchmarks.train_trace import snapshot, write_trace
from wizard_engine import runtime
from wizard_engine.model import PRESETS, Transformer
from wizard_engine.parallel import Mesh, make_mesh
from wizard_engine.parallel.mesh import resolve
from wizard_engine.parallel.parallelize import partitions_of
from wizard_engine.planning.estimate import mesh_of
from wizard_engine.planning.rates import peak_flops, rates_of
from wizard_engine.runtime.cli import cli
from wizard_engine.runtime.memory import peak_memory_gib
from wizard_engine.runtime.metrics import read_metrics
from wizard_engine.runtime.object_collectives import from_main, gather_objects
from wizard_engine.runtime.process import Runtime

# What gpu_check measures on one GPU stands in benchmarks/train_single.py.
__all__ = ["CASES", "Options", "main", "measure_all", "run", "text_of", "trace"]


def shape_of(options: Options, recipe: str) -> Shape:
    """What a step of a recipe is made of."""
    config = PRESETS[options.preset]
    config = replace(config, layers=options.layers or config.layers)
    length = options.document_tokens or max(1, options.tokens // (2 if recipe in PAIRED else 1))
    return Shape(config, options.tokens, length, options.packs, options.warmup + options.steps, options.seed)


def check(options: Options, world_size: int, is_launched: bool) -> None:
    """ValueError for options that no step can be made of, before a process group or a file exists.

    Args:
        is_launched: by torchrun.
    """
    try:
        mesh = resolve(options.mesh, world_size)
    except ValueError as error:
        if is_launched:
            raise
        raise ValueError(
            f"{error}; this is a single process: start `torchrun --nproc-per-node RANKS -m benchmarks.train_step ...`"
        ) from None
    has_gpu = torch.cuda.is_available() and options.device != "cpu"
    device = torch.device("cuda" if has_gpu else "cpu")
    if options.memory is not None and not has_gpu:
        raise ValueError(
            f"memory: expected a GPU (CUDA), got --device {options.device} without one; leave --memory out"
        )
    rates_of(options.rates)
    for recipe in options.recipe:
        shape = shape_of(options, recipe)
        check_shape(recipe, shape)
        if mesh.ep > 1 and not shape.config.experts:
            raise ValueError(f"mesh.ep: expected 1 for a model without experts, got {mesh.ep}")
        with torch.device("meta"):
            model = Transformer(shape.config)
        partitions_of(model, model, mesh_of(mesh, torch.device("meta")))
        form = ClosedForm(shape.config, mesh_of(mesh, device), options.sharding)
        check_memory(peak_bytes(recipe, shape, form), memory_bytes(device), shape)


# Measuring


@dataclass(frozen=True)
class Step:
    """One measured step of one rank; `work` of ranks that share rows counts once."""

    seconds: float
    work: Work
    moved: Communication
    planned: dict[tuple[str, str], int]


def synchronised(device: torch.device) -> float:
    """Seconds now, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measured(options: Options, recipe: str, rt: Runtime, mesh: Mesh) -> dict[str, Any]:
    """The row of a recipe; every rank makes the call."""
    shape = shape_of(options, recipe)
    form = ClosedForm(shape.config, mesh, options.sharding)
    predicted = predict(recipe, shape, options.preset, options.mesh, form, rates_of(options.rates))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(from_main(rt, lambda: folder))
        made = RECIPES[recipe](shape, Place(rt, mesh, options.sharding, out))
        steps, logged = _measured_steps(options, recipe, made, form, rt, mesh), None
        if rt.is_main:
            logged = read_metrics(out / "metrics.jsonl")
        memory = peak_memory_gib(rt.device)
        everyone = gather_objects((steps, memory))
    row = summary(recipe, [rank_steps for rank_steps, _ in everyone], mesh.row.size, peak_flops(rt.device))
    row["peak_memory_gib"] = max(memory for _, memory in everyone)
    if logged is not None:
        row |= from_log(logged, options.warmup, row["peak_tflops"] * 1e12)
    return about(options, recipe, shape, rt, mesh, form) | row | {"predicted": _readable(predicted)}


def from_log(lines: Sequence[Mapping[str, Any]], warmup: int, peak: float) -> dict[str, Any]:
    """What the run's own log says of the measured steps: tokens, operations of a token (whose attention it counts over
    whole packed rows), seconds of phases."""
    last = lines[-1]
    logged = {"logged_tokens": last["tokens"] - lines[warmup - 1]["tokens"], "phases": phases(lines[warmup:])}
    if "mfu" in last:
        logged["logged_flops_per_token"] = last["mfu"] * peak / last["tokens_per_second_per_device"]
    return logged


def _measured_steps(options: Options, recipe: str, made: Any, form: ClosedForm, rt: Runtime, mesh: Mesh) -> list[Step]:
    """This rank's steps behind the warm-up."""
    passes, steps = PassLog(), []
    passes.watch(made.models)
    with CommunicationMeter(mesh) as meter:
        for number in range(options.warmup + options.steps):
            if number == options.warmup and rt.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(rt.device)
            meter.take()
            began = synchronised(rt.device)
            work = next(made.steps)
            seconds = synchronised(rt.device) - began
            moved, calls = meter.take(), passes.take()
            if number >= options.warmup:
                steps.append(Step(seconds, work, moved, planned_bytes(form, recipe, made.models, calls)))
        # The run closes its log behind the last step.
        next(made.steps, None)
    return steps


def planned_bytes(form: ClosedForm, recipe: str, models: dict, calls: Sequence[Pass]) -> dict[tuple[str, str], int]:
    """The closed form of a step that made these calls; nothing where one rank has the whole model."""
    return {} if form.mesh.world_size == 1 else form.of_step(recipe, models, calls)


def summary(recipe: str, ranks: Sequence[Sequence[Step]], sharing: int, peak: float) -> dict[str, Any]:
    """Figures of the steps of all ranks.

    Args:
        ranks: steps of each.   sharing: ranks that have the same rows, one after the other.
        peak: operations of a rank per second.
    """
    world, count = len(ranks), len(ranks[0])
    # A step ends, for all, when its slowest rank does.
    seconds = [max(steps[i].seconds for steps in ranks) for i in range(count)]
    leaders = [steps for rank, steps in enumerate(ranks) if rank % sharing == 0]
    tokens = [sum(steps[i].work.tokens for steps in leaders) for i in range(count)]
    flops = [sum(steps[i].work.flops for steps in leaders) for i in range(count)]
    rates = [n / s / world for n, s in zip(tokens, seconds)]
    waited: Counter[str] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    planned: Counter[tuple[str, str]] = Counter()
    for step in (step for steps in ranks for step in steps):
        waited.update(step.moved.seconds)
        moved.update(step.moved.bytes)
        planned.update(step.planned)
    each = world * count
    return {
        "seconds": percentiles(seconds),
        "step_tokens": tokens,
        "step_flops": flops,
        "tokens_per_second_per_gpu": statistics.median(rates),
        "mfu": statistics.median(n / s / world / peak for n, s in zip(flops, seconds)),
        "peak_tflops": peak / 1e12,
        "exposed_seconds": {axis: s / each for axis, s in sorted(waited.items())},
        "exposed_share": {axis: s / world / sum(seconds) for axis, s in sorted(waited.items())},
        "bytes": {_name(key): n / each for key, n in sorted(moved.items()) if key[1] != NUMBERS_KEY and n},
        "numbers_bytes": sum(n for key, n in moved.items() if key[1] == NUMBERS_KEY) / each,
        "planned_bytes": {_name(key): n / each for key, n in sorted(planned.items()) if n},
        "bytes_as_planned": as_planned(recipe, moved, planned),
    }


def as_planned(
    recipe: str, moved: Mapping[tuple[str, str], int], planned: Mapping[tuple[str, str], float]
) -> bool | None:
    """Whether bytes are those of the closed form, which of an online step leaves out what moves tokens; None for the
    online step of a mixture, which has none."""
    keys = {key for key in (*moved, *planned) if key[1] != NUMBERS_KEY}
    if recipe == "rleif":
        keys = {key for key in keys if key[1] in PARAMETER_AXES}
        if keys and not planned:
            return None
    return all(moved.get(key, 0) == planned.get(key, 0) for key in keys)


def _name(key: tuple[str, str]) -> str:
    return " ".join(key)


def _readable(prediction: Prediction) -> dict[str, Any]:
    return {
        "seconds": prediction.seconds,
        "tokens_per_second_per_gpu": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "peak_memory_gib": prediction.peak_bytes / 2**30,
        "device": prediction.rates,
    }


def about(options: Options, recipe: str, shape: Shape, rt: Runtime, mesh: Mesh, form: ClosedForm) -> dict[str, Any]:
    """What a row is of."""
    on_gpu = rt.device.type == "cuda"
    device = torch.cuda.get_device_name(rt.device) if on_gpu else "CPU ranks"
    backend = "one process" if "RANK" not in os.environ else "nccl" if on_gpu else "gloo"
    known = {"benchmark": "train_step", "name": options.name or _mesh_words(mesh), **environment()}
    known |= {"seed": options.seed, "triton": _triton_version()}
    return known | {
        "device": device,
        "backend": backend,
        "recipe": recipe,
        "preset": options.preset,
        "layers": shape.config.layers,
        "tokens": shape.tokens,
        "document_tokens": shape.document_tokens,
        "packs": shape.packs,
        "ranks": rt.world_size,
        "mesh": _mesh_words(mesh),
        "sharding": asdict(form.sharding),
        "warmup": options.warmup,
        "steps": options.steps,
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _mesh_words(mesh: Mesh) -> str:
    """Axes of more than one rank: `dp_shard 2 x tp 2`."""
    sizes = {
        "dp_replicate": mesh.replicate.size,
        "dp_shard": mesh.shard.size // mesh.cp.size,
        "cp": mesh.cp.size,
        "tp": mesh.tp.size,
        "ep": mesh.ep.size,
    }
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 rank"


# The command


def measure_all(options: Options, rt: Runtime) -> list[dict[str, Any]]:
    """Rows of all recipes, each written and printed as soon as it exists; every rank makes the call."""
    mesh, rows = make_mesh(options.mesh, rt), []
    for recipe in options.recipe:
        row = measured(options, recipe, rt, mesh)
        rows.append(row)
        if rt.is_main:
            if options.json is not None:
                append(options.json, row)
            print(line_of(row), flush=True)
    return rows


def work(options: Options) -> None:
    """All rows, then trace and snapshot; every rank makes the call."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check(options, world_size, "RANK" in os.environ)
    rt = runtime.start(options.device, timeout_seconds=options.mesh.timeout_seconds)
    measure_all(options, rt)
    mesh = make_mesh(options.mesh, rt)
    recipe = options.recipe[0]
    if options.memory is not None:
        snapshot(recipe, shape_of(options, recipe), options.sharding, rt, mesh, options.memory)
    if options.trace is not None:
        one_layer = replace(shape_of(options, recipe), config=replace(PRESETS[options.preset], layers=1))
        write_trace(recipe, one_layer, options.sharding, rt, mesh, options.trace)


def main(args: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 2 for options that do not fit, 1 where a layout of a sweep failed."""
    options = cli(Options, args=args)
    try:
        check_values(options)
        if options.sweep is not None:
            return sweep(options)
        work(options)
    except (ValueError, OSError) as error:
        # Under torchrun every rank finds the same.
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"train_step: error: {error}", file=sys.stderr)
        return 2
    finally:
        runtime.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

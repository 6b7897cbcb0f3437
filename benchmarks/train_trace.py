"""A Chrome trace of a training step with ranges named by module, and a snapshot of the GPU's memory over a step.

Ranges are record_function ranges of the host's thread and, on a GPU, NVTX ranges for Nsight Systems. A range covers a
module's forward; the trace's own arrows link an operator of the backward to the one of the forward that it belongs to.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from benchmarks.train_recipes import RECIPES, Place, Shape
from wizard_engine.parallel import Mesh, Sharding
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.process import Runtime

# Methods of a block that use its modules' weights without a call of the module, and the names of their ranges.
METHODS = {"projected": "attention.qkv", "inner": "feed_forward.gate_up", "outer": "feed_forward.down"}
# Events that a memory snapshot keeps at most, the latest ones.
EVENTS = 200_000


@contextmanager
def module_ranges(models: dict[str, nn.Module]) -> Iterator[None]:
    """In the block, every forward of a module with parameters of its own or below it is a range `role.module`."""
    open_ranges: list[ExitStack] = []

    def enter_range(name: str, module: nn.Module, args: Any) -> None:
        open_ranges.append(named_range(name))

    def exit_range(module: nn.Module, args: Any, output: Any) -> None:
        open_ranges.pop().close()

    with ExitStack() as stack:
        for role, model in models.items():
            for name, module in model.named_modules():
                if any(True for _ in module.parameters()):
                    full = f"{role}.{name}" if name else role
                    for handle in (
                        module.register_forward_pre_hook(partial(enter_range, full)),
                        module.register_forward_hook(exit_range, always_call=True),
                    ):
                        stack.callback(handle.remove)
                for method in METHODS:
                    if hasattr(module, method):
                        setattr(module, method, _ranged(getattr(module, method), f"{role}.{name}.{METHODS[method]}"))
                        stack.callback(delattr, module, method)
        yield


def named_range(name: str) -> ExitStack:
    """An open range, which `close` ends."""
    stack = ExitStack()
    stack.enter_context(record_function(name))
    if torch.cuda.is_available():
        stack.enter_context(torch.cuda.nvtx.range(name))
    return stack


def _ranged(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with named_range(name):
            return method(*args)

    return call


def activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    """What a trace records."""
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU]


def write_trace(recipe: str, shape: Shape, sharding: Sharding, rt: Runtime, mesh: Mesh, path: Path) -> None:
    """Write rank 0's Chrome trace of the second step of a recipe; every rank makes the call."""
    with _steps(recipe, shape, sharding, rt, mesh) as made:
        next(made.steps)
        with module_ranges(made.models), torch.profiler.profile(activities=activities(rt.device)) as profile:
            with record_function(f"{recipe} step"):
                next(made.steps)
            if rt.device.type == "cuda":
                torch.cuda.synchronize(rt.device)
    if rt.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        print(f"written: {path}", flush=True)


def snapshot(recipe: str, shape: Shape, sharding: Sharding, rt: Runtime, mesh: Mesh, path: Path) -> None:
    """Write rank 0's snapshot of the GPU's memory over building a recipe's models and two steps; every rank calls."""
    torch.cuda.memory._record_memory_history(max_entries=EVENTS)
    with _steps(recipe, shape, sharding, rt, mesh) as made:
        next(made.steps)
        next(made.steps)
        torch.cuda.synchronize(rt.device)
        if rt.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            print(f"written: {path}", flush=True)
    torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def _steps(recipe: str, shape: Shape, sharding: Sharding, rt: Runtime, mesh: Mesh) -> Iterator[Any]:
    """A recipe of two steps in a run directory of its own, whose log is closed behind the block."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(from_main(rt, lambda: folder))
        made = RECIPES[recipe](replace(shape, steps=2), Place(rt, mesh, sharding, out))
        yield made
        next(made.steps, None)

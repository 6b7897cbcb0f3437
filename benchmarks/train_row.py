"""Options of benchmarks.train_step, and the rows that it writes and prints."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command_line import nearest
from benchmarks.train_recipes import RECIPES
from wizard_engine.model import PRESETS
from wizard_engine.parallel import MeshOptions, Sharding


@dataclass(frozen=True)
class Options:
    """Throughput per GPU of the training steps of recipes."""

    recipe: tuple[str, ...] = ("sft",)
    """Which, one after the other: sft, stage_dpo, reward, rleif."""
    preset: str = "7b"
    """Preset of the model; its weights are random."""
    layers: int | None = None
    """Layers of the model; default: the preset's."""
    tokens: int = 4096
    """Tokens of a packed row."""
    document_tokens: int | None = None
    """Tokens of each document in it; default: the whole row, or half of it where documents come in pairs."""
    packs: int = 1
    """Packed rows of a step of each rank with rows of its own."""
    warmup: int = 2
    """Steps before those that are measured."""
    steps: int = 5
    """Steps that are measured."""
    mesh: MeshOptions = field(default_factory=MeshOptions)
    sharding: Sharding = field(default_factory=Sharding)
    rates: Path | None = None
    """JSON file of measured rates for the planner (benchmarks/plan_rates.py); default: its assumptions."""
    json: Path | None = None
    """File to which a JSON line is appended for each row."""
    trace: Path | None = None
    """Write a Chrome trace of one step of the first recipe with one layer, ranges named by module."""
    memory: Path | None = None
    """Write a snapshot of the GPU's memory over two steps of the first recipe, for pytorch.org/memory_viz."""
    sweep: Path | None = None
    """Start torchrun for each layout of this file (TOML or JSON lines); other options are their defaults."""
    plot: Path | None = None
    """With --sweep, write a scaling plot (SVG): tokens/s per GPU over ranks, and the planner's."""
    name: str = ""
    """Name of the layout, in its rows."""
    seed: int = 0
    device: str = "auto"


def check_values(options: Options) -> None:
    """ValueError for a value that no run can have."""
    for name, values, known in (("recipe", options.recipe, RECIPES), ("preset", (options.preset,), PRESETS)):
        for value in values:
            if value not in known:
                hint = nearest(value, list(known))
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}{hint}")
    for name in ("layers", "tokens", "document_tokens", "packs", "steps", "warmup"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not options.recipe:
        raise ValueError(f"recipe: expected one or more of {', '.join(RECIPES)}, got none")
    if options.plot is not None and options.sweep is None:
        raise ValueError("plot: expected --sweep beside it, got none; a plot needs several layouts")


def line_of(row: dict[str, Any]) -> str:
    """The aligned line of a row."""
    planned, waits = row["predicted"], row["exposed_share"]
    shape = f"{row['preset']} T={row['tokens']}/{row['document_tokens']} x {row['packs']}"
    layout = f"{row['mesh']}, {row['sharding']['dtype']}, recompute {row['sharding']['recompute']}"
    rate = planned["tokens_per_second_per_gpu"]
    text = f"{row['recipe']:10}{row['ranks']:>3} ranks  {layout:46}{shape:24}"
    text += f"{row['tokens_per_second_per_gpu']:>12,.0f} tokens/s/GPU  MFU {row['mfu']:6.1%}  "
    text += f"planned {'-' if rate is None else f'{rate:,.0f}':>10}  waits {sum(waits.values()):6.1%}"
    text += f"  peak {row['peak_memory_gib']:.2f} GiB (planned {planned['peak_memory_gib']:.2f})"
    same = {True: "as planned", False: "NOT as planned", None: "not planned"}[row["bytes_as_planned"]]
    return text + f"  {sum(row['bytes'].values()) / 2**20:.1f} MiB moved, {same}"


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a JSON line to a file, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())

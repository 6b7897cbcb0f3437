"""Stages as command lines: for a driver that starts them, for a shell, and as a Slurm script."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wizard_engine.runtime.option_tables import command_words

from .graph import Node
from .run_file import Launch, RunFile

RECIPES = Path(__file__).parents[2] / "recipes"
# Recipes that work on one rank, whatever the number of processes.
SINGLE = ("make_world", "sample", "mix", "arena", "mt_bench")


def stage_command(run: RunFile, node: Node, config: Any | None = None) -> str:
    """The command line of a stage, on one line."""
    config = node.config if config is None else config
    recipe = Path(os.path.relpath(RECIPES)) / f"{node.recipe}.py"
    words = [*_launcher(run.launch, node), str(recipe), *command_words(config)]
    return f"{run.launch.prefix} {shlex.join(words)}".strip() if _is_many(run.launch, node) else shlex.join(words)


def _is_many(launch: Launch, node: Node) -> bool:
    return node.recipe not in SINGLE and launch.nodes > 1


def _launcher(launch: Launch, node: Node) -> list[str]:
    if node.recipe in SINGLE:
        return ["python"]
    words = ["torchrun", "--nproc-per-node", str(launch.processes)]
    if launch.nodes == 1:
        return [*words, "--standalone"]
    return [
        *words,
        *("--nnodes", str(launch.nodes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", launch.address or "$MASTER_ADDR:29500"),
    ]


def shown_commands(run: RunFile, nodes: Sequence[Node]) -> str:
    """A line for each stage."""
    return "\n".join(_unquoted(stage_command(run, node)) for node in nodes)


def _unquoted(command: str) -> str:
    """The first node's address is the shell's to fill in."""
    return command.replace("'$MASTER_ADDR:29500'", '"$MASTER_ADDR:29500"')


def slurm_script(run: RunFile, nodes: Sequence[Node]) -> str:
    """A Slurm script that runs the stages one after the other, and ends with the first that fails.

    A stage that is done before is skipped by its recipe, so the script can be submitted again.
    """
    launch = run.launch
    options = {
        "job-name": run.out.name,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": launch.processes,
        "time": launch.time,
        "account": launch.account,
        "partition": launch.partition,
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value)]
    lines += ["set -euo pipefail", 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', ""]
    for node in nodes:
        command = _unquoted(stage_command(run, node))
        starter = (
            f"srun --nodes={launch.nodes} --ntasks-per-node=1 " if _is_many(launch, node) and not launch.prefix else ""
        )
        lines += [f"echo '== {node.where}'", starter + command]
    return "\n".join(lines) + "\n"

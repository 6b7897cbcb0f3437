"""What the stages of a run write to disk: models, and checkpoints with the state of their optimizers.

    model        every parameter in the dtype that the stage computes in
    checkpoint   of everything that is trained: master weights and both moments of AdamW, fp32; RLEIF trains a policy
                 and, with critic advantages, a critic of the same size

Rows, ledgers, logs and pages are not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wizard_engine.model import PRESETS, ModelDirectory, Transformer
from wizard_engine.parallel.parallelize import compute_dtype

from .graph import Node
from .run_file import RunFile

GIB = 2**30
# Master weight and two moments.
CHECKPOINT_BYTES = 12
# Of a running mean of the policy's weights.
AVERAGE_BYTES = 4
# Recipes that write a checkpoint of their last step too.
SAVES_LAST = ("sft", "reward")
# Sizes of the table of learning rates that the planner has a preset of.
PLANNED = {"7B": "7b", "70B": "70b", "8x22B": "8x22b"}


@dataclass(frozen=True)
class Disk:
    """Bytes of a stage: what stays, and what comes on top while a checkpoint replaces an older one."""

    stays: int = 0
    passing: int = 0


def base_parameters(run: RunFile, size: str) -> int | None:
    """Parameters of a run's base model, of the preset of its size where the directory is not there; None: not known."""
    if run.base.model is not None and run.base.model.is_dir():
        with ModelDirectory(run.base.model) as directory:
            return directory.parameter_count
    if size not in PLANNED:
        return None
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(PRESETS[PLANNED[size]]).parameters())


def disk_of(node: Node, parameters: int, device: torch.device, steps: int | None = None) -> Disk:
    """What a stage writes; nothing where it trains nothing.

    Args:
        parameters: of the model.   device: that it trains on.
        steps: of the stage; None: not known. Then one checkpoint is counted.
    """
    training = getattr(node.config, "training", None)
    if training is None:
        return Disk()
    model = parameters * compute_dtype(node.config.sharding, device).itemsize
    parts = getattr(node.config, "slices", 1)
    saved = _saved(node, None if steps is None else max(1, steps // parts))
    each = parameters * _state_bytes(node.config)
    kept = min(saved, training.keep_last)
    return Disk(model + parts * kept * each, each if saved > kept else 0)


def is_frozen(config: Any) -> bool:
    """Whether a stage trains the head of its model alone."""
    return getattr(config, "kind", None) == "process" and config.surprise


def _state_bytes(config: Any) -> int:
    """Bytes of a checkpoint for each parameter of the model."""
    if is_frozen(config):
        return 0
    has_critic = hasattr(config, "ppo") and config.ppo.advantages == "critic"
    return CHECKPOINT_BYTES * (1 + has_critic) + AVERAGE_BYTES * (getattr(config, "average_from", 1.0) < 1)


def _saved(node: Node, steps: int | None) -> int:
    """Checkpoints that a run of so many steps writes, those that are removed again included."""
    training = node.config.training
    if not training.save_every:
        return 0
    known = node.config.rollout.steps if hasattr(node.config, "rollout") else steps
    if known is None:
        return 1
    return (known - 1) // training.save_every + (node.recipe in SAVES_LAST)


def disk_of_run(
    run: RunFile, nodes: Sequence[Node], size: str, steps: Mapping[str, int | None] | None = None
) -> dict[str, Disk]:
    """What each stage that is not done writes.

    Args:
        size: row of the table of learning rates.   steps: stage -> its steps, as far as they are known.
    """
    parameters = base_parameters(run, size)
    if parameters is None:
        return {}
    # Models of the planner's sizes train on GPUs, wherever this is asked.
    device = torch.device("cuda" if torch.cuda.is_available() or size in PLANNED else "cpu")
    return {
        node.where: disk_of(node, parameters, device, (steps or {}).get(node.where))
        for node in nodes
        if not (node.out / "stage.json").exists()
    }


def disk_bytes(stages: Mapping[str, Disk]) -> int:
    """The most that the stages of a run have on disk at a time."""
    return sum(disk.stays for disk in stages.values()) + max((disk.passing for disk in stages.values()), default=0)

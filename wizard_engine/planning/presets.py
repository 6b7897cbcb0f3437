"""Named sizes of training runs: the model, the mesh, what is computed again, and how many tokens a rank takes at once.

They are the best that `python -m wizard_engine plan` finds for documents of 4,096 tokens, or close to it, which a test
holds them to; the experts of 8x22b are divided, so that a rank's memory holds longer rows.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import tyro

from wizard_engine.parallel import MeshOptions, Sharding

Config = TypeVar("Config")


@dataclass(frozen=True)
class Scale:
    """A model on a number of GPUs.

    gpu: the smallest kind that it fits on (`rates.GPUS`).   pack_tokens: of a packed row.   packs: rows of a step.
    """

    model: str
    gpus: int
    gpu: str
    mesh: MeshOptions
    sharding: Sharding
    pack_tokens: int
    packs: int


SCALES = {
    "7b-1": Scale("7b", 1, "H200", MeshOptions(), Sharding(recompute="full"), 4096, 32),
    "7b-8": Scale("7b", 8, "H100", MeshOptions(), Sharding(recompute="selective"), 16_384, 8),
    "70b-32": Scale("70b", 32, "H100", MeshOptions(tp=2), Sharding(recompute="selective"), 4096, 64),
    "70b-64": Scale("70b", 64, "H100", MeshOptions(dp_replicate=2, tp=2), Sharding(recompute="selective"), 4096, 64),
    "8x22b-64": Scale("8x22b", 64, "H100", MeshOptions(ep=8), Sharding(recompute="full"), 16_384, 64),
    "8x22b-128": Scale("8x22b", 128, "H100", MeshOptions(ep=8), Sharding(recompute="full"), 8192, 128),
}


def presets(config: type[Config]) -> dict[str, Config]:
    """Scale -> a recipe's configuration with its defaults and the scale's own; what has no default is asked for."""
    presets_by_name = {}
    for name, scale in SCALES.items():
        values: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            if field.default is not dataclasses.MISSING:
                values[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                values[field.name] = field.default_factory()
            else:
                values[field.name] = tyro.MISSING
        training = dataclasses.replace(values["training"], pack_tokens=scale.pack_tokens, packs_per_step=scale.packs)
        values |= {"model": scale.model, "mesh": scale.mesh, "sharding": scale.sharding, "training": training}
        presets_by_name[name] = config(**values)
    return presets_by_name

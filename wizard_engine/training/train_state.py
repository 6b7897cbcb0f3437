"""Shards of a model and its optimizer in a checkpoint: write and restore."""

from torch import nn

from wizard_engine.checkpoint import Checkpoint, Shard
from wizard_engine.optim import AdamW
from wizard_engine.optim.adamw import MOMENTS
from wizard_engine.parallel import sharded


def checkpoint_shards(model: nn.Module, optimizer: AdamW) -> tuple[dict[str, Shard], dict[str, Shard]]:
    """This rank's shards of the trained parameters and of the optimizer's moments.

    Both are empty on the further replicas of a model.
    """
    engine = sharded(model)
    if engine.mesh.replicate.index:
        return {}, {}
    specs = engine.shard_specs
    weights = {name: Shard(specs[name], start, values) for name, start, values in engine.shards(engine.master)}
    moments = {
        f"{moment}.{name}": Shard(specs[name], start, values)
        for moment, name, start, values in optimizer.state_shards()
    }
    return weights, moments


def restore(checkpoint: Checkpoint, group: str, model: nn.Module, optimizer: AdamW, count: int) -> None:
    """Fill this rank's shards of a model and its moments from a checkpoint of any layout.

    Args:
        group: of the parameters; the moments are in `{group}_optimizer`.   count: number of updates.
    Raises:
        ValueError: the checkpoint is of another model.
    """
    engine = sharded(model)
    shapes = {slot.name: engine.shapes[slot.name] for flat in engine.training for slot in flat.layout.slots}
    checkpoint.check_like(group, shapes)
    checkpoint.check_like(
        f"{group}_optimizer", {f"{moment}.{n}": shape for moment in MOMENTS for n, shape in shapes.items()}
    )
    for name, start, values in engine.shards(engine.master):
        checkpoint.read(group, name, engine.shard_specs[name], start, values)
    for moment, name, start, values in optimizer.state_shards():
        checkpoint.read(f"{group}_optimizer", f"{moment}.{name}", engine.shard_specs[name], start, values)
    optimizer.count = count
    engine.publish()

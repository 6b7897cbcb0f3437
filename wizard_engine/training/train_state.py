"""What a checkpoint holds of a model and its optimizer, written and read."""

from torch import nn

from wizard_engine.checkpoint import Checkpoint, Shard
from wizard_engine.optim import AdamW
from wizard_engine.optim.adamw import MOMENTS
from wizard_engine.parallel import sharded


def parts_of(model: nn.Module, optimizer: AdamW) -> tuple[dict[str, Shard], dict[str, Shard]]:
    """What this rank writes into a checkpoint of a model: its parameters that train, and its optimizer's moments.

    Ranks that hold another copy of the model write nothing.
    """
    engine = sharded(model)
    if engine.mesh.replicate.index:
        return {}, {}
    cuts = engine.shard_specs
    weights = {name: Shard(cuts[name], start, values) for name, start, values in engine.shards(engine.master)}
    moments = {
        f"{moment}.{name}": Shard(cuts[name], start, values) for moment, name, start, values in optimizer.state_shards()
    }
    return weights, moments


def restore(found: Checkpoint, group: str, model: nn.Module, optimizer: AdamW, count: int) -> None:
    """Fill this rank's parts of a model and its moments from a checkpoint of any layout.

    Args:
        group: of the parameters; the moments are in `{group}_optimizer`.   count: updates that were made.
    Raises:
        ValueError: the checkpoint is another model's.
    """
    engine = sharded(model)
    shapes = {slot.name: engine.shapes[slot.name] for flat in engine.training for slot in flat.layout.slots}
    found.check_like(group, shapes)
    found.check_like(
        f"{group}_optimizer", {f"{moment}.{n}": shape for moment in MOMENTS for n, shape in shapes.items()}
    )
    for name, start, values in engine.shards(engine.master):
        found.read(group, name, engine.shard_specs[name], start, values)
    for moment, name, start, values in optimizer.state_shards():
        found.read(f"{group}_optimizer", f"{moment}.{name}", engine.shard_specs[name], start, values)
    optimizer.count = count
    engine.publish()

"""Closed forms of the memory and traffic of a rank of a sharded model, from the shapes alone.

    shards       4 (master) + 4 (gradient) + 8 (moments) + the compute dtype's copy, bytes for each element of a shard;
                 on one device with one micro-batch a step the gradient is in the compute dtype
    buffers      two gathered units in the compute dtype, a unit of gradients in fp32 and one in the compute dtype, and
                 the resident units
    activations  saved activations of every block, and the tensors of the current block or loss
    workspace    memory of the kernels: chunks of logits, fp32 sums of the head's gradients

The backward allocates gradients of the shards as it frees saved activations, block by block. The peak is at its
beginning, without the gradients, or at its end, without the activations. With several micro-batches both exist at
once.

The results are upper bounds of what a device allocates at once, without fragmentation and the communication library.
Traffic counts whole buffers: the output of a gather, the input of a reduction, the sent bytes of an exchange. The load
of the experts is even. Sums of norms, router losses and logs are neglected.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from wizard_engine.parallel.flat_layout import Layout
from wizard_engine.parallel.mesh import Axis, Mesh, MeshShape
from wizard_engine.parallel.parallelize import Sharding, compute_dtype, partitions_of, unit_specs

# Largest chunks of logits in the head's kernels, bytes (kernels/linear_logprob.py).
LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank.

    shards, buffers, activations, workspace: see the module.   kept: saved activations of all blocks.
    gradients: of the shards, if they are freed in every step.   micro_batches: of a step.   elements: of the shards.
    traffic: (kind of collective, axis of the mesh) -> bytes of a step; kinds gather, reduce, sum, exchange.
    """

    shards: int
    buffers: int
    activations: int
    workspace: int
    kept: int
    gradients: int
    micro_batches: int
    elements: int
    traffic: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def saved(self) -> int:
        """Memory that kept activations and gradients share."""
        return 0 if self.micro_batches > 1 else min(self.kept, self.gradients)

    @property
    def peak(self) -> int:
        """Largest memory at one time without the kernels' workspace."""
        return self.shards + self.buffers + self.activations - self.saved

    @property
    def gathered(self) -> int:
        """Traffic of parameters, bytes."""
        return sum(n for (kind, axis), n in self.traffic.items() if kind == "gather" and axis in PARAMETER_AXES)

    @property
    def reduced(self) -> int:
        """Traffic of gradients, bytes."""
        return sum(n for (kind, axis), n in self.traffic.items() if kind == "reduce" and axis in PARAMETER_AXES)

    @property
    def replicated(self) -> int:
        """Traffic of the sum over the replicas of the model, bytes."""
        return self.traffic.get(("sum", "replicate"), 0)


PARAMETER_AXES = ("shard", "copy", "efsdp")


def mesh_of(shape: MeshShape, device: torch.device) -> Mesh:
    """Mesh of the first rank with the sizes of this shape, without groups."""
    return Mesh(
        device=device,
        world_size=shape.replicate * shape.copy,
        replicate=Axis(shape.replicate),
        shard=Axis(shape.dp_shard * shape.cp),
        tp=Axis(shape.tp),
        cp=Axis(shape.cp),
        row=Axis(shape.cp * shape.tp),
        copy=Axis(shape.copy),
        efsdp=Axis(shape.efsdp),
        ep=Axis(shape.ep),
        data=Axis(shape.replicate * shape.dp_shard),
    )


@dataclass(frozen=True)
class _Unit:
    """Sizes of a unit: elements of a rank's shard and of the whole flat buffer, and the axis that shards it."""

    name: str
    shard_size: int
    size: int
    over: str
    resident: bool

    @property
    def kind(self) -> str:
        """Kind of the unit, without the index of its block."""
        return "experts" if self.name.endswith("experts") else "block" if "." in self.name else self.name


def sizes_of_units(model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> list[_Unit]:
    """Sizes of the units of a model on a mesh."""
    partitions = partitions_of(model, model, mesh)
    units = []
    for spec in unit_specs(model, model, dtype, apart=mesh.tp.size > 1):
        count = getattr(mesh, spec.over).size
        shapes = [
            (name, partitions[name].local.local_shape if name in partitions else tuple(p.shape))
            for name, p in spec.parameters.items()
        ]
        layout = Layout(shapes, count)
        units.append(_Unit(spec.name, layout.shard_size, layout.size, spec.over, spec.resident))
    return units


def estimate(
    model: nn.Module,
    mesh: Mesh,
    sharding: Sharding,
    *,
    tokens: int,
    micro_batches: int = 1,
    units: list[_Unit] | None = None,
) -> Estimate:
    """Memory and traffic of training steps with AdamW, all parameters trained, everything on the device.

    Args:
        model: a plain Transformer, for example on the meta device.   tokens: capacity of a packed row.
        micro_batches: of a step.   units: result of `sizes_of_units` for this mesh, to reuse it.
    """
    dtype = compute_dtype(sharding, mesh.device)
    wide, narrow = 4, dtype.itemsize
    units = sizes_of_units(model, mesh, dtype) if units is None else units
    is_single = mesh.copy.size == mesh.replicate.size == micro_batches == 1
    per_element = 3 * wide + (narrow if is_single else wide) + (narrow if narrow != wide else 0)
    elements = sum(unit.shard_size for unit in units)
    buffers, whole = 0, sharding.accumulate == "whole"
    if mesh.copy.size > 1:
        room = {unit: unit.size if getattr(mesh, unit.over).size > 1 else 0 for unit in units}
        rotating = [room[unit] for unit in units if not unit.resident]
        largest = max(unit.size for unit in units)
        buffers = (max(rotating[::2], default=0) + max(rotating[1::2], default=0)) * narrow
        buffers += sum((room[unit] + unit.size) * narrow for unit in units if unit.resident)
        buffers += (sum(unit.size for unit in units) if whole else largest) * wide + largest * narrow
        if micro_batches > 1 and not whole:
            buffers += max(unit.shard_size for unit in units) * wide
    kept, working = activation_bytes(model, mesh, tokens, sharding, dtype)
    width, vocab_shard = model.config.width, model.config.vocab_size // mesh.tp.size
    return Estimate(
        shards=elements * per_element,
        buffers=buffers,
        activations=kept + working,
        workspace=LOGITS_BYTES + (vocab_shard + tokens // mesh.cp.size) * width * wide,
        kept=kept,
        gradients=elements * wide if mesh.copy.size > 1 else 0,
        micro_batches=micro_batches,
        elements=elements,
        traffic=_traffic(model, mesh, sharding, units, tokens, micro_batches, narrow),
    )


def frozen_bytes(model: nn.Module, mesh: Mesh, sharding: Sharding) -> int:
    """Memory of a rank for a model that is not trained: its shards, and the units that are gathered at once."""
    size = compute_dtype(sharding, mesh.device).itemsize
    units = sizes_of_units(model, mesh, compute_dtype(sharding, mesh.device))
    room = {unit: unit.size if getattr(mesh, unit.over).size > 1 else 0 for unit in units}
    rotating = [room[unit] for unit in units if not unit.resident]
    gathered = max(rotating[::2], default=0) + max(rotating[1::2], default=0)
    gathered += sum(room[unit] for unit in units if unit.resident)
    return (sum(unit.shard_size for unit in units) + gathered) * size


def _traffic(
    model: nn.Module, mesh: Mesh, sharding: Sharding, units: list[_Unit], tokens: int, micro_batches: int, narrow: int
) -> dict[tuple[str, str], int]:
    traffic: dict[tuple[str, str], int] = {}

    def add(kind: str, axis: str, size: int) -> None:
        if getattr(mesh, axis).size > 1 and size:
            traffic[kind, axis] = traffic.get((kind, axis), 0) + size

    times = _times_gathered(model, micro_batches)
    for unit in units:
        if unit.resident or unit.kind not in ("block", "experts"):
            add("gather", unit.over, unit.size * narrow * (1 if unit.resident else times[unit.kind]))
        elif unit.name.startswith("blocks.0"):
            # All blocks are alike.
            add("gather", unit.over, unit.size * narrow * times[unit.kind])
        if mesh.copy.size > 1:
            add("reduce", unit.over, unit.size * 4 * (1 if sharding.accumulate == "whole" else micro_batches))
    add("sum", "replicate", sum(unit.shard_size for unit in units) * 4)
    for (kind, axis), size in _token_traffic(model, mesh, sharding, tokens, narrow).items():
        add(kind, axis, size * micro_batches)
    return traffic


def _times_gathered(model: nn.Module, k: int) -> dict[str, int]:
    """How often a step of k micro-batches gathers each kind of unit, all blocks together.

    A forward gathers every unit, a backward every one but the embedding, in reverse. Two buffers keep the last two
    units from one pass to the next, so these are not gathered again.
    """
    layers, tied, mixture = len(model.blocks), model.head is None, bool(model.config.experts)
    if tied:
        blocks = layers + (2 * k - 1) * (layers - (1 if mixture else 2))
        return {"block": blocks, "experts": blocks}
    ends = {"embedding": k, "head": k}
    if mixture:
        return ends | {"block": 2 * k * layers - (k - 1), "experts": k * (2 * layers - 1)}
    return ends | {"block": 2 * k * (layers - 1) + 1}


def _token_traffic(
    model: nn.Module, mesh: Mesh, sharding: Sharding, tokens: int, narrow: int
) -> dict[tuple[str, str], int]:
    """Traffic of a micro-batch's tokens, bytes."""
    c, again = model.config, sharding.recompute
    row, local_tokens = tokens // mesh.cp.size, tokens // mesh.row.size
    # The residual stream is gathered before column-parallel and summed after row-parallel products.
    stream, products = row * c.width * narrow, 1 if c.experts else 2
    gathers = sums = 1 + products * c.layers
    more = products * c.layers
    # The backward sums where the forward gathered, and the reverse. It also gathers the tokens once more.
    gathers, sums = gathers + sums + more, sums + gathers
    if again == "full":
        sums += c.layers
    loss_bytes = 4 * 4 * row
    traffic = {("gather", "tp"): gathers * stream + mesh.tp.size * loss_bytes, ("reduce", "tp"): sums * stream}
    keys = 2 * tokens * (c.kv_heads // mesh.tp.size) * c.head_width * narrow * c.layers
    traffic["gather", "cp"] = keys * (2 if again == "full" else 1) + mesh.cp.size * loss_bytes
    traffic["reduce", "cp"] = keys
    if c.experts:
        passes = 3 if again == "full" else 2
        rows = local_tokens * c.experts_per_token
        # The counts are exchanged once: recomputation reuses the routes.
        traffic["exchange", "ep"] = c.layers * (passes * 2 * rows * c.width * narrow + 4 * c.experts)
    return traffic


def activation_bytes(
    model: nn.Module, mesh: Mesh, tokens: int, sharding: Sharding, dtype: torch.dtype
) -> tuple[int, int]:
    """Bounds of a micro-batch's activations: saved tensors of all blocks, tensors of the current block or loss."""
    c, size, tp = model.config, dtype.itemsize, mesh.tp.size
    row, local_tokens = tokens // mesh.cp.size, tokens // mesh.row.size
    inner, kv = c.heads * c.head_width // tp, c.kv_heads * c.head_width // tp
    # Rotated q and k, the qkv product with v as a view, attention's output; over cp ranks all keys and values.
    attention = row * (inner + kv + (inner + 2 * kv) + inner)
    if mesh.cp.size > 1:
        attention = row * 3 * inner + tokens * 2 * kv
    if c.experts:
        rows = local_tokens * c.experts_per_token
        travelled = 2 * c.width if mesh.ep.size > 1 else 0
        # The backward recomputes the activation.
        feed_forward, cheap = rows * (2 * c.ffn_width + travelled), local_tokens * c.width
        fp32_bytes = 4 * local_tokens * (c.experts + 4 * c.experts_per_token)
    else:
        feed_forward, cheap = row * 3 * c.ffn_width // tp, local_tokens * 2 * c.width + row * c.ffn_width // tp
        fp32_bytes = 0
    # The residual stream and its norm, twice.
    block = local_tokens * 4 * c.width + attention + feed_forward
    fp32_bytes += 4 * (row * c.heads // tp + 2 * local_tokens)
    saved = {"none": block, "selective": block - cheap, "full": local_tokens * c.width}[sharding.recompute]
    # Offloaded tensors of two blocks are on the device at a time; small tensors stay there.
    whole = min(c.layers, 2) if sharding.offload_activations else c.layers
    kept = whole * saved * size + c.layers * (4 * local_tokens if sharding.recompute == "full" else fp32_bytes)
    again = block * size + fp32_bytes if sharding.recompute != "none" else 0
    # Gradients of a feed-forward block and of the stream, and gathered tokens of the latter.
    grads = rows * 3 * c.ffn_width if c.experts else feed_forward
    working = (grads + 4 * local_tokens * c.width + (2 * row * c.width if tp > 1 else 0)) * size
    return kept, again + working

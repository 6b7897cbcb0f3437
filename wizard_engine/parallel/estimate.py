"""Closed forms of what a rank of a sharded model holds and moves, out of the shapes alone.

    parts        4 (master) + 4 (gradient) + 8 (moments) + the compute dtype's copy, bytes for each element of the part
    places       two gathered units in the compute dtype, a unit of gradients in fp32 and one as they come, what stays
    activations  what the backward keeps of every block, and the tensors of the block or loss at work

Gradients of the parts come as what the backward keeps goes, block by block: the peak is at the backward's beginning,
without the former, or at its end, without the latter; with several micro-batches both are there at once.

They are upper bounds of what a device allocates at once; fragmentation and the communication library come on top.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .layout import Layout
from .mesh import Mesh
from .parallelize import Sharding, compute_dtype, unit_specs


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank.

    parts, places, activations: see the module.   kept: of the activations, what the backward keeps of the blocks.
    gradients: of the parts.   micro_batches: of a step.   gathered, reduced: whole buffers of a step's collectives on
    the shard axes, in the compute dtype and in fp32.   replicated: of the sum over the copies of the model.
    """

    parts: int
    places: int
    activations: int
    kept: int
    gradients: int
    micro_batches: int
    gathered: int
    reduced: int
    replicated: int

    @property
    def peak(self) -> int:
        """Largest memory at one time."""
        saved = 0 if self.micro_batches > 1 else min(self.kept, self.gradients)
        return self.parts + self.places + self.activations - saved


def estimate(
    model: nn.Module, mesh: Mesh, sharding: Sharding, *, tokens: int, micro_batches: int = 1
) -> Estimate:  # fmt: skip
    """Memory and traffic of training steps with AdamW, all parameters trained, everything on the device.

    Args:
        model: a plain Transformer, on the meta device say.   tokens: of a micro-batch of a rank, or more.
        micro_batches: of a step.
    """
    dtype = compute_dtype(sharding, mesh.device)
    wide, narrow = 4, dtype.itemsize
    sizes: dict[str, int] = {}
    parts, places, staying, largest = 0, [0, 0], 0, 0
    rotating = 0
    for spec in unit_specs(model, model, dtype):
        count = getattr(mesh, spec.over).size
        layout = Layout([(name, tuple(p.shape)) for name, p in spec.parameters.items()], count)
        sizes[spec.name] = layout.size
        parts += layout.part * (4 * wide + (narrow if narrow != wide else 0))
        if mesh.shard.size == 1:
            continue
        largest = max(largest, layout.size)
        if spec.resident:
            staying += layout.size * 2 * narrow
        else:
            places[rotating % 2] = max(places[rotating % 2], layout.size)
            rotating += 1
    whole = sharding.accumulate == "whole"
    kept = sum(sizes.values()) * wide if whole else largest * wide
    kept += largest * narrow
    spare = largest // mesh.shard.size * wide if micro_batches > 1 and not whole else 0
    divided = mesh.shard.size > 1
    elements = parts // (4 * wide + (narrow if narrow != wide else 0))
    kept_blocks, working = activation_bytes(model, tokens, sharding, dtype)
    return Estimate(
        parts=parts,
        kept=kept_blocks,
        gradients=elements * wide if divided else 0,
        micro_batches=micro_batches,
        places=(sum(places) * narrow + kept + staying + spare) if divided else 0,
        activations=kept_blocks + working,
        gathered=_gathered(sizes, model, micro_batches) * narrow if divided else 0,
        reduced=sum(sizes.values()) * wide * (1 if whole else micro_batches) if divided else 0,
        replicated=elements * wide if mesh.replicate.size > 1 else 0,
    )


def _gathered(sizes: dict[str, int], model: nn.Module, k: int) -> int:
    """Elements that a step of k micro-batches gathers.

    A forward takes every unit, a backward every one but the embedding, in reverse. Two places keep the last two units
    from one pass to the next, so that those are not gathered again.
    """
    layers, tied = len(model.blocks), model.head is None
    dense, experts = sizes["blocks.0"], sizes.get("blocks.0.experts")
    if experts is None and tied:
        return sizes["embedding"] + (layers + (2 * k - 1) * (layers - 2)) * dense
    if experts is None:
        return k * (sizes["embedding"] + sizes["head"]) + (2 * k * (layers - 1) + 1) * dense
    if tied:
        return sizes["embedding"] + (layers + (2 * k - 1) * (layers - 1)) * (dense + experts)
    blocks = (2 * k * layers - (k - 1)) * dense + k * (2 * layers - 1) * experts
    return k * (sizes["embedding"] + sizes["head"]) + blocks


def activation_bytes(model: nn.Module, tokens: int, sharding: Sharding, dtype: torch.dtype) -> tuple[int, int]:
    """Bound of what forward and backward of a micro-batch hold besides parameters and their gradients' buffers: what is
    kept of all blocks, and what is at work beside it."""
    c, size = model.config, dtype.itemsize
    inner, kv, active = c.heads * c.head_width, c.kv_heads * c.head_width, max(1, c.experts_per_token * bool(c.experts))
    # Stream and its norm, twice; q and k turned, the product that v is a view of, attention's output; gate, up, inner.
    cheap = 2 * c.width + c.ffn_width * (0 if c.experts else 1)
    block = 4 * c.width + inner + kv + (inner + 2 * kv) + inner + 3 * c.ffn_width * active
    numbers = 4 * (c.heads + 2) + (4 * (c.experts + 4 * active) if c.experts else 0)
    saved = {"none": block, "selective": block - cheap, "full": c.width}[sharding.recompute]
    kept = c.layers * tokens * (saved * size + (0 if sharding.recompute == "full" else numbers))
    again = tokens * (block * size + numbers) if sharding.recompute != "none" else 0
    # The slopes of a feed-forward block and of the stream.
    working = tokens * (3 * c.ffn_width * active + 4 * c.width) * size
    return kept, again + working

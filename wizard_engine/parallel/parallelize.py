"""From a model written for one device to one that a mesh of ranks computes: the order of the transformations."""

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .fsdp import Sharded
from .mesh import Mesh
from .recompute import ActivationOffload, recompute_block
from .units import Unit, UnitSpec, materialised


@dataclass(frozen=True)
class Sharding:
    """What each rank keeps of a model, in which precision, and what it computes again or keeps in host memory."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in and gathers; master weights, gradients and moments are fp32. auto: bf16 on GPUs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward: none, cheap ones, or all inside each block."""
    accumulate: Literal["sharded", "whole"] = "sharded"
    """Gradients between micro-batches: reduced each time, or whole on every rank and reduced once (4 bytes a parameter
    more)."""
    offload_activations: bool = False
    """Keep what the blocks save for the backward in host memory."""
    offload_optimizer: bool = False
    """Keep master weights, gradients and moments in host memory, and update them there."""


def compute_dtype(sharding: Sharding, device: torch.device) -> torch.dtype:
    """The dtype that `sharding.dtype` names on a device."""
    if sharding.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, sharding.dtype)


def parallelize(model: nn.Module, mesh: Mesh, sharding: Sharding | None = None) -> nn.Module:
    """The model with its parameters divided over the mesh, in place; `sharded(model)` is what divides them.

    A model with numbers gives each rank its part of them, and they must be the same on every rank. One on the meta
    device waits for `Sharded.put` and `publish`. Parameters in float64 compute in float64.

    Args:
        model: Transformer or ScoringModel: `blocks`, `embedding`, `norm`, `head`, maybe as `body` of a larger module.
    Raises:
        ValueError: tensor or expert parallelism, which the model does not have yet; or a model that is divided already.
    """
    sharding = sharding or Sharding()
    for name, axis in (("tp", mesh.tp), ("ep", mesh.ep)):
        if axis.size > 1:
            raise ValueError(f"mesh.{name}: expected 1, got {axis.size}; what this model can be divided by is dp_shard")
    if getattr(model, "_sharded", None) is not None:
        raise ValueError("model: expected one that is not divided yet, got one that is; divide it once")
    body = getattr(model, "body", model)
    materialised(model, mesh.device)
    dtype = compute_dtype(sharding, mesh.device)
    if next(model.parameters()).dtype == torch.float64:
        dtype = torch.float64
    blocks = getattr(body, "blocks", ())
    if mesh.shard.size > 1 and not blocks:
        raise ValueError(f"model: expected one with blocks to divide over {mesh.shard.size} ranks, got {type(model)}")
    for block in blocks:
        recompute_block(block, sharding.recompute)
    specs = unit_specs(model, body, dtype) if blocks else [UnitSpec("all", dict(model.named_parameters()), dtype)]
    engine = Sharded(specs, mesh, whole=sharding.accumulate == "whole", host=sharding.offload_optimizer)
    model._sharded = engine
    if engine.is_divided:
        _hook(engine, body, recomputes=sharding.recompute == "full")
    if sharding.offload_activations:
        offload = ActivationOffload(engine.device, _weight_test(engine))
        for block in blocks:
            offload.wrap(block)
        model._offload = offload
    return model


def unit_specs(model: nn.Module, body: nn.Module, dtype: torch.dtype) -> list[UnitSpec]:
    """Units in the order of the forward pass."""
    names = {id(p): name for name, p in model.named_parameters()}

    def of(*modules: nn.Module, without: nn.Module | None = None) -> dict[str, nn.Parameter]:
        left_out = {id(p) for p in without.parameters()} if without is not None else set()
        return {names[id(p)]: p for module in modules for p in module.parameters() if id(p) not in left_out}

    units = []
    if body.head is None:
        units.append(UnitSpec("embedding", of(body.embedding, body.norm), dtype, resident=True))
    else:
        units.append(UnitSpec("embedding", of(body.embedding), dtype, needs_weights=False))
    for number, block in enumerate(body.blocks):
        experts = getattr(block.feed_forward, "experts", None)
        units.append(UnitSpec(f"blocks.{number}", of(block, without=experts), dtype))
        if experts is not None:
            units.append(UnitSpec(f"blocks.{number}.experts", of(experts), dtype, expert=True))
    if body.head is not None:
        units.append(UnitSpec("head", of(body.norm, body.head), dtype))
    known = {name for unit in units for name in unit.parameters}
    rest = {name: p for name, p in model.named_parameters() if name not in known}
    if rest:
        # Scores compute in fp32.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        units.append(UnitSpec("scores", rest, wide, resident=True))
    return units


def _hook(engine: Sharded, body: nn.Module, *, recomputes: bool) -> None:
    """Tell the engine when each unit's forward and backward come."""
    own = weakref.ref(engine)
    by_name = {unit.spec.name: unit for unit in engine.units}

    def before(unit: Unit | None):
        def hook(module: nn.Module, args: Any) -> None:
            found = own()
            if found is None:
                return
            if unit is None:
                found.begin()
            else:
                found.enter(unit)

        return hook

    def watch(tensor: Tensor, unit: Unit, also: Unit | None = None) -> None:
        if torch.is_grad_enabled() and tensor.requires_grad:
            tensor.register_hook(lambda _: own().before_backward(unit, also))

    def after(unit: Unit, also: Unit | None = None):
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            watch(output, unit, also)

        return hook

    def before_experts(unit: Unit, router: Unit):
        def hook(module: nn.Module, args: Any) -> None:
            found = own()
            if found is None:
                return
            found.enter(unit)
            # Their gradient is the last thing that the experts give back, and the router's backward comes next.
            watch(args[1].gates, router)

        return hook

    body.register_forward_pre_hook(before(None))
    first = by_name.get("embedding")
    if first is not None:
        body.embedding.register_forward_pre_hook(before(first))
        body.embedding.register_forward_hook(after(first))
        engine.fires[first.index] = None
    for number, block in enumerate(body.blocks):
        dense, experts = by_name[f"blocks.{number}"], by_name.get(f"blocks.{number}.experts")
        block.register_forward_pre_hook(before(dense))
        if experts is None:
            block.register_forward_hook(after(dense))
            engine.fires[dense.index] = None
        else:
            block.feed_forward.experts.register_forward_pre_hook(before_experts(experts, dense))
            also = dense if recomputes else None
            block.register_forward_hook(after(experts, also))
            engine.fires[experts.index] = also
            engine.fires[dense.index] = None
    last = by_name.get("head")
    if last is not None:
        body.norm.register_forward_pre_hook(before(last))


def _weight_test(engine: Sharded):
    """Whether a tensor's memory holds gathered or resident parameters."""
    buffers = [unit.place.buffer for unit in (*engine.units, *engine.resident)]
    places = {buffer.untyped_storage().data_ptr() for buffer in buffers if buffer is not None}
    places |= {flat.weights.untyped_storage().data_ptr() for flat in engine.flats}
    return lambda tensor: tensor.untyped_storage().data_ptr() in places

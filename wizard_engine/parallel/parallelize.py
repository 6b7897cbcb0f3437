"""From a model written for one device to one that a mesh of ranks computes: the order of the transformations."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wizard_engine.runtime.stage import INCIDENTAL

from .context import Spread
from .fsdp import Sharded, sharded
from .fsdp_units import Unit, UnitSpec, materialised
from .mesh import Mesh, divisors
from .recompute import ActivationOffload, recompute_block
from .shard_spec import Division


@dataclass(frozen=True)
class Sharding:
    """What each rank keeps of a model, in which precision, and what it computes again or keeps in host memory."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in and gathers; master weights, gradients and moments are fp32. auto: bf16 on GPUs."""
    recompute: Literal["none", "selective", "full"] = field(default="none", metadata=INCIDENTAL)
    """Activations computed again in the backward: none, cheap ones, or all inside each block."""
    accumulate: Literal["sharded", "whole"] = field(default="sharded", metadata=INCIDENTAL)
    """Gradients between micro-batches: reduced each time, or whole on every rank and reduced once (4 bytes a parameter
    more)."""
    offload_activations: bool = field(default=False, metadata=INCIDENTAL)
    """Keep what the blocks save for the backward in host memory."""
    offload_optimizer: bool = field(default=False, metadata=INCIDENTAL)
    """Keep master weights, gradients and moments in host memory, and update them there."""


def compute_dtype(sharding: Sharding, device: torch.device) -> torch.dtype:
    """The dtype that `sharding.dtype` names on a device."""
    if sharding.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, sharding.dtype)


def parallelize(model: nn.Module, mesh: Mesh, sharding: Sharding | None = None) -> nn.Module:
    """The model with its parameters divided over the mesh, in place; `sharded(model)` is what divides them.

    Matrices are divided over tp and experts over ep first, then what each rank has of them over the ranks that have
    the same. A model with numbers gives each rank its part of them, and they must be the same on every rank. One on the
    meta device waits for `Sharded.put` and `publish`. Parameters in float64 compute in float64.

    Args:
        model: Transformer or ScoringModel: `blocks`, `embedding`, `norm`, `head`, maybe as `body` of a larger module.
    Raises:
        ValueError: heads, words, widths or experts that the mesh does not divide evenly, or a model that is divided
            already.
    """
    sharding = sharding or Sharding()
    if getattr(model, "_sharded", None) is not None:
        raise ValueError("model: expected one that is not divided yet, got one that is; divide it once")
    body = getattr(model, "body", model)
    blocks = getattr(body, "blocks", ())
    if mesh.copy.size > 1 and not blocks:
        raise ValueError(f"model: expected one with blocks to divide over {mesh.copy.size} ranks, got {type(model)}")
    divisions = divide(model, body, mesh) if blocks else {}
    materialised(model, mesh.device)
    dtype = compute_dtype(sharding, mesh.device)
    if next(model.parameters()).dtype == torch.float64:
        dtype = torch.float64
    spread = None
    if mesh.row.size > 1 or mesh.ep.size > 1:
        spread = Spread.over(mesh, body.config.vocab_size, keeps_tokens=sharding.recompute == "none")
        for module in body.modules():
            if hasattr(module, "spread"):
                module.spread = spread
    for block in blocks:
        recompute_block(block, sharding.recompute)
    if blocks:
        specs = unit_specs(model, body, dtype, apart=mesh.tp.size > 1)
    else:
        specs = [UnitSpec("all", dict(model.named_parameters()), dtype)]
    engine = Sharded(
        specs, mesh, whole=sharding.accumulate == "whole", host=sharding.offload_optimizer, divisions=divisions,
        spread=spread, dummy=_dummy_pass(model),
    )  # fmt: skip
    model._sharded = engine
    if engine.is_divided:
        _hook(engine, body, recomputes=sharding.recompute == "full")
    if sharding.offload_activations:
        offload = ActivationOffload(engine.device, _weight_test(engine))
        for block in blocks:
            offload.wrap(block)
        model._offload = offload
    return model


def divisions_of(model: nn.Module, body: nn.Module, mesh: Mesh) -> dict[str, Division]:
    """Parameter -> how tp and ep divide it, of those that they divide.

    Raises:
        ValueError: what the mesh does not divide evenly; names the choices that it would.
    """
    config, tp, ep = body.config, mesh.tp, mesh.ep
    inner, kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Division] = {}

    def divide(parameter: nn.Parameter, axis: Any, *blocks: int) -> None:
        found[names[id(parameter)]] = Division(tuple(parameter.shape), blocks, axis)

    if ep.size > 1 and config.experts:
        _check_divides("ep", ep.size, experts=config.experts)
        for block in body.blocks:
            experts = block.feed_forward.experts
            for weight in (experts.gate_up, experts.down):
                divide(weight, ep, weight.shape[0] * weight.shape[1])
    if tp.size > 1:
        _check_divides("tp", tp.size, heads=config.heads, kv_heads=config.kv_heads, vocab_size=config.vocab_size)
        if not config.experts:
            _check_divides("tp", tp.size, ffn_width=config.ffn_width)
        divide(body.embedding.weight, tp, config.vocab_size)
        if body.head is not None:
            divide(body.head.weight, tp, config.vocab_size)
        for block in body.blocks:
            divide(block.attention.qkv.weight, tp, inner, kv_width, kv_width)
            divide(block.attention.out.weight, tp)
            if not config.experts:
                divide(block.feed_forward.gate_up.weight, tp, config.ffn_width, config.ffn_width)
                divide(block.feed_forward.down.weight, tp)
    return found


def _check_divides(name: str, size: int, **numbers: int) -> None:
    for what, number in numbers.items():
        if number % size:
            raise ValueError(
                f"mesh.{name} must divide {what}: {name}={size}, {what}={number}; choose from {divisors(number)}"
            )


def divide(model: nn.Module, body: nn.Module, mesh: Mesh) -> dict[str, Division]:
    """Leave this rank's rows and columns of the parameters that tp and ep divide, in place; how they are divided."""
    found = divisions_of(model, body, mesh)
    for name, division in found.items():
        owner, _, leaf = name.rpartition(".")
        old = model.get_parameter(name)
        cut = division.own
        own = old.new_empty(cut.local_shape) if old.is_meta else cut.of(old.detach())
        setattr(model.get_submodule(owner), leaf, nn.Parameter(own, requires_grad=old.requires_grad))
    return found


def _dummy_pass(model: nn.Module) -> Callable[[bool], None]:
    """A forward of the model over a row of one token, and a backward of nothing: the collectives of a real pass."""
    own = weakref.ref(model)

    def run(backward: bool) -> None:
        found = own()
        device = sharded(found).device
        token, marks = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([0, 1], dtype=torch.int32)
        with torch.set_grad_enabled(backward):
            out = found(token, token, marks.to(device), 1)
        if out.requires_grad:
            out.backward(torch.zeros_like(out))

    return run


def unit_specs(model: nn.Module, body: nn.Module, dtype: torch.dtype, *, apart: bool = False) -> list[UnitSpec]:
    """Units in the order of the forward pass.

    Args:
        apart: norms and routers in a unit of their own, for every rank has tokens of its own for them.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    of_tokens = (
        {id(p) for m in body.modules() for p in m.parameters(recurse=False) if _is_of_tokens(m)} if apart else set()
    )

    def of(*modules: nn.Module, without: nn.Module | None = None) -> dict[str, nn.Parameter]:
        left_out = {id(p) for p in without.parameters()} if without is not None else set()
        return {names[id(p)]: p for module in modules for p in module.parameters() if id(p) not in left_out | of_tokens}

    units = []
    if body.head is None:
        units.append(UnitSpec("embedding", of(body.embedding, body.norm), dtype, resident=True))
    else:
        units.append(UnitSpec("embedding", of(body.embedding), dtype, needs_weights=False))
    for number, block in enumerate(body.blocks):
        experts = getattr(block.feed_forward, "experts", None)
        units.append(UnitSpec(f"blocks.{number}", of(block, without=experts), dtype))
        if experts is not None:
            units.append(UnitSpec(f"blocks.{number}.experts", of(experts), dtype, over="efsdp"))
    if body.head is not None:
        units.append(UnitSpec("head", of(body.norm, body.head), dtype))
    if apart:
        parameters = {names[key]: model.get_parameter(names[key]) for key in names if key in of_tokens}
        units.append(UnitSpec("tokens", parameters, dtype, over="copy", resident=True))
    known = {name for unit in units for name in unit.parameters}
    rest = {name: p for name, p in model.named_parameters() if name not in known}
    if rest:
        # Scores compute in fp32.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        units.append(UnitSpec("scores", rest, wide, over="copy", resident=True))
    return units


def _is_of_tokens(module: nn.Module) -> bool:
    """Whether a module works on the tokens of the residual stream one by one: norms (one vector) and routers."""
    return [p.dim() for p in module.parameters(recurse=False)] == [1] or getattr(module, "is_router", False)


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
        def hook(module: nn.Module, args: Any, output: Tensor | tuple[Tensor, Tensor]) -> None:
            # Of a block: what it adds to the stream, whose gradient comes with that of the stream, from one node.
            watch(output if isinstance(output, Tensor) else output[1], unit, also)

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
    for number, block in enumerate(body.blocks):
        dense, experts = by_name[f"blocks.{number}"], by_name.get(f"blocks.{number}.experts")
        block.register_forward_pre_hook(before(dense))
        if experts is None:
            block.register_forward_hook(after(dense))
        else:
            block.feed_forward.experts.register_forward_pre_hook(before_experts(experts, dense))
            also = dense if recomputes else None
            block.register_forward_hook(after(experts, also))
    last = by_name.get("head")
    if last is not None:
        body.norm.register_forward_pre_hook(before(last))


def _weight_test(engine: Sharded):
    """Whether a tensor's memory holds gathered or resident parameters."""
    buffers = [unit.place.buffer for unit in (*engine.units, *engine.resident)]
    places = {buffer.untyped_storage().data_ptr() for buffer in buffers if buffer is not None}
    places |= {flat.weights.untyped_storage().data_ptr() for flat in engine.flats}
    return lambda tensor: tensor.untyped_storage().data_ptr() in places

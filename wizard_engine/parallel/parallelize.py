"""Turns a model written for one device into one that a mesh of ranks computes: the transformations, in order."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wizard_engine.runtime.stage import INCIDENTAL

from .context import ParallelContext
from .fsdp import Sharded, sharded
from .fsdp_units import Unit, UnitSpec, materialised
from .mesh import Mesh, divisors
from .recompute import ActivationOffload, recompute_block
from .shard_spec import Partition


@dataclass(frozen=True)
class Sharding:
    """Precision, activation recomputation, gradient accumulation and offload of a sharded model."""

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
    """Shard a model's parameters over a mesh, in place; returns the model, and `sharded(model)` is its engine.

    Matrices are sharded over tp and experts over ep first, then the result over the ranks that have the same one. A
    model with weights must have the same ones on every rank. A model on the meta device gets its weights by
    `Sharded.load` and `publish`. Parameters in float64 compute in float64.

    Args:
        model: Transformer or ScoringModel: `blocks`, `embedding`, `norm`, `head`, maybe as `body` of a larger module.
    Raises:
        ValueError: the mesh does not divide heads, vocabulary, widths or experts evenly, or the model is already
            sharded.
    """
    sharding = sharding or Sharding()
    if getattr(model, "_sharded", None) is not None:
        raise ValueError("model: expected one that is not divided yet, got one that is; divide it once")
    body = getattr(model, "body", model)
    blocks = getattr(body, "blocks", ())
    if mesh.copy.size > 1 and not blocks:
        raise ValueError(f"model: expected one with blocks to divide over {mesh.copy.size} ranks, got {type(model)}")
    partitions = shard_parameters(model, body, mesh) if blocks else {}
    materialised(model, mesh.device)
    dtype = compute_dtype(sharding, mesh.device)
    if next(model.parameters()).dtype == torch.float64:
        dtype = torch.float64
    parallel = None
    if mesh.row.size > 1 or mesh.ep.size > 1:
        parallel = ParallelContext.from_mesh(
            mesh, body.config.vocab_size, regather_in_backward=sharding.recompute == "none"
        )
        for module in body.modules():
            if hasattr(module, "parallel"):
                module.parallel = parallel
    for block in blocks:
        recompute_block(block, sharding.recompute)
    if blocks:
        specs = unit_specs(model, body, dtype, apart=mesh.tp.size > 1)
    else:
        specs = [UnitSpec("all", dict(model.named_parameters()), dtype)]
    engine = Sharded(
        specs,
        mesh,
        whole=sharding.accumulate == "whole",
        host=sharding.offload_optimizer,
        partitions=partitions,
        parallel=parallel,
        dummy=_dummy_pass(model),
    )
    model._sharded = engine
    if engine.is_sharded:
        _hook(engine, body, recomputes=sharding.recompute == "full")
    if sharding.offload_activations:
        offload = ActivationOffload(engine.device, _weight_test(engine))
        for block in blocks:
            offload.wrap(block)
        model._offload = offload
    return model


def partitions_of(model: nn.Module, body: nn.Module, mesh: Mesh) -> dict[str, Partition]:
    """Parameter -> its partition, of the parameters that tp or ep shards.

    Raises:
        ValueError: the mesh does not divide a size evenly; names the sizes that would.
    """
    config, tp, ep = body.config, mesh.tp, mesh.ep
    inner, kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
    names = {id(p): name for name, p in model.named_parameters()}
    partitions: dict[str, Partition] = {}

    def shard(parameter: nn.Parameter, axis: Any, *blocks: int) -> None:
        partitions[names[id(parameter)]] = Partition(tuple(parameter.shape), blocks, axis)

    if ep.size > 1 and config.experts:
        _check_divides("ep", ep.size, experts=config.experts)
        for block in body.blocks:
            experts = block.feed_forward.experts
            for weight in (experts.gate_up, experts.down):
                shard(weight, ep, weight.shape[0] * weight.shape[1])
    if tp.size > 1:
        _check_divides("tp", tp.size, heads=config.heads, kv_heads=config.kv_heads, vocab_size=config.vocab_size)
        if not config.experts:
            _check_divides("tp", tp.size, ffn_width=config.ffn_width)
        shard(body.embedding.weight, tp, config.vocab_size)
        if body.head is not None:
            shard(body.head.weight, tp, config.vocab_size)
        for block in body.blocks:
            shard(block.attention.qkv.weight, tp, inner, kv_width, kv_width)
            shard(block.attention.out.weight, tp)
            if not config.experts:
                shard(block.feed_forward.gate_up.weight, tp, config.ffn_width, config.ffn_width)
                shard(block.feed_forward.down.weight, tp)
    return partitions


def _check_divides(name: str, size: int, **numbers: int) -> None:
    for what, number in numbers.items():
        if number % size:
            raise ValueError(
                f"mesh.{name} must divide {what}: {name}={size}, {what}={number}; choose from {divisors(number)}"
            )


def shard_parameters(model: nn.Module, body: nn.Module, mesh: Mesh) -> dict[str, Partition]:
    """Replace the parameters that tp and ep shard by this rank's rows and columns, in place; returns the partitions."""
    partitions = partitions_of(model, body, mesh)
    for name, partition in partitions.items():
        owner, _, leaf = name.rpartition(".")
        old = model.get_parameter(name)
        spec = partition.local
        values = old.new_empty(spec.local_shape) if old.is_meta else spec.of(old.detach())
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=old.requires_grad))
    return partitions


def _dummy_pass(model: nn.Module) -> Callable[[bool], None]:
    """A forward over one token, and a backward of zeros: all collectives of a real pass, without an effect."""
    module_ref = weakref.ref(model)

    def run(backward: bool) -> None:
        module = module_ref()
        device = sharded(module).device
        token, marks = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([0, 1], dtype=torch.int32)
        with torch.set_grad_enabled(backward):
            out = module(token, token, marks.to(device), 1)
        if out.requires_grad:
            out.backward(torch.zeros_like(out))

    return run


def unit_specs(model: nn.Module, body: nn.Module, dtype: torch.dtype, *, apart: bool = False) -> list[UnitSpec]:
    """Units in the order of the forward pass.

    Args:
        apart: put norms and routers in a separate unit: with tp, every rank applies them to different tokens, so their
            gradients are summed over more ranks than those of the matrices.
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
        # Scoring heads compute in fp32.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        units.append(UnitSpec("scores", rest, wide, over="copy", resident=True))
    return units


def _is_of_tokens(module: nn.Module) -> bool:
    """Whether a module works on single tokens of the residual stream: norms (one vector) and routers."""
    return [p.dim() for p in module.parameters(recurse=False)] == [1] or getattr(module, "is_router", False)


def _hook(engine: Sharded, body: nn.Module, *, recomputes: bool) -> None:
    """Register the hooks that tell the engine when each unit's forward and backward start."""
    engine_ref = weakref.ref(engine)
    by_name = {unit.spec.name: unit for unit in engine.units}

    def before(unit: Unit | None):
        def hook(module: nn.Module, args: Any) -> None:
            state = engine_ref()
            if state is None:
                return
            if unit is None:
                state.begin()
            else:
                state.enter(unit)

        return hook

    def watch(tensor: Tensor, unit: Unit, also: Unit | None = None) -> None:
        if torch.is_grad_enabled() and tensor.requires_grad:
            tensor.register_hook(lambda _: engine_ref().before_backward(unit, also))

    def after(unit: Unit, also: Unit | None = None):
        def hook(module: nn.Module, args: Any, output: Tensor | tuple[Tensor, Tensor]) -> None:
            # A block returns the stream and the delta. The next block adds both in one node, so their gradients arrive
            # together.
            watch(output if isinstance(output, Tensor) else output[1], unit, also)

        return hook

    def before_experts(unit: Unit, router: Unit):
        def hook(module: nn.Module, args: Any) -> None:
            state = engine_ref()
            if state is None:
                return
            state.enter(unit)
            # The gradient of the gates is the last result of the experts' backward; the router's backward follows, and
            # needs the dense unit.
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
    """A function that tells whether a tensor's memory holds gathered or resident parameters."""
    buffers = [unit.gather_buffer.data for unit in (*engine.units, *engine.resident)]
    storages = {buffer.untyped_storage().data_ptr() for buffer in buffers if buffer is not None}
    storages |= {flat.weights.untyped_storage().data_ptr() for flat in engine.flats}
    return lambda tensor: tensor.untyped_storage().data_ptr() in storages

"""The policy of reinforcement learning as a sampler: the trainer's weights in a generation engine.

Trainer and sampler use the same memory in turn."""

import math

import torch
from torch import Tensor, nn

from wizard_engine.generation.device_memory import LentTensors
from wizard_engine.generation.engine import Engine
from wizard_engine.model import ModelConfig, Transformer
from wizard_engine.parallel import MeshOptions, make_mesh, sharded
from wizard_engine.parallel.context import ParallelContext
from wizard_engine.parallel.fsdp_units import is_absent, materialised
from wizard_engine.parallel.mesh import Axis, Mesh
from wizard_engine.parallel.parallelize import shard_parameters
from wizard_engine.parallel.shard_spec import ShardSpec
from wizard_engine.runtime.process import Runtime

from .options import RolloutOptions
from .weight_sync import WeightSync, checksum, trainer_checksum


def sampled_at_once(options: RolloutOptions, mesh: Mesh | None) -> int:
    """Answers that a sampler runs concurrently: those of a rollout on its ranks, at most `options.batch_size`.

    Args:
        mesh: of the trainer; None: a single device.
    """
    data, row = (1, 1) if mesh is None else (mesh.data.size, mesh.row.size)
    # Ranks that share packed rows sample a part of their prompts each.
    prompts = math.ceil(options.prompts_per_step / (data * row))
    return min(options.batch_size, prompts * options.samples_per_prompt * options.tp)


class Sampler:
    """Samples from a policy that is being trained.

    `sync_weights` copies the trainer's current weights, `engine` samples from them, `release` frees the memory. The
    engine reads an unsharded policy in place. For a sharded one each rank, or each group of `tp` ranks, holds a copy of
    the weights between `sync_weights` and `release`.

    Args:
        policy: as `parallelize` returned it.   runtime: needed for a sharded policy.
        tp: ranks that share the sampler's matrices and experts.
        cache_tokens: capacity of the cache of this rank or group.   max_sequences: that run at once.
        allowed_ids: (V,) bool, as `Engine`.   longest: prompt with its answer, tokens; the context where unknown.
    Attributes:
        weights_checksum: of the weights that were synced last.
    Raises:
        ValueError: tp does not divide the ranks of a copy of the policy, its heads, vocabulary or experts.
    """

    def __init__(
        self,
        policy: Transformer,
        runtime: Runtime | None = None,
        *,
        cache_tokens: int,
        max_sequences: int = 128,
        tp: int = 1,
        allowed_ids: Tensor | None = None,
        longest: int | None = None,
    ) -> None:
        self.longest = longest or policy.config.max_positions
        self.policy, self.trainer = policy, sharded(policy)
        self.weights_checksum: int | None = None
        self.row, self.mesh = Axis(), Mesh(device=policy.embedding.weight.device)
        self.options = {
            "cache_tokens": cache_tokens,
            "max_sequences": max_sequences,
            "record_routes": True,
            "keeps_addresses": True,
            "allowed_ids": allowed_ids,
        }
        is_sharded = self.trainer is not None and self.trainer.is_sharded
        ranks = self.trainer.mesh.copy.size if is_sharded else 1
        if ranks % tp:
            raise ValueError(f"sampler tp must divide the {ranks} ranks of a copy of the policy, got {tp}")
        self.model, self.weight_sync = policy, None
        if is_sharded:
            self.row = self.trainer.mesh.row
            experts = tp if policy.config.experts else 1
            try:
                self.mesh = make_mesh(MeshOptions(dp_shard=1, tp=tp, ep=experts), runtime)
                self.model, specs = empty_sampler(policy.config, next(policy.parameters()).dtype, self.mesh)
            except ValueError as error:
                raise ValueError(f"sampler: {error}") from None
            local_parameters = [p for p in self.model.parameters() if is_absent(p) or not p.numel()]
            self.memory = LentTensors([(p.shape, p.dtype) for p in local_parameters], self.mesh.device, stays=True)
            self.local_parameters, self.placeholders = local_parameters, [p.data for p in local_parameters]
            self._restore()
            targets = {name: parameter.data for name, parameter in self.model.named_parameters()}
            self.weight_sync = WeightSync(self.trainer, targets, specs)
        self.engine = Engine(self.model, **self.options)

    def _restore(self) -> None:
        """Allocate memory for the sampler's copy of the weights."""
        if any(is_absent(parameter) for parameter in self.local_parameters):
            for parameter, values in zip(self.local_parameters, self.memory.restore()):
                parameter.data = values

    def sync_weights(self) -> None:
        """Copy the trainer's current weights and allocate the memory for sampling; every rank makes the call.

        Raises:
            ValueError: the checksums of sampler and trainer differ.
        """
        if self.weight_sync is not None:
            self._restore()
            self.weight_sync.targets = {name: parameter.data for name, parameter in self.model.named_parameters()}
            self.weight_sync.run()
        self.engine.restore()
        self.engine.forget()
        self.weights_checksum = self.trainer_checksum()
        received = (
            self.weights_checksum
            if self.weight_sync is None
            else self.weight_sync.sampler_checksum(self.mesh.tp, self.mesh.ep)
        )
        if received != self.weights_checksum:
            raise ValueError(
                f"[rank {self.mesh.rank}/{self.mesh.world_size}] weights of the sampler: expected checksum "
                f"{self.weights_checksum:x}, the trainer's, got {received:x}"
            )

    def trainer_checksum(self) -> int:
        """Checksum of the trainer's current weights; every rank makes the call."""
        if self.trainer is not None:
            return trainer_checksum(self.trainer)
        return checksum((n, ShardSpec.whole(p.shape), 0, p.detach()) for n, p in self.policy.named_parameters())

    @property
    def lent_bytes(self) -> int:
        """Memory of the cache, and of a copy of the weights, between `sync_weights` and `release`."""
        lent = [*self.engine.memory.like, *(self.memory.like if self.weight_sync is not None else ())]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in lent)

    def check(self, weights_checksum: int | None) -> None:
        """Raise ValueError unless this is the checksum of the trainer's current weights."""
        current = self.trainer_checksum()
        if weights_checksum != current:
            received = "none" if weights_checksum is None else f"{weights_checksum:x}"
            raise ValueError(
                f"rollout: expected one of the trainer's weights, checksum {current:x}, got {received}; sync the "
                "weights before sampling"
            )

    def release(self) -> None:
        """Free the memory of the cache and of the sampler's copy of the weights."""
        self.engine.release()
        if self.weight_sync is not None:
            self.weight_sync.targets = {}
            for parameter, placeholder in zip(self.local_parameters, self.placeholders):
                parameter.data = placeholder
            self.memory.release()


def empty_sampler(config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> tuple[Transformer, dict[str, ShardSpec]]:
    """A model sharded over the tp and ep axes of a mesh, with uninitialised weights, and this rank's shard specs."""
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    partitions = shard_parameters(model, model, mesh)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    materialised(model, mesh.device)
    if mesh.tp.size > 1 or mesh.ep.size > 1:
        parallel = ParallelContext.from_mesh(mesh, config.vocab_size, regather_in_backward=False)
        for module in model.modules():
            if hasattr(module, "parallel"):
                module.parallel = parallel
    specs = {
        name: partitions[name].local if name in partitions else ShardSpec.whole(shape) for name, shape in shapes.items()
    }
    return model.eval(), specs

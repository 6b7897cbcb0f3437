"""The policy of reinforcement learning as a sampler: its trainer's weights behind the engine, in memory that the two
take in turns."""

import torch
from torch import nn

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

from .weight_sync import HandOver, checksum, trainer_checksum


class Sampler:
    """Samples from a policy that is being trained.

    `take` hands the trainer's weights of now over, `engine` samples from them, `release` gives the memory back. A
    policy that no ranks divide is sampled from where it stands. Otherwise each rank, or each group of `tp` of them, has
    weights of its own, which exist between `take` and `release` alone.

    Args:
        policy: as `parallelize` left it.   runtime: needed where ranks divide the policy.
        tp: ranks that divide the sampler's matrices, and its experts.
        cache_tokens: of this rank's, or group's, cache.   max_sequences: that run at once.
    Attributes:
        stamp: checksum of the weights that were handed over last.
    Raises:
        ValueError: tp does not divide the ranks of a copy of the policy, its heads, words or experts.
    """

    def __init__(
        self,
        policy: Transformer,
        runtime: Runtime | None = None,
        *,
        cache_tokens: int,
        max_sequences: int = 128,
        tp: int = 1,
    ) -> None:
        self.policy, self.trainer = policy, sharded(policy)
        self.stamp: int | None = None
        self.row, self.mesh = Axis(), Mesh(device=policy.embedding.weight.device)
        self.options = {
            "cache_tokens": cache_tokens,
            "max_sequences": max_sequences,
            "record_routes": True,
            "keeps_addresses": True,
        }
        divided = self.trainer is not None and self.trainer.is_sharded
        ranks = self.trainer.mesh.copy.size if divided else 1
        if ranks % tp:
            raise ValueError(f"sampler tp must divide the {ranks} ranks of a copy of the policy, got {tp}")
        self.model, self.moves = policy, None
        if divided:
            self.row = self.trainer.mesh.row
            experts = tp if policy.config.experts else 1
            try:
                self.mesh = make_mesh(MeshOptions(dp_shard=1, tp=tp, ep=experts), runtime)
                self.model, cuts = empty_sampler(policy.config, next(policy.parameters()).dtype, self.mesh)
            except ValueError as error:
                raise ValueError(f"sampler: {error}") from None
            own = [p for p in self.model.parameters() if is_absent(p) or not p.numel()]
            self.memory = LentTensors([(p.shape, p.dtype) for p in own], self.mesh.device, stays=True)
            self.own, self.nothing = own, [p.data for p in own]
            self._restore()
            targets = {name: parameter.data for name, parameter in self.model.named_parameters()}
            self.moves = HandOver(self.trainer, targets, cuts)
        self.engine = Engine(self.model, **self.options)

    def _restore(self) -> None:
        """Have memory for weights of the sampler's own."""
        if any(is_absent(parameter) for parameter in self.own):
            for parameter, values in zip(self.own, self.memory.restore()):
                parameter.data = values

    def take(self) -> None:
        """Have the trainer's weights of now, and memory to sample with; every rank makes the call.

        Raises:
            ValueError: what arrived is not what the trainer has.
        """
        if self.moves is not None:
            self._restore()
            self.moves.targets = {name: parameter.data for name, parameter in self.model.named_parameters()}
            self.moves.run()
        self.engine.restore()
        self.engine.forget()
        self.stamp = self.expected()
        found = self.stamp if self.moves is None else self.moves.stamp_of_sampler(self.mesh.tp, self.mesh.ep)
        if found != self.stamp:
            raise ValueError(
                f"[rank {self.mesh.rank}/{self.mesh.world_size}] weights of the sampler: expected checksum "
                f"{self.stamp:x}, the trainer's, got {found:x}"
            )

    def expected(self) -> int:
        """Checksum of the trainer's weights of now; every rank makes the call."""
        if self.trainer is not None:
            return trainer_checksum(self.trainer)
        return checksum((n, ShardSpec.whole(p.shape), 0, p.detach()) for n, p in self.policy.named_parameters())

    def check(self, stamp: int | None) -> None:
        """ValueError unless the trainer still has the weights that something with this stamp was sampled from."""
        now = self.expected()
        if stamp != now:
            raise ValueError(
                f"rollout: expected one of the trainer's weights, checksum {now:x}, got "
                f"{'none' if stamp is None else f'{stamp:x}'}; hand the weights over before sampling"
            )

    def release(self) -> None:
        """Give the memory of the cache, and of weights of the sampler's own, back to the trainer."""
        self.engine.release()
        if self.moves is not None:
            self.moves.targets = {}
            for parameter, nothing in zip(self.own, self.nothing):
                parameter.data = nothing
            self.memory.release()


def empty_sampler(config: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> tuple[Transformer, dict[str, ShardSpec]]:
    """A model divided over the tp and ep of a mesh, without numbers, and what of each parameter this rank has."""
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

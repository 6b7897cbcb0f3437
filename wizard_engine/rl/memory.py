"""Memory of a rank in RLEIF by part, from shapes alone: an upper bound of what a run allocates.

    trained     policy and critic: weights, gradients, moments of AdamW, gathered units
    frozen      reference and reward models, each body once
    cache       keys and values of the sampler, and its copy of a sharded policy
    activations of a micro-batch of the policy or the critic; both run one after the other. On a CPU attention also
                keeps its probabilities, and the allocator blocks that are free
    logits      a chunk of them, and the gradients of head and embedding

Sampling, scoring and training take turns, so that the largest of the three counts. The interpreter and its libraries
come on top: about 0.4 GiB.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wizard_engine.model import ModelConfig, Transformer
from wizard_engine.parallel import Mesh, Sharding
from wizard_engine.planning.estimate import LOGITS_BYTES, estimate, frozen_bytes

from .options import RolloutOptions
from .sampler import Sampler

GIB = 2**30
# What the allocator of a CPU holds for each byte of activations, once they have come and gone in many sizes.
CPU_HEAP = 1.2
# Buffers of (sequences, V) in fp32 that sampling a token has at once: logits, probabilities, sorted ones.
SAMPLING_BUFFERS = 4


@dataclass(frozen=True)
class RunShape:
    """What a run has in memory at once.

    policy, critic: their configurations; critic None: there is none.   frozen: of each body that is not trained.
    tokens: of the largest micro-batch, prompts included.   micro_batches: of an update.   scored: tokens of the largest
    forward pass without gradients.   sequences: that are sampled at once.   sampler: bytes of its cache and weights.
    longest: sequence, tokens.
    """

    policy: ModelConfig
    critic: ModelConfig | None
    frozen: Sequence[ModelConfig]
    tokens: int
    micro_batches: int
    scored: int
    sequences: int
    sampler: int
    longest: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank: `states` stay, and the largest of `phases` comes on top."""

    states: dict[str, int]
    phases: dict[str, int]

    @property
    def total(self) -> int:
        """Bound of what is allocated at one time."""
        return sum(self.states.values()) + max(self.phases.values())

    def __str__(self) -> str:
        stay, turns = (", ".join(f"{k} {n / GIB:.1f}" for k, n in d.items()) for d in (self.states, self.phases))
        return f"memory: {stay}; in turn {turns}; at most about {self.total / GIB:.1f} GiB a rank"


def run_shape(
    options: RolloutOptions,
    mesh: Mesh,
    *,
    capacity: int,
    minibatches: int,
    longest: int,
    supervised: tuple[int, int],
    policy: ModelConfig,
    critic: ModelConfig | None,
    frozen: Sequence[ModelConfig],
    sampler: Sampler,
) -> RunShape:
    """Largest packs of a run.

    Args:
        capacity: tokens of a pack.   minibatches: updates of a pass over a rollout.   longest: prompt with its answer,
        tokens.   supervised: rows of an update's supervised loss over all ranks, and the longest, tokens.
    """
    prompts = math.ceil(options.prompts_per_step / mesh.data.size)
    answers = prompts * options.samples_per_prompt
    updated = math.ceil(answers / minibatches)
    # A prompt is in a pack once for all of its answers.
    prompt = max(longest - options.max_new_tokens, 1)
    of_rollout = min(prompts, updated) * prompt + updated * options.max_new_tokens
    of_rows = math.ceil(supervised[0] / mesh.data.size) * supervised[1]
    most = max(capacity, longest)
    return RunShape(
        policy=policy,
        critic=critic,
        frozen=frozen,
        tokens=min(most, max(of_rollout, of_rows)),
        micro_batches=1 if not of_rows and of_rollout <= capacity else 2,
        scored=min(most, answers * longest),
        sequences=sampler.engine.max_sequences,
        sampler=sampler.lent_bytes,
        longest=max(longest, supervised[1]),
    )


def memory_of(shape: RunShape, mesh: Mesh, sharding: Sharding) -> Memory:
    """Memory of a run by part."""
    with torch.device("meta"):
        models = {"policy": Transformer(shape.policy)}
        if shape.critic is not None:
            models["critic"] = Transformer(shape.critic)
        frozen = [Transformer(config) for config in shape.frozen]
    updates = {
        name: estimate(model, mesh, sharding, tokens=_divisible(shape.tokens, mesh), micro_batches=shape.micro_batches)
        for name, model in models.items()
    }
    states = {name: update.shards + update.buffers for name, update in updates.items()}
    states["frozen models"] = sum(frozen_bytes(model, mesh, sharding) for model in frozen)
    vocabulary, width = shape.policy.vocab_size // mesh.tp.size, shape.policy.width
    head = 4 * width * (vocabulary * (2 if shape.policy.tied else 1) + shape.tokens)
    kept = max(update.activations for update in updates.values())
    if mesh.device.type == "cpu":
        kept = int(CPU_HEAP * (kept + max(_cpu_bytes(model.config, shape) for model in models.values())))
    working = max(update.activations - update.kept for update in updates.values())
    logits = min(LOGITS_BYTES, 4 * shape.policy.vocab_size * shape.sequences * SAMPLING_BUFFERS)
    phases = {
        "sampling": shape.sampler + logits + working,
        "scoring": working * shape.scored // max(1, shape.tokens) + _logits_bytes(shape.scored, vocabulary),
        "training": kept + _logits_bytes(shape.tokens, vocabulary) + head,
    }
    return Memory(states, phases)


def _cpu_bytes(config: ModelConfig, shape: RunShape) -> int:
    """Activations that the CPU's plain PyTorch saves beside those of the closed form: probabilities of attention, keys
    and values repeated for every head, the product of the feed-forward block."""
    repeated = 2 * (config.heads - config.kv_heads) * config.head_width
    each = config.heads * shape.longest + repeated + (0 if config.experts else config.ffn_width)
    return 4 * config.layers * shape.tokens * each


def _logits_bytes(tokens: int, vocabulary: int) -> int:
    """Largest chunk of logits of a pack of so many tokens."""
    return min(LOGITS_BYTES, 4 * tokens * vocabulary)


def _divisible(tokens: int, mesh: Mesh) -> int:
    """The tokens, rounded up to what the ranks of a row divide."""
    return -(-tokens // mesh.row.size) * mesh.row.size

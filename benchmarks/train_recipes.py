"""The training step of each recipe on random tokens and random weights: the recipe's own loop, run and losses.

    sft        documents, every token supervised
    stage_dpo  pairs of two documents, the second half of each supervised; the log-probabilities under the reference,
               which a stage computes once, are given
    reward     the same pairs for the instruction model's ranking loss
    rleif      weights to the sampler, four answers to each prompt, both reward models, reference and critic over
               them, one update of policy and critic

What a step is worth is counted from its documents, each with its own attention (wizard_engine/planning/flops.py).
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recipes import reward, rleif, sft, stage_dpo
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample, encode_prompt
from wizard_engine.data.chat_format import VICUNA
from wizard_engine.data.records import Message
from wizard_engine.data.samples import Pair
from wizard_engine.model import ModelConfig, ScoringModel, Transformer
from wizard_engine.model.loading import shard_model
from wizard_engine.parallel import Mesh, Sharding, sharded
from wizard_engine.planning.flops import TRAINING_FACTOR, matrix_parameters, mean_keys
from wizard_engine.rl.options import RewardOptions, RolloutOptions
from wizard_engine.rl.rewards import InstructionReward, ProcessReward
from wizard_engine.rl.trajectories import Rollout
from wizard_engine.runtime.process import Runtime
from wizard_engine.training.online_run import OnlineRun
from wizard_engine.training.options import OnlineTraining, Training
from wizard_engine.training.run import Run

Span = tuple[int, int]
SAMPLES = 4
BOS, EOS, FIRST_WORD = 1, 2, 3


@dataclass(frozen=True)
class Shape:
    """What a step is made of.

    tokens: of a packed row.   document_tokens: of each document in it; of rleif, prompt and answer.
    packs: packed rows of each rank with rows of its own.   steps: in all.
    """

    config: ModelConfig
    tokens: int
    document_tokens: int
    packs: int
    steps: int
    seed: int

    @property
    def rows(self) -> int:
        """Documents of a packed row."""
        return self.tokens // self.document_tokens

    @property
    def new_tokens(self) -> int:
        """Longest answer of rleif."""
        return self.document_tokens // 2

    @property
    def prompts(self) -> int:
        """Of a rank's rollout, which with their answers fill its packed rows."""
        each = self.document_tokens - self.new_tokens + SAMPLES * self.new_tokens
        return max(1, self.packs * self.tokens // each)


@dataclass(frozen=True)
class Work:
    """Of one rank's share of a step: tokens that count, and the operations that they take."""

    tokens: int
    flops: float


@dataclass(frozen=True)
class Recipe:
    """A recipe's models by role, in the order in which a step first uses them, and its steps."""

    models: dict[str, nn.Module]
    steps: Iterator[Work]


@dataclass(frozen=True)
class Place:
    """Where a recipe runs: ranks, mesh, sharding, run directory."""

    runtime: Runtime
    mesh: Mesh
    sharding: Sharding
    out: Path


# Operations


def forward_flops(config: ModelConfig, spans: Iterable[Span], heads: int) -> float:
    """Operations of a forward pass, formula of flops.py, of parts of documents.

    Args:
        spans: (first, last): the tokens [first, last) of a document, which see those before them.
        heads: of these tokens, those whose successor is scored with the vocabulary.
    """
    spans = list(spans)
    tokens = sum(last - first for first, last in spans)
    keys = sum(_keys(last, config) - _keys(first, config) for first, last in spans)
    head = config.width * config.vocab_size
    body = 2 * (matrix_parameters(config) - head) * tokens
    return body + 2 * head * heads + 4 * config.layers * config.heads * config.head_width * keys


def _keys(length: int, config: ModelConfig) -> float:
    """Keys that all tokens of a document see together."""
    return length * mean_keys(length, config.window) if length else 0.0


def rollout_flops(config: ModelConfig, rollout: Rollout) -> float:
    """Operations of an online step, each prompt read once for all its answers: generation, the reference, the critic
    and both reward models forward, then policy and critic forward and backward."""
    prompts, whole, answers = _spans(rollout)
    sampled = sum(rollout.lengths)
    # The last token of an answer is scored by the reward model alone.
    fed = [(first, last - 1) for first, last in answers]
    read = [*prompts, *fed]
    policy, body = forward_flops(config, read, sampled), forward_flops(config, read, 0)
    process = forward_flops(config, [*prompts, *answers], whole)
    instruction = forward_flops(config, prompts, 0)
    return (2 + TRAINING_FACTOR) * policy + (1 + TRAINING_FACTOR) * body + process + instruction


def _spans(rollout: Rollout) -> tuple[list[Span], int, list[Span]]:
    """Each different prompt, tokens of them and of all answers, and each answer behind its prompt."""
    counts = rollout.prompt_tokens
    different = {sample.tokens[:count].tobytes(): count for sample, count in zip(rollout.samples, counts)}
    prompts = [(0, count) for count in different.values()]
    answers = [(count, len(sample.tokens)) for sample, count in zip(rollout.samples, counts)]
    return prompts, sum(b - a for a, b in [*prompts, *answers]), answers


# Random numbers


def fill_random(model: nn.Module, seed: int) -> None:
    """Fill a sharded model with normal weights of its `init_std`; the ranks of a replica draw different ones."""
    engine, config = sharded(model), model.config
    generator = torch.Generator(engine.device).manual_seed(997 * seed + engine.mesh.copy.index)
    host = torch.Generator().manual_seed(997 * seed + engine.mesh.copy.index)
    for name, _, values in engine.weight_shards():
        if len(engine.shapes[name]) == 1:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            values.normal_(std=config.init_std, generator=generator if values.device == engine.device else host)
    engine.publish()


def language(config: ModelConfig, place: Place, seed: int, *, frozen: bool = False) -> Transformer:
    """A random language model, sharded over the mesh."""
    with torch.device("meta"):
        model = Transformer(config)
    shard_model(model, place.mesh, place.sharding, frozen=frozen)
    fill_random(model, seed)
    return model


def scoring(
    config: ModelConfig, place: Place, seed: int, outputs: int, *, surprise: bool = False, frozen: bool = False
) -> ScoringModel:
    """A random scoring model, sharded over the mesh."""
    with torch.device("meta"):
        model = ScoringModel(config, outputs, surprise=surprise)
    shard_model(model, place.mesh, place.sharding, frozen=frozen)
    fill_random(model, seed)
    return model


def documents(shape: Shape, count: int, supervised: float = 1.0) -> list[Sample]:
    """Random documents that take `document_tokens` positions each, of which the last share is supervised."""
    rng = np.random.default_rng(shape.seed)
    length = shape.document_tokens + 1
    tokens = rng.integers(0, shape.config.vocab_size, (count, length), dtype=np.int32)
    weights = np.ones(length, dtype=np.float32)
    weights[: max(1, length - round(supervised * shape.document_tokens))] = 0.0
    return [Sample(row, weights) for row in tokens]


class WordTokenizer:
    """A tokenizer with the vocabulary `w3`, `w4`, ...; it maps any other word to one of these by hash."""

    prefixes_space = False
    bos_id, eos_id, eos_ids = BOS, EOS, (EOS,)
    chat_format = VICUNA

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.fingerprint = vocab_size, f"words-{vocab_size}"

    def encode(self, text: str) -> list[int]:
        """An id for each word between blanks."""
        return [self._id(token) for token in text.split()]

    def _id(self, token: str) -> int:
        number = int(token[1:]) if token[:1] == "w" and token[1:].isdecimal() else 0
        if FIRST_WORD <= number < self.vocab_size:
            return number
        return FIRST_WORD + zlib.crc32(token.encode()) % (self.vocab_size - FIRST_WORD)

    def decode(self, ids: Sequence[int]) -> str:
        """The words, a blank between two; special ids are skipped."""
        return " ".join(f"w{index}" for index in ids if index >= FIRST_WORD)

    def drawable(self, vocab_size: int) -> np.ndarray | None:
        """None: every id may be drawn."""

    def offsets(self, ids: Sequence[int]) -> list[Span]:
        """Character span of each id in `decode(ids)`."""
        widths = [len(f"w{index} ") if index >= FIRST_WORD else 0 for index in ids]
        ends = list(accumulate(widths, initial=0))
        return [(start, max(start, end - 1)) for start, end in pairwise(ends)]


# The recipes


def training(shape: Shape, mesh: Mesh) -> Training:
    """Options of a run of these steps."""
    return Training(
        pack_tokens=shape.tokens, packs_per_step=shape.packs * mesh.data.size, save_every=0, max_steps=shape.steps
    )


def make_sft(shape: Shape, place: Place) -> Recipe:
    """Supervised learning."""
    model = language(shape.config, place, shape.seed)
    options = training(shape, place.mesh)
    samples = documents(shape, shape.rows * options.packs_per_step * shape.steps)
    lengths = [shape.document_tokens] * len(samples)

    def steps() -> Iterator[Work]:
        run = Run(options, place.runtime, model, lengths, place.out, seed=shape.seed, name="sft", quiet=True)
        for packs in run.steps():
            batches = [collate([samples[i] for i in pack]) for pack in packs]
            sft.train_step(run, model, batches)
            sizes = [int(n) for batch in batches for n in batch.cu_seqlens.diff()]
            yield Work(sum(sizes), TRAINING_FACTOR * forward_flops(shape.config, ((0, n) for n in sizes), sum(sizes)))

    return Recipe({"policy": model}, steps())


def _pairs(shape: Shape, count: int) -> list[Pair]:
    sides = documents(shape, 2 * count, supervised=0.5)
    return [Pair(chosen, rejected) for chosen, rejected in zip(sides[::2], sides[1::2])]


def _pair_steps(
    shape: Shape, place: Place, model: nn.Module, name: str, step: Callable[[Run, list[Pair], list], None], heads: bool
) -> Iterator[Work]:
    """Steps over packs of pairs."""
    options = training(shape, place.mesh)
    pairs = _pairs(shape, shape.rows // 2 * options.packs_per_step * shape.steps)
    lengths = [pair.length for pair in pairs]
    run = Run(
        options,
        place.runtime,
        model,
        lengths,
        place.out,
        seed=shape.seed,
        name=name,
        quiet=True,
        documents=[pair.documents for pair in pairs],
    )
    for packs in run.steps():
        step(run, pairs, packs)
        sides = [side for pack in packs for i in pack for side in (pairs[i].chosen, pairs[i].rejected)]
        sizes = [len(side.tokens) - 1 for side in sides]
        scored = sum(sizes) if heads else 0
        yield Work(sum(sizes), TRAINING_FACTOR * forward_flops(shape.config, ((0, n) for n in sizes), scored))


def make_stage_dpo(shape: Shape, place: Place) -> Recipe:
    """Stage-DPO."""
    model = language(shape.config, place, shape.seed)
    cfg = stage_dpo.Config(data=(), out=place.out, training=training(shape, place.mesh))

    def step(run: Run, pairs: list[Pair], packs: list[np.ndarray]) -> None:
        under_reference = torch.full((len(pairs), 2), -float(shape.document_tokens))
        stage_dpo.train_step(cfg, run, model, pairs, packs, under_reference, under_reference)

    return Recipe({"policy": model}, _pair_steps(shape, place, model, "stage_dpo", step, heads=True))


def make_reward(shape: Shape, place: Place) -> Recipe:
    """The instruction reward model."""
    model = scoring(shape.config, place, shape.seed, 1)

    def step(run: Run, pairs: list[Pair], packs: list[np.ndarray]) -> None:
        reward.train_step(run, model, reward.Instruction(), pairs, packs)

    return Recipe({"reward": model}, _pair_steps(shape, place, model, "reward", step, heads=False))


def _prompts(shape: Shape, count: int) -> list[tuple[Message, ...]]:
    """Random prompts of `document_tokens - new_tokens` tokens, the chat format's own included.

    Raises:
        ValueError: the chat format's own tokens leave no room.
    """
    tokenizer, length = WordTokenizer(shape.config.vocab_size), shape.document_tokens - shape.new_tokens
    wrapper = len(encode_prompt(tokenizer, (Message("user", "w3"),))) - 1
    if length <= wrapper:
        raise ValueError(
            f"document_tokens: expected at least {2 * (wrapper + 1)} for rleif (the chat format takes {wrapper} tokens "
            f"of the prompt's half), got {shape.document_tokens}"
        )
    rng = np.random.default_rng(shape.seed)
    drawn = rng.integers(FIRST_WORD, shape.config.vocab_size, (count, length - wrapper))
    return [(Message("user", tokenizer.decode(row.tolist())),) for row in drawn]


def make_rleif(shape: Shape, place: Place) -> Recipe:
    """RLEIF: PPO on two reward models."""
    config, mesh, seed = shape.config, place.mesh, shape.seed
    prompts = _prompts(shape, shape.prompts * mesh.data.size * shape.steps)
    policy, reference = language(config, place, seed), language(config, place, seed, frozen=True)
    critic = scoring(config, place, seed + 1, 1)
    instruction = scoring(config, place, seed + 2, 1, frozen=True)
    process = scoring(config, place, seed + 3, 3, surprise=True, frozen=True)
    cfg = rleif.Config(
        data=(),
        out=place.out,
        model="",
        reward=RewardOptions(Path(), Path()),
        seed=seed,
        quiet=True,
        training=OnlineTraining(pack_tokens=shape.tokens, save_every=0),
        rollout=RolloutOptions(
            steps=shape.steps,
            prompts_per_step=shape.prompts * mesh.data.size,
            samples_per_prompt=SAMPLES,
            max_new_tokens=shape.new_tokens,
            batch_size=SAMPLES * shape.prompts,
        ),
    )

    def steps() -> Iterator[Work]:
        tokenizer = WordTokenizer(config.vocab_size)
        run = OnlineRun(cfg, place.runtime, policy, critic, num_prompts=len(prompts))
        setup = rleif.Setup(
            tokenizer,
            policy,
            reference,
            critic,
            InstructionReward(instruction, tokenizer),
            ProcessReward(process, tokenizer),
            rleif.sampler_of(cfg, tokenizer, policy, prompts, place.runtime),
            prompts,
            [],
        )
        for step, chosen in run.steps():
            rollout = rleif.train_step(cfg, run, setup, step, chosen)
            yield Work(sum(rollout.lengths), rollout_flops(config, rollout))

    models = {
        "policy": policy,
        "reference": reference,
        "critic": critic,
        "instruction": instruction,
        "process": process,
    }
    return Recipe(models, steps())


RECIPES: dict[str, Callable[[Shape, Place], Recipe]] = {
    "sft": make_sft,
    "stage_dpo": make_stage_dpo,
    "reward": make_reward,
    "rleif": make_rleif,
}
PAIRED = ("stage_dpo", "reward")


def phases(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of each phase of the steps that these log lines are of."""
    names = [name for name in lines[-1] if name.endswith("_seconds") and name != "wait_seconds"]
    return {name.removesuffix("_seconds"): sum(line[name] for line in lines) / len(lines) for name in names}

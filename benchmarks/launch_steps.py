"""The engine's own steps on a stand-in GPU: what the ledger of launches counts."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.standin import Event, Log
from recipes import sft
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample
from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.generation.offline import continued
from wizard_engine.model import ModelConfig, ScoringModel, Transformer
from wizard_engine.parallel import MeshOptions, Sharding, make_mesh, parallelize
from wizard_engine.planning.flops import TRAINING_FACTOR, flops_per_token
from wizard_engine.rl.options import RewardOptions, RolloutOptions
from wizard_engine.rl.rewards import AnswerReward, score_answer_tokens
from wizard_engine.rl.sampler import Sampler
from wizard_engine.rl.trajectories import Rollout, answer_logprobs, answer_values
from wizard_engine.runtime.process import Runtime
from wizard_engine.training.online_run import OnlineRun
from wizard_engine.training.options import OnlineTraining, Training
from wizard_engine.training.run import Run

DOCUMENT = 4096
# Tokens of a page, sequences and keys of the decode steps.
PAGE, KEYS = 64, 1024
# Prompt tokens of a step.
PREFILL = 8192
# Tokens of a prompt and an answer of an online step, answers to a prompt.
PROMPT, ANSWER, GROUP = 256, 256, 4
# Forward passes, and what is worth them, of an online step: sampling, reference, two rewards, values; training of two.
PASSES = 5 + 2 * TRAINING_FACTOR
# Steps before the one that counts: tables are read, buffers made and graphs captured in them.
WARM = 2


def documents_of(tokens: int) -> tuple[int, ...]:
    """Lengths of the documents of a packed row: DOCUMENT each, and what is left."""
    whole, rest = divmod(tokens, DOCUMENT)
    return (DOCUMENT,) * whole + ((rest,) if rest else ())


def random_sample(length: int, vocab_size: int, seed: int) -> Sample:
    """A sample of `length` positions, all of them supervised."""
    drawn = np.random.default_rng(seed).integers(0, vocab_size, length + 1).astype(np.int32)
    return Sample(drawn, np.concatenate([[0], np.ones(length)]).astype(np.float32))


def sharded_model(config: ModelConfig, runtime: Runtime, recompute: str) -> Transformer:
    """A model without numbers, as recipes have it on one device."""
    mesh = make_mesh(MeshOptions(dp_shard=1), runtime)
    with torch.device("meta"):
        model = Transformer(config)
    return parallelize(model, mesh, Sharding(dtype="bfloat16", recompute=recompute))


def train(log: Log, config: ModelConfig, device: torch.device, tokens: int, recompute: str) -> list[Event]:
    """Events of one supervised step over a packed row: `recipes/sft.py`'s loop, from the rows to the log line."""
    runtime = Runtime(0, 1, 0, device)
    model = sharded_model(config, runtime, recompute)
    lengths = documents_of(tokens)
    samples = [random_sample(n, config.vocab_size, seed) for seed, n in enumerate(lengths * (WARM + 1))]
    options = Training(pack_tokens=tokens, max_steps=WARM + 1, save_every=0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            options,
            runtime,
            model,
            [len(sample.tokens) - 1 for sample in samples],
            Path(folder),
            seed=0,
            name="sft",
            quiet=True,
        )
        counted: list[Event] = []
        for packs in run.steps():
            log.events.clear()
            sft.train_step(run, model, [collate([samples[i] for i in pack]) for pack in packs])
            counted = list(log.events)
            log.events.clear()
    return counted


def engine_of(config: ModelConfig, device: torch.device, batch: int, keys: int, steps: int) -> Engine:
    """An engine over a model without numbers, with room for a batch of sequences."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False)
    each = (-(-(keys + steps + 4) // PAGE) + 1) * PAGE
    return Engine(model, cache_tokens=batch * each, max_sequences=batch, page_size=PAGE, max_tokens=PREFILL)


def decode(log: Log, config: ModelConfig, device: torch.device, batch: int, keys: int = KEYS) -> list[Event]:
    """Events of one step in which `batch` sequences behind `keys` others get a token each."""
    # The first sequences decode while the last prompts are read: none may end before the step that counts.
    limit = -(-batch * keys // PREFILL) + 16
    config = replace(config, max_positions=max(config.max_positions, keys + limit + 1))
    engine = engine_of(config, device, batch, keys, limit)
    for i in range(batch):
        engine.add([(7 * i + j) % config.vocab_size for j in range(keys)], Sampling(limit))
    while len(engine.scheduler.waiting) or any(len(s.ids) == s.prompt_tokens for s in engine.scheduler.running):
        engine.step()
    for _ in range(WARM + 1):
        log.events.clear()
        engine.step()
    assert len(engine.scheduler.running) == batch, "a sequence ended before the step that counts"
    return list(log.events)


def rleif(
    log: Log, config: ModelConfig, device: torch.device, tokens: int, recompute: str
) -> tuple[list[Event], float]:
    """Events of one online step of PPO, and the model's operations in it: `recipes/rleif.py`'s own functions.

    PROMPT tokens a prompt, ANSWER an answer, GROUP answers a prompt, `tokens` answer tokens in all. The two reward
    models have the policy's size, and read every answer once; its text is not decoded and encoded again.
    """
    from recipes import rleif as recipe

    answers = tokens // ANSWER
    if tokens % (ANSWER * GROUP):
        raise ValueError(f"--tokens: expected a multiple of {ANSWER * GROUP} answer tokens, got {tokens}")
    runtime = Runtime(0, 1, 0, device)
    with tempfile.TemporaryDirectory() as folder:
        cfg = recipe.Config(
            data=(),
            out=Path(folder),
            model="",
            reward=RewardOptions(Path(folder), Path(folder)),
            quiet=True,
            training=OnlineTraining(save_every=0),
            rollout=RolloutOptions(
                steps=WARM, prompts_per_step=answers // GROUP, samples_per_prompt=GROUP, max_new_tokens=ANSWER
            ),
        )
        policy, reference = (sharded_model(config, runtime, recompute) for _ in range(2))
        critic, process, instruction = (scoring_model(config, runtime, recompute) for _ in range(3))
        for frozen in (reference, process, instruction):
            frozen.requires_grad_(False)
        run = OnlineRun(cfg, runtime, policy, critic, num_prompts=answers // GROUP)
        rows = (PROMPT + ANSWER + 2 * PAGE) * answers
        sampler = Sampler(policy, runtime, max_sequences=min(256, answers), cache_tokens=rows)
        for number, _ in run.steps():
            log.events.clear()
            _online_step(recipe, cfg, run, sampler, config, policy, reference, critic, (process, instruction), number)
        counted = list(log.events)
        log.events.clear()
    read = tokens + answers // GROUP * PROMPT
    return counted, PASSES * read * flops_per_token(config, PROMPT + ANSWER)


def scoring_model(config: ModelConfig, runtime: Runtime, recompute: str) -> ScoringModel:
    """A critic or reward model without numbers."""
    mesh = make_mesh(MeshOptions(dp_shard=1), runtime)
    with torch.device("meta"):
        model = ScoringModel(config, 1)
    return parallelize(model, mesh, Sharding(dtype="bfloat16", recompute=recompute))


def _online_step(
    recipe: Any,
    cfg: Any,
    run: OnlineRun,
    sampler: Sampler,
    config: ModelConfig,
    policy: Transformer,
    reference: Transformer,
    critic: ScoringModel,
    rewarders: Sequence[ScoringModel],
    number: int,
) -> None:
    count, each = cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt
    answers = count * each
    generator = np.random.default_rng(number)
    prompts = [generator.integers(0, config.vocab_size, PROMPT).tolist() for _ in range(count)]
    sampler.sync_weights()
    samplings = [Sampling(ANSWER, 1.0, seed=number, row=row) for row in range(answers)]
    drawn = continued(sampler.engine, [prompts[i // each] for i in range(answers)], samplings)
    sampler.release()
    samples = [
        Sample(
            np.asarray([*prompts[i // each], *answer], dtype=np.int32),
            np.concatenate((np.zeros(PROMPT), np.ones(len(answer)))).astype(np.float32),
        )
        for i, answer in enumerate(drawn.tokens)
    ]
    lengths = [len(tokens) for tokens in drawn.tokens]
    behaviour = torch.tensor([x for row in drawn.logprobs for x in row], dtype=torch.float32)
    rollout = Rollout([()] * answers, samples, [""] * answers, [True] * answers, lengths, behaviour, load=(1, 1, 1))
    for model in rewarders:
        score_answer_tokens(model, samples, rollout.prompt_tokens, before=False)
    rewards = [AnswerReward(((0, 1),), (0.5,), 0.5, True)] * answers
    ref_logprobs = answer_logprobs(reference, rollout, temperature=1.0)
    values = answer_values(critic, rollout)
    targets, kl = recipe._targets(cfg, run, rollout, rewards, ref_logprobs, values, None)
    for minibatch in run.minibatches(0, 1):
        run.zero_grad()
        recipe._update(cfg, run, policy, critic, rollout, targets, minibatch, is_first=True)
    run.record(rollout, rewards, kl, values, targets)


def flattened(events: Sequence[Event]) -> Iterator[Event]:
    """Events one by one, those of graphs in their place."""
    for event in events:
        if event.kind == "graph":
            yield from flattened(event.replayed)
        else:
            yield event


def full_waits(events: Sequence[Event]) -> list[Event]:
    """Waits of the host for all that the device has been asked to do.

    A wait for an event is one where nothing was launched after the event; otherwise the device has work meanwhile.
    """
    waits: list[Event] = []
    since: dict[str, int] = {}
    launched = 0
    for event in events:
        launched += event.launches
        if event.kind == "mark":
            since[event.name] = launched
        elif event.kind == "sync" or (event.kind == "wait" and since.get(event.name) == launched):
            waits.append(event)
    return waits


def counts(events: Sequence[Event]) -> dict[str, Any]:
    """Launches, waits, bytes and operations of a step."""
    flat = list(flattened(events))
    return {
        "launches": sum(event.launches for event in flat),
        "host_syncs": len(full_waits(flat)),
        "bytes": sum(event.bytes for event in flat),
        "flops": sum(event.flops for event in flat),
    }

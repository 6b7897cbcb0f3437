"""Rollouts of reinforcement learning: sampled answers with everything that one PPO update needs, packed end to end."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.linear_logprob import linear_logprob
from wizard_engine.data.chat import Sample, encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.offline import Generation, continued
from wizard_engine.generation.scheduler import Sampling
from wizard_engine.model import Routes, ScoringModel, Transformer
from wizard_engine.parallel import lockstep
from wizard_engine.parallel.context import ParallelContext
from wizard_engine.parallel.reductions import gather_along

from .answer_batches import AnswerBatch, answer_batch, answer_runs
from .rewards import score_answer_tokens
from .sampler import Sampler


@dataclass
class Rollout:
    """Sampled answers of one step on this rank.

    samples: prompt and answer ids, weight 1 on every answer token.   texts: the answers.   lengths: answer tokens.
    behaviour: (N,) log-probability of the answer tokens as sampled, all answers end to end, nats.
    experts: of a policy with experts, where the sampler sent each token that a trainer feeds, (n - 1, L, A) per sample.
    stamp: checksum of the weights that it was sampled from.
    load: of this rank's engine: steps, tokens that came out of them, sequences that could run at once.
    """

    prompts: list[tuple[Message, ...]]
    samples: list[Sample]
    texts: list[str]
    finished: list[bool]
    lengths: list[int]
    behaviour: Tensor
    experts: list[Tensor] | None = None
    stamp: int | None = None
    load: tuple[int, int, int] = (0, 0, 0)

    @property
    def prompt_tokens(self) -> list[int]:
        """Tokens of each sample's prompt."""
        return [len(sample.tokens) - length for sample, length in zip(self.samples, self.lengths)]

    def batch(self, picked: Sequence[int], parallel: ParallelContext, device: torch.device) -> AnswerBatch:
        """Some answers for one forward pass of a model that is spread so."""
        counts = self.prompt_tokens
        return answer_batch([self.samples[i] for i in picked], [counts[i] for i in picked], parallel, device)

    def routes(self, picked: Sequence[int], batch: AnswerBatch, device: torch.device) -> Routes:
        """The sampler's choices for the tokens of a batch of some samples; fresh ones of a dense policy."""
        if self.experts is None:
            return Routes()
        pieces = [self.experts[picked[i]][first:last] for i, first, last in batch.pieces]
        return Routes(torch.cat(pieces).to(device).int())

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Per-answer pieces of a tensor over all answer tokens."""
        return values.split(self.lengths)


def step_seed(*parts: int) -> int:
    """A 63-bit seed from numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def roll_out(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    first: int = 0,
    stride: int = 1,
) -> Rollout:
    """`samples` answers to each prompt, drawn from the weights that the sampler has taken.

    Args:
        first, stride: the prompts are number first, first + stride, ... of those of all ranks; an answer does not
            depend on how they are divided. Ranks that have the same prompts, for they divide a model's matrices or
            tokens, sample a share of the prompts each, and all of them get all; ranks that divide the sampler's
            matrices sample what any of them has together.
    """
    numbers = [(first + i * stride) * samples + j for i in range(len(prompts)) for j in range(samples)]
    repeated = [tuple(prompt) for prompt in prompts for _ in range(samples)]
    ids = [encode_prompt(tokenizer, prompt) for prompt in repeated]
    row, tp = sampler.row, sampler.mesh.tp
    shares = [[i for i in range(len(ids)) if i // samples % row.size == r] for r in range(row.size)]
    parts = gather_along(tp, [(numbers[i], ids[i]) for i in shares[row.index]])
    together = [pair for part in parts for pair in part]
    samplings = [
        Sampling(max_new_tokens, float(temperature), seed=seed, row=number, eos_ids=tokenizer.eos_ids)
        for number, _ in together
    ]
    engine = sampler.engine
    before = engine.steps, engine.generated
    drawn = continued(engine, [prompt for _, prompt in together], samplings)
    slots = min(engine.max_sequences, len(together))
    load = engine.steps - before[0], engine.generated - before[1], slots
    begin = sum(len(part) for part in parts[: tp.index])
    own = drawn.rows(range(begin, begin + len(parts[tp.index])))
    drawn = _in_order(gather_along(row, own), shares)
    packed = []
    for prompt, answer in zip(ids, drawn.tokens):
        weights = np.concatenate((np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)))
        packed.append(Sample(np.asarray([*prompt, *answer], dtype=np.int32), weights))
    texts = [tokenizer.decode(tokens).strip() for tokens in drawn.tokens]
    behaviour = torch.tensor([x for row in drawn.logprobs for x in row], dtype=torch.float32)
    lengths = [len(tokens) for tokens in drawn.tokens]
    return Rollout(repeated, packed, texts, drawn.finished, lengths, behaviour, drawn.experts, sampler.stamp, load)


def _in_order(parts: Sequence[Generation], shares: Sequence[Sequence[int]]) -> Generation:
    """What each part drew for its share of the rows, in the order of the rows."""
    if len(parts) == 1:
        return parts[0]
    places = {row: (r, i) for r, share in enumerate(shares) for i, row in enumerate(share)}
    whole = Generation(experts=None if parts[0].experts is None else [])
    for row in range(len(places)):
        part, place = places[row]
        for name, values in vars(parts[part]).items():
            if values is not None:
                getattr(whole, name).append(values[place])
    return whole


@torch.no_grad()
def answer_logprobs(model: Transformer, rollout: Rollout, *, temperature: float, capacity: int = 8192) -> Tensor:
    """(N,) log-probability of the answer tokens under another model, with the sampler's temperature."""
    device, parallel = model.embedding.weight.device, model.parallel
    out: list[Tensor] = [torch.zeros(0)] * len(rollout.samples)
    runs = answer_runs(rollout.samples, rollout.prompt_tokens, range(len(out)), capacity, parallel)
    for run in lockstep(runs, model, backward=False):
        batch = rollout.batch(run, parallel, device)
        hidden = batch.hidden(model, model(*batch.inputs))
        logprob, _ = linear_logprob(
            hidden, model.head_weight, batch.targets, temperature=temperature, shard=model.shard
        )
        pieces = batch.of_answers(logprob).float().cpu().split([rollout.lengths[i] for i in run])
        for index, piece in zip(run, pieces):
            out[index] = piece
    return torch.cat(out)


@torch.no_grad()
def answer_values(critic: ScoringModel, rollout: Rollout) -> Tensor:
    """(N,) critic's value of the state before each answer token."""
    scores = score_answer_tokens(critic, rollout.samples, rollout.prompt_tokens, before=True)
    return torch.cat([score[:, 0] for score in scores])


def idle_share(loads: Sequence[tuple[int, int, int]]) -> float:
    """Share of the sampling that went by with nothing to sample, at the end of the longest answers: 1 - tokens over
    what all ranks' sequences could have got in the steps of the slowest rank.

    Args:
        loads: `Rollout.load` of every rank.
    """
    steps = max(load[0] for load in loads)
    room = steps * sum(load[2] for load in loads)
    return 1 - sum(load[1] for load in loads) / room if room else 0.0

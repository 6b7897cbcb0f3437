"""Rollouts of reinforcement learning: sampled answers with the inputs of one PPO update, packed end to end."""

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
from wizard_engine.runtime.metrics import progress

from .answer_batches import AnswerBatch, answer_batch, answer_runs
from .rewards import score_answer_tokens
from .sampler import Sampler


@dataclass
class Rollout:
    """Sampled answers of one step on this rank.

    samples: prompt and answer ids, weight 1 on every answer token.   texts: the answers.   lengths: answer tokens.
    behaviour: (N,) log-probability of the answer tokens as sampled, all answers end to end, nats.
    experts: for mixtures, the experts of each token that the trainer feeds, (n - 1, L, A) per sample.
    weights_checksum: of the weights that it was sampled from.
    load: of this rank's engine: steps, tokens that they generated, sequences that could run at once.
    """

    prompts: list[tuple[Message, ...]]
    samples: list[Sample]
    texts: list[str]
    finished: list[bool]
    lengths: list[int]
    behaviour: Tensor
    experts: list[Tensor] | None = None
    weights_checksum: int | None = None
    load: tuple[int, int, int] = (0, 0, 0)

    @property
    def prompt_tokens(self) -> list[int]:
        """Tokens of each sample's prompt."""
        return [len(sample.tokens) - length for sample, length in zip(self.samples, self.lengths)]

    def batch(self, picked: Sequence[int], parallel: ParallelContext, device: torch.device) -> AnswerBatch:
        """Batch of some answers for one forward pass of a model with this parallelism."""
        counts = self.prompt_tokens
        return answer_batch([self.samples[i] for i in picked], [counts[i] for i in picked], parallel, device)

    def routes(self, picked: Sequence[int], batch: AnswerBatch, device: torch.device) -> Routes:
        """The sampler's routes of the tokens of a batch; empty ones for a dense policy."""
        if self.experts is None:
            return Routes()
        experts = [self.experts[picked[i]][first:last] for i, first, last in batch.token_ranges]
        return Routes(torch.cat(experts).to(device).int())

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """A tensor over all answer tokens, split by answer."""
        return values.split(self.lengths)


def step_seed(*keys: int) -> int:
    """A 63-bit seed from integers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "big") >> 1


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
    desc: str = "",
) -> Rollout:
    """`samples` answers to each prompt, sampled from the sampler's current weights.

    Args:
        first, stride: the prompts have the global indices first, first + stride, ... An answer depends on its index,
            not on its rank. Tensor- and context-parallel ranks of the trainer have the same prompts: each samples a
            subset, and all gather all answers. Tensor-parallel ranks of the sampler sample their prompts together.
        desc: label of a progress bar; "": none.
    Raises:
        ValueError: an answer failed, such as by NaN logits.
    """
    rows = [(first + i * stride) * samples + j for i in range(len(prompts)) for j in range(samples)]
    repeated = [tuple(prompt) for prompt in prompts for _ in range(samples)]
    ids = [encode_prompt(tokenizer, prompt) for prompt in repeated]
    row, tp = sampler.row, sampler.mesh.tp
    indices_by_rank = [[i for i in range(len(ids)) if i // samples % row.size == r] for r in range(row.size)]
    requests_by_rank = gather_along(tp, [(rows[i], ids[i]) for i in indices_by_rank[row.index]])
    requests = [request for of_rank in requests_by_rank for request in of_rank]
    samplings = [
        Sampling(max_new_tokens, float(temperature), seed=seed, row=number, eos_ids=tokenizer.eos_ids)
        for number, _ in requests
    ]
    engine = sampler.engine
    before = engine.steps, engine.generated
    with progress(desc=desc, unit="answer", total=len(requests), quiet=not desc) as bar:
        generation = continued(engine, [prompt for _, prompt in requests], samplings, on_finished=bar.update)
    slots = min(engine.max_sequences, len(requests))
    load = engine.steps - before[0], engine.generated - before[1], slots
    begin = sum(len(of_rank) for of_rank in requests_by_rank[: tp.index])
    local = generation.rows(range(begin, begin + len(requests_by_rank[tp.index])))
    generation = _in_order(gather_along(row, local), indices_by_rank)
    generation.check("rollout: answers")
    packed = []
    for prompt, answer in zip(ids, generation.tokens):
        weights = np.concatenate((np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)))
        packed.append(Sample(np.asarray([*prompt, *answer], dtype=np.int32), weights))
    texts = [tokenizer.decode(tokens).strip() for tokens in generation.tokens]
    behaviour = torch.tensor([x for logprobs in generation.logprobs for x in logprobs], dtype=torch.float32)
    return Rollout(
        prompts=repeated,
        samples=packed,
        texts=texts,
        finished=generation.finished,
        lengths=[len(tokens) for tokens in generation.tokens],
        behaviour=behaviour,
        experts=generation.experts,
        weights_checksum=sampler.weights_checksum,
        load=load,
    )


def _in_order(generations: Sequence[Generation], indices_by_rank: Sequence[Sequence[int]]) -> Generation:
    """One generation of all rows in their order, out of those of the ranks."""
    if len(generations) == 1:
        return generations[0]
    places = {row: (r, i) for r, indices in enumerate(indices_by_rank) for i, row in enumerate(indices)}
    merged = Generation(experts=None if generations[0].experts is None else [])
    for row in range(len(places)):
        rank, place = places[row]
        for name, values in vars(generations[rank]).items():
            if values is not None:
                getattr(merged, name).append(values[place])
    return merged


@torch.no_grad()
def answer_logprobs(model: Transformer, rollout: Rollout, *, temperature: float, capacity: int = 8192) -> Tensor:
    """(N,) log-probability of the answer tokens under a model, at the sampler's temperature."""
    device, parallel = model.embedding.weight.device, model.parallel
    out: list[Tensor] = [torch.zeros(0)] * len(rollout.samples)
    runs = answer_runs(rollout.samples, rollout.prompt_tokens, range(len(out)), capacity, parallel)
    for run in lockstep(runs, model, backward=False):
        batch = rollout.batch(run, parallel, device)
        hidden = batch.hidden(model, model(*batch.inputs))
        logprob, _ = linear_logprob(
            hidden, model.head_weight, batch.targets, temperature=temperature, shard=model.shard
        )
        by_answer = batch.gather(logprob).float().cpu().split([rollout.lengths[i] for i in run])
        for index, answer_logprob in zip(run, by_answer):
            out[index] = answer_logprob
    return torch.cat(out)


@torch.no_grad()
def answer_values(critic: ScoringModel, rollout: Rollout, *, capacity: int = 8192) -> Tensor:
    """(N,) critic's value of the state before each answer token."""
    scores = score_answer_tokens(critic, rollout.samples, rollout.prompt_tokens, before=True, capacity=capacity)
    return torch.cat([score[:, 0] for score in scores])


def idle_fraction(loads: Sequence[tuple[int, int, int]]) -> float:
    """Fraction of the sampling slots that were idle while the longest answers finished.

    1 - tokens / (steps of the slowest rank x sequences of all ranks)

    Args:
        loads: `Rollout.load` of every rank.
    """
    steps = max(load[0] for load in loads)
    slots = steps * sum(load[2] for load in loads)
    return 1 - sum(load[1] for load in loads) / slots if slots else 0.0

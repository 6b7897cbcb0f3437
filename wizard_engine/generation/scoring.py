"""Log-probabilities of texts under a model, without gradients."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kernels.linear_logprob import linear_logprob
from wizard_engine.data.batch import collate
from wizard_engine.data.chat import Sample, encode_conversation
from wizard_engine.data.records import Conversation
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.model import Transformer
from wizard_engine.parallel import lockstep
from wizard_engine.parallel.collectives import all_gather_rows
from wizard_engine.runtime.metrics import progress

# Rows of logits at once; rows of a padded prompt.
SCORED_ROWS, ROW_MULTIPLE = 256, 64
Top = list[tuple[int, float]]


def packed_groups(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Indices in runs of similar length, each run at most `capacity` tokens (or a single longer sample)."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    group, filled = [], 0
    for index in order.tolist():
        if group and filled + lengths[index] > capacity:
            yield group
            group, filled = [], 0
        group.append(index)
        filled += lengths[index]
    if group:
        yield group


@torch.no_grad()
def token_logprobs(
    model: Transformer,
    samples: Sequence[Sample],
    *,
    capacity: int = 8192,
    temperature: float = 1.0,
    groups: Sequence[Sequence[int]] | None = None,
    desc: str = "",
) -> list[np.ndarray]:
    """(n - 1,) fp32 log-probability of tokens[1:] of each sample, nats; empty where it is in none of the groups.

    For a sharded model every rank makes the call, with its own samples or its own groups of the same samples.

    Args:
        groups: indices of the samples of each pack; default: all of them, in packs of `capacity` tokens.
        desc: label of a progress bar; "": none.
    """
    device = model.embedding.weight.device
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples)
    if groups is None:
        groups = list(packed_groups([len(sample.tokens) for sample in samples], capacity))
    packs = lockstep(groups, model, backward=False)
    for group in progress(packs, desc=desc, unit="pack", total=len(groups), quiet=not desc):
        batch = collate([samples[i] for i in group]).to(device)
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
        logprob, _ = linear_logprob(
            hidden, model.head_weight, batch.targets, temperature=temperature, shard=model.shard
        )
        by_sample = np.split(logprob.float().cpu().numpy(), batch.cu_seqlens.cpu().numpy()[1:-1])
        for index, sample_logprob in zip(group, by_sample):
            out[index] = sample_logprob
    return out


@torch.no_grad()
def prompt_logprobs(model: Transformer, ids: Sequence[int], *, top: int = 0) -> tuple[list[float], list[Top]]:
    """Log-probability of each id after the first, nats, and the `top` likeliest ids (id, nats) in its place.

    Of a divided model every rank makes the call with the same ids.
    """
    device, count = model.embedding.weight.device, len(ids)
    # Ranks that divide a row take equal shares of it; what stands behind the ids changes nothing before it.
    padded = count + -count % ROW_MULTIPLE
    tokens = torch.tensor([*ids, *[0] * (padded - count)], device=device)
    cu_seqlens = torch.tensor([0, padded], dtype=torch.int32, device=device)
    hidden_TD = model(tokens, torch.arange(padded, device=device), cu_seqlens, padded)
    logprobs, tops = [], []
    for start in range(0, count - 1, SCORED_ROWS):
        end = min(start + SCORED_ROWS, count - 1)
        every_TV = whole_logits(model, hidden_TD[start:end]).log_softmax(-1)
        logprobs += every_TV.gather(1, tokens[start + 1 : end + 1, None])[:, 0].tolist()
        if top:
            values, likeliest = every_TV.topk(min(top, every_TV.shape[1]))
            tops += [list(zip(*row)) for row in zip(likeliest.tolist(), values.tolist())]
    return logprobs, tops


def whole_logits(model: Transformer, hidden_TD: torch.Tensor) -> torch.Tensor:
    """(T, V) fp32 logits of hidden states, over all ranks that the vocabulary is sharded over."""
    parallel, logits_Tv = model.parallel, model.logits(hidden_TD)
    if parallel.tp.size == 1 or parallel.is_gathered:
        return logits_Tv
    shards, _ = all_gather_rows(logits_Tv[None], parallel.tp)
    return shards.transpose(0, 1).reshape(hidden_TD.shape[0], -1)


def sequence_logprobs(
    model: Transformer,
    samples: Sequence[Sample],
    *,
    capacity: int = 8192,
    mean: bool = False,
    groups: Sequence[Sequence[int]] | None = None,
    desc: str = "",
) -> np.ndarray:
    """(N,) float64 log-probability of each sample's supervised tokens: their sum, or mean, in nats.

    Args:
        groups, desc: as of `token_logprobs`; a sample that is in none of the groups has 0.
    """
    sums = np.zeros(len(samples))
    for index, logprob in enumerate(token_logprobs(model, samples, capacity=capacity, groups=groups, desc=desc)):
        if not len(logprob):
            continue
        weights = samples[index].weights[1:]
        logprob_sum = float(np.dot(logprob.astype(np.float64), weights))
        sums[index] = logprob_sum / max(float(weights.sum()), 1.0) if mean else logprob_sum
    return sums


def perplexities(
    model: Transformer, tokenizer: Tokenizer, conversations: Sequence[Conversation], *, desc: str = ""
) -> list[float]:
    """exp of the mean negative log-probability of each conversation's answers; NaN where the context is too short.

    Args:
        desc: label of a progress bar; "": none.
    """
    samples, kept = [], []
    out = [math.nan] * len(conversations)
    for index, row in enumerate(conversations):
        sample = encode_conversation(tokenizer, row.messages)
        if len(sample.tokens) <= model.config.max_positions:
            samples.append(sample)
            kept.append(index)
    for index, value in zip(kept, sequence_logprobs(model, samples, mean=True, desc=desc)):
        out[index] = math.exp(min(-value, 700.0))
    return out

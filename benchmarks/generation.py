"""Greedy generation of requests of mixed lengths: the engine and transformers' generate, same weights, fp32.

Every request has a prompt and a limit of new tokens of its own, spread evenly over the logarithms of 8 to 256, as
answers differ in use. The engine ends each at its limit; transformers' generate has one limit for a batch, and its
answers are cut. Tokens/s count what was asked for.
"""

from typing import Any

import numpy as np
import torch

from benchmarks.peers import SEED, SHAPES, build, describe, examples, transformers_twin
from benchmarks.timing import interleave
from wizard_engine.data.chat import Sample
from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.model import Transformer

PEER = "transformers"
PROMPTS, NEW_TOKENS = 64, (8, 256)


def prompt_ids(samples: list[Sample]) -> list[list[int]]:
    """The tokens of each conversation before its first answer."""
    return [sample.tokens[: int(np.argmax(sample.weights > 0))].tolist() for sample in samples]


def limits(count: int) -> list[int]:
    """New tokens of each request."""
    return np.random.default_rng(SEED).permutation(np.geomspace(*NEW_TOKENS, count).round().astype(int)).tolist()


def ours(model: Transformer, prompts: list[list[int]], eos_id: int) -> list[list[int]]:
    """New tokens of each request, up to and with EOS."""
    counts = limits(len(prompts))
    pages = sum(-(-(len(prompt) + count) // 16) + 1 for prompt, count in zip(prompts, counts))
    engine = Engine(model, cache_tokens=16 * pages, max_sequences=len(prompts))
    rows = [engine.add(prompt, Sampling(count, eos_ids=(eos_id,)))[0] for prompt, count in zip(prompts, counts)]
    engine.run()
    return [row.tokens for row in rows]


def theirs(model: Any, prompts: list[list[int]], eos_id: int) -> list[list[int]]:
    """The same by transformers, padded on the left as its generation asks for."""
    longest, counts = max(map(len, prompts)), limits(len(prompts))
    tokens = torch.tensor([[eos_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max(counts),
            do_sample=False,
            use_cache=True,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )
    new = [row[longest : longest + count].tolist() for row, count in zip(out, counts)]
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in new]


def check_same(mine: list[list[int]], other: list[list[int]]) -> float:
    """Share of answers that are the same; AssertionError below nine in ten (rounding may turn a tie between tokens)."""
    agreement = float(np.mean([a == b for a, b in zip(mine, other)]))
    assert agreement >= 0.9, f"greedy answers: {agreement:.0%} are the same, expected at least 90 %"
    return agreement


def run(*, quick: bool = False, peer: bool = True) -> list[dict[str, Any]]:
    """Rows of the benchmark, without transformers' where `peer` is off; AssertionError if the answers differ."""
    tokenizer, samples = examples(PROMPTS)
    prompts, eos_id = prompt_ids(samples), tokenizer.eos_id
    lengths = [len(prompt) for prompt in prompts]
    rows = []
    for preset in SHAPES[: 1 if quick else None]:
        model = build(preset, tokenizer)
        sharpen_logits(model)
        answers = ours(model, prompts, eos_id)
        variants: dict[str, Any] = {"wizard_engine": lambda model=model: ours(model, prompts, eos_id)}
        if peer:
            twin = transformers_twin(model, tokenizer).eval()
            check_same(answers, theirs(twin, prompts, eos_id))
            variants[PEER] = lambda twin=twin: theirs(twin, prompts, eos_id)
        span = f"{min(lengths)}..{max(lengths)}, {NEW_TOKENS[0]}..{NEW_TOKENS[1]} new"
        shape = f"{describe(preset, model)}  {PROMPTS} prompts of {span}"
        rows += interleave(
            "generation",
            variants,
            items=sum(map(len, answers)),
            unit="tokens/s",
            shape=shape,
            repeats=2 if quick else 5,
            peer=PEER,
        )
    return rows


@torch.no_grad()
def sharpen_logits(model: Transformer) -> None:
    """Scale random weights by ten, so that likelihoods are far apart and rounding rarely decides between tokens."""
    generator = torch.Generator().manual_seed(SEED + 1)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(10 * model.config.init_std * noise)

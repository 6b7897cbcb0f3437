"""Continuations of many prompts at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wizard_engine.data.chat import encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.model import Transformer

from .allowed_ids import allowed_ids
from .engine import Engine
from .scheduler import Sampling


@dataclass
class Generation:
    """Sampled answers, one entry per prompt.

    tokens: ids after the prompt, with the closing EOS if there is one.   logprobs: nats, under the distribution that
    each id was drawn from (temperature, top-k and top-p applied).   finished: whether EOS occurred within the limit.
    experts: for mixtures, the experts of each token but the answer's last, (n, L, A) int16 on the CPU; else None.
    errors: what failed, "" where nothing did; an answer that failed ends early.
    """

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    experts: list[Tensor] | None = None
    errors: list[str] = field(default_factory=list)

    def check(self, name: str = "prompts") -> None:
        """Raise ValueError if an answer failed; names the first one's prompt and reason."""
        failed = [(place, error) for place, error in enumerate(self.errors) if error]
        if failed:
            place, error = failed[0]
            raise ValueError(f"{name}[{place}]: {len(failed)} of {len(self.errors)} answers failed; the first: {error}")

    def rows(self, places: Sequence[int]) -> "Generation":
        """Entries of some prompts."""
        return Generation(*(None if column is None else [column[i] for i in places] for column in vars(self).values()))


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_ids: Sequence[int],
    batch_size: int = 128,
    top_k: int | None = None,
    top_p: float | None = None,
    row_ids: Sequence[int] | None = None,
    on_finished: Callable[[int], object] | None = None,
    allowed_ids: Tensor | None = None,
) -> Generation:
    """Continuations of prompts by a model that is whole on this rank, or gathered.

    The uniform number of row i in a step comes from `kernels.sample.row_seeds` of (seed, i, step). So its text depends
    neither on the batching nor, with the global indices in `row_ids`, on the sharding over ranks.

    Args:
        prompts: token ids, each at least one.   max_new_tokens: limit per row, EOS counted.
        temperature: 0 is greedy; otherwise logits are divided by it.   batch_size: rows decoded together.
        eos_ids: each of them ends a row.
        top_k, top_p: truncation of the distribution, as in `kernels.sample`; None: none.
        on_finished: called after each step with the number of rows that finished in it, for a progress bar.
        allowed_ids: (V,) bool, as `Engine`.
    Returns:
        Generation, in the order of the prompts. Log-probabilities are those of the truncated distribution; greedy ones
        those at temperature 1 over the whole vocabulary.
    Raises:
        ValueError: an empty prompt, a number out of its range, a prompt that leaves no room in the context, or an
            answer that failed, such as by NaN logits.
    """
    rows = range(len(prompts)) if row_ids is None else row_ids
    how = {"temperature": temperature, "seed": seed, "eos_ids": tuple(eos_ids), "top_k": top_k, "top_p": top_p}
    samplings = [Sampling(max_new_tokens, row=row, **how) for row in rows] or [Sampling(max_new_tokens, **how)]
    limit = model.config.max_positions - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= limit:
            raise ValueError(f"prompts[{index}]: expected 1 to {limit} tokens, got {len(prompt)}")
    if not prompts:
        return Generation(experts=[] if model.config.experts else None)
    engine = engine_for(model, prompts, samplings, batch_size, record_routes=True, allowed_ids=allowed_ids)
    generation = continued(engine, prompts, samplings, on_finished=on_finished)
    generation.check()
    return generation


def engine_for(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    batch_size: int,
    **options: bool | Tensor | None,
) -> Engine:
    """An engine whose cache has room for any `batch_size` of the prompts with all their new tokens."""
    page_size = 16 if model.embedding.weight.device.type == "cpu" else 64
    # One more page for each, so that none waits for pages.
    needed = [-(-(len(p) + s.max_new_tokens) // page_size) + 1 for p, s in zip(prompts, samplings)]
    pages = sum(sorted(needed, reverse=True)[:batch_size])
    return Engine(
        model,
        cache_tokens=pages * page_size,
        page_size=page_size,
        max_sequences=min(batch_size, len(prompts)),
        use_graphs=False,
        **options,
    )


def continued(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    on_finished: Callable[[int], object] | None = None,
) -> Generation:
    """Continuations of prompts, each by its own sampling; equal prompts are computed once. See `generate`.

    An answer that fails does not raise: `Generation.errors` says why.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt), []).append(place)
    sequences = {}
    for prompt, places in by_prompt.items():
        sequences.update(zip(places, engine.add_all(prompt, [samplings[place] for place in places])))
    while engine.has_work:
        finished = sum(sequence.reason is not None for sequence in engine.step())
        if on_finished is not None:
            on_finished(finished)
    rows = [sequences[place] for place in range(len(prompts))]
    return Generation(
        [s.tokens for s in rows],
        [s.logprobs for s in rows],
        [s.reason == "stop" for s in rows],
        [torch.empty(0) if s.experts is None else s.experts for s in rows] if engine.records_routes else None,
        [s.error for s in rows],
    )


def answer_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
    top_k: int | None = None,
    top_p: float | None = None,
    on_finished: Callable[[int], object] | None = None,
) -> list[str]:
    """The model's next answer in each conversation, which ends with a user turn, in the tokenizer's chat format."""
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    sampled = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        eos_ids=tokenizer.eos_ids,
        batch_size=batch_size,
        top_k=top_k,
        top_p=top_p,
        on_finished=on_finished,
        allowed_ids=allowed_ids(tokenizer, model.config.vocab_size),
    )
    return [tokenizer.decode(tokens).strip() for tokens in sampled.tokens]

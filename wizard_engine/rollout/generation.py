"""Batched sampling with a plain KV cache: prefill packed, then decode row by row, dropping rows that are done."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rope import rope_tables
from kernels.sample import row_seeds, sample, uniforms

from ..data.chat import encode_prompt
from ..data.records import Message
from ..data.tokenizer import Tokenizer
from ..model import Routes, Transformer


@dataclass
class Generation:
    """What was sampled, one entry per prompt.

    tokens: ids after the prompt, the closing EOS included where it came.   logprobs: nats, under the distribution that
    each id was drawn from (temperature, top-k and top-p applied).   finished: whether EOS came within the limit.
    experts: of a model with experts, where it sent each token that it read, (n, L, A) int16 on the CPU: all of the
    prompt's and of the answer's but the last; else None.
    """

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    experts: list[Tensor] | None = None


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_id: int,
    batch_size: int = 128,
    top_k: int | None = None,
    top_p: float | None = None,
    numbers: Sequence[int] | None = None,
) -> Generation:
    """Continuations of prompts.

    Row i draws its uniform number of a step from `kernels.sample.row_seeds` of (seed, i, step), so its text does not
    depend on how rows are batched; nor on how they are divided over ranks, where `numbers` says which rows of all
    these are.

    Args:
        prompts: token ids, each at least one.   max_new_tokens: limit per row, EOS counted.
        temperature: 0 is greedy; otherwise logits are divided by it.   batch_size: rows decoded together.
        top_k, top_p: truncation of the distribution, as in `kernels.sample`; None: none.
    Returns:
        Generation, in the order of the prompts. Log-probabilities are those of the truncated distribution; greedy ones
        those at temperature 1 over the whole vocabulary.
    Raises:
        ValueError: an empty prompt, a number out of its range, or a prompt that leaves no room in the context.
    """
    _validate(model, prompts, max_new_tokens, temperature, top_k, top_p)
    how = {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
    out = Generation([[]] * len(prompts), [[]] * len(prompts), [False] * len(prompts))
    if model.config.experts:
        out.experts = [torch.empty(0)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        drawn = torch.tensor(rows if numbers is None else [numbers[i] for i in rows])
        uniform = uniforms(row_seeds(seed, drawn, max_new_tokens if temperature > 0 else 1))
        decoder = _Decoder(model, [list(prompts[i]) for i in rows], max_new_tokens, how, uniform, eos_id)
        for row, (tokens, logprobs, finished) in zip(rows, decoder.run()):
            out.tokens[row], out.logprobs[row], out.finished[row] = tokens, logprobs, finished
        if out.experts is not None:
            for place, row in enumerate(rows):
                out.experts[row] = decoder.experts_of(place, len(prompts[row]) + len(out.tokens[row]) - 1)
    return out


def _validate(
    model: Transformer, prompts: Sequence, max_new_tokens: int, temperature: float, top_k: int | None,
    top_p: float | None,
) -> None:  # fmt: skip
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected >= 0 and finite, got {temperature}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k: expected >= 0, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected in (0, 1], got {top_p}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
    limit = model.config.max_positions - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= limit:
            raise ValueError(f"prompts[{index}]: expected 1 to {limit} tokens, got {len(prompt)}")


class _Decoder:
    """State of one batch: the cache, and for every row still active its last token and position."""

    def __init__(self, model, prompts, max_new_tokens, how, uniform, eos_id) -> None:
        self.model, self.config = model, model.config
        self.how, self.eos_id, self.max_new_tokens = how, eos_id, max_new_tokens
        self.device = model.embedding.weight.device
        self.uniform = uniform.to(self.device)
        self.rows = torch.arange(len(prompts), device=self.device)
        self.tokens = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(len(prompts), max_new_tokens, device=self.device)
        # Of a model with experts: per row, choices of the tokens that it read; and steps not yet given to the rows.
        self.experts: list[list[Tensor]] = []
        self.fed: list[tuple[Tensor, Tensor]] = []
        self.hidden, self.positions = self._prefill(prompts)

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Fill the cache with every prompt (equal prompts computed once); last hidden states and next positions."""
        unique = {tuple(prompt): None for prompt in prompts}
        index = {prompt: i for i, prompt in enumerate(unique)}
        source = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in unique], device=self.device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        flat = torch.tensor([token for prompt in unique for token in prompt], device=self.device)
        longest = int(lengths.max())
        positions = torch.arange(flat.numel(), device=self.device) - torch.repeat_interleave(cu_seqlens[:-1], lengths)
        row = torch.repeat_interleave(torch.arange(len(unique), device=self.device), lengths)
        config, cos_sin = self.config, rope_tables(positions, self.config.head_width, self.config.rope_base)
        shape = (config.layers, len(unique), config.kv_heads, longest + self.max_new_tokens, config.head_width)
        dtype = self.model.embedding.weight.dtype
        self.keys, self.values = (torch.zeros(shape, device=self.device, dtype=dtype) for _ in range(2))
        x_TD = self.model.embedding(flat)
        routes = Routes() if self.config.experts else None
        for layer, block in enumerate(self.model.blocks):
            _, k_TKC, v_TKC = block.attention.project(block.attention_norm(x_TD), *cos_sin)
            self.keys[layer][row, :, positions] = k_TKC
            self.values[layer][row, :, positions] = v_TKC
            x_TD = block(x_TD, *cos_sin, cu_seqlens, longest, routes)
        if routes is not None:
            parts = routes.stacked().to(torch.int16).cpu().split(lengths.tolist())
            self.experts = [[parts[i]] for i in source.tolist()]
        hidden = self.model.norm(x_TD[cu_seqlens[1:].long() - 1])
        if len(unique) < len(prompts):
            self.keys, self.values = self.keys.index_select(1, source), self.values.index_select(1, source)
        return hidden.index_select(0, source), lengths[source]

    def run(self) -> list[tuple[list[int], list[float], bool]]:
        for step in range(self.max_new_tokens):
            uniform = self.uniform[self.rows, min(step, self.uniform.shape[1] - 1)]
            tokens, logprobs = sample(self.model.logits(self.hidden), uniform=uniform, **self.how)
            self.tokens[self.rows, step], self.logprobs[self.rows, step] = tokens, logprobs
            alive = tokens != self.eos_id
            if step + 1 == self.max_new_tokens or not bool(alive.any()):
                break
            if int(alive.sum()) < 0.75 * alive.numel():
                tokens = self._drop(alive.nonzero()[:, 0], tokens)
            self._decode(tokens)
        return self._collect()

    def _drop(self, keep: Tensor, tokens: Tensor) -> Tensor:
        """Forget the rows that are done."""
        self.keys, self.values = self.keys.index_select(1, keep), self.values.index_select(1, keep)
        self.rows, self.positions = self.rows[keep], self.positions[keep]
        return tokens[keep]

    def _decode(self, tokens: Tensor) -> None:
        """Append one token to every row; the hidden states after it."""
        config, count = self.config, tokens.numel()
        cos_sin = rope_tables(self.positions, config.head_width, config.rope_base)
        longest = int(self.positions.max()) + 1
        key_positions = torch.arange(longest, device=self.device)
        seen = key_positions[None, :] <= self.positions[:, None]
        if config.window is not None:
            seen &= key_positions[None, :] > self.positions[:, None] - config.window
        mask, row = seen[:, None, None, :], torch.arange(count, device=self.device)
        x_BD = self.model.embedding(tokens)
        routes = Routes() if self.config.experts else None
        for layer, block in enumerate(self.model.blocks):
            attention = block.attention
            q_BHC, k_BKC, v_BKC = attention.project(block.attention_norm(x_BD), *cos_sin)
            keys, values = self.keys[layer], self.values[layer]
            keys[row, :, self.positions], values[row, :, self.positions] = k_BKC, v_BKC
            grouped = q_BHC.reshape(count, config.kv_heads, -1, config.head_width)
            out = F.scaled_dot_product_attention(grouped, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask)
            x_BD = x_BD + attention.out(out.reshape(count, -1))
            x_BD = x_BD + block.feed_forward(block.feed_forward_norm(x_BD), routes)
        if routes is not None:
            self.fed.append((self.rows, routes.stacked()))
        self.hidden, self.positions = self.model.norm(x_BD), self.positions + 1

    def experts_of(self, place: int, count: int) -> Tensor:
        """(count, L, A) int16 experts of the first tokens that a row read."""
        if self.fed:
            for rows, experts_BLA in self.fed:
                for row, experts_LA in zip(rows.tolist(), experts_BLA.to(torch.int16).cpu()):
                    self.experts[row].append(experts_LA[None])
            self.fed = []
        return torch.cat(self.experts[place])[:count]

    def _collect(self) -> list[tuple[list[int], list[float], bool]]:
        collected = []
        for tokens, logprobs in zip(self.tokens.tolist(), self.logprobs.tolist()):
            finished = self.eos_id in tokens
            length = tokens.index(self.eos_id) + 1 if finished else sum(token >= 0 for token in tokens)
            collected.append((tokens[:length], logprobs[:length], finished))
        return collected


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
) -> list[str]:
    """The model's next answer in each conversation (which ends with a user turn), in the Vicuna format."""
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    sampled = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        eos_id=tokenizer.eos_id,
        batch_size=batch_size,
        top_k=top_k,
        top_p=top_p,
    )
    return [tokenizer.decode(tokens).strip() for tokens in sampled.tokens]

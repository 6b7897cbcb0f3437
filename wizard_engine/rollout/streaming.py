"""One conversation at a time, token by token: a cache that is kept between turns, and text that is never taken back."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rope import rope_tables
from kernels.sample import row_seeds, sample, uniforms

from ..data.tokenizer import Tokenizer
from ..model import Transformer

FIRST_CAPACITY = 256


class Streamer:
    """Continues prompts one token at a time, keeping keys and values of what it has read.

    A prompt that begins like what is in the cache, as the next turn of a conversation does, is read from where it
    differs. The ids are those of `rollout.generate` for the same prompt as its only row.

    Attributes:
        cached: ids whose keys and values are kept.   reused: how many of the last prompt's were there already.
    """

    def __init__(self, model: Transformer, eos_id: int) -> None:
        self.model, self.config, self.eos_id = model, model.config, eos_id
        self.device = model.embedding.weight.device
        self.cached: list[int] = []
        self.reused = 0
        self._grow(FIRST_CAPACITY)

    @torch.no_grad()
    def stream(
        self, prompt: Sequence[int], *, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
        top_p: float | None = None, seed: int = 0,
    ) -> Iterator[int]:  # fmt: skip
        """Ids after the prompt, as they are sampled; EOS, where it comes, is the last one.

        Args:
            max_new_tokens: limit, EOS counted.   temperature: 0 is greedy.   top_k, top_p: as `kernels.sample`.
        Raises:
            ValueError: an empty prompt, or no room for it and the new tokens in the context.
        """
        room = self.config.max_positions - max_new_tokens
        if max_new_tokens < 1 or not 1 <= len(prompt) <= room:
            raise ValueError(f"prompt: expected 1 to {room} tokens beside {max_new_tokens} new ones, got {len(prompt)}")
        uniform = uniforms(row_seeds(seed, torch.tensor([0]), max_new_tokens if temperature > 0 else 1)).to(self.device)
        hidden = self._read(prompt)
        for step in range(max_new_tokens):
            tokens, _ = sample(
                self.model.logits(hidden), uniform=uniform[:, min(step, uniform.shape[1] - 1)],
                temperature=float(temperature), top_k=top_k, top_p=top_p,
            )  # fmt: skip
            token = int(tokens)
            yield token
            if token == self.eos_id or step + 1 == max_new_tokens:
                return
            hidden = self._feed([token])

    def _read(self, prompt: Sequence[int]) -> Tensor:
        """(1, D) hidden state after the prompt; what the cache has of its beginning is not computed again."""
        common = 0
        while common < min(len(prompt) - 1, len(self.cached)) and prompt[common] == self.cached[common]:
            common += 1
        self.cached, self.reused = self.cached[:common], common
        return self._feed(list(prompt[common:]))

    def _feed(self, tokens: list[int]) -> Tensor:
        """(1, D) hidden state after the last of further tokens."""
        first, last = len(self.cached), len(self.cached) + len(tokens)
        while last > self.keys.shape[2]:
            self._grow(2 * self.keys.shape[2])
        positions = torch.arange(first, last, device=self.device)
        cos_sin = rope_tables(positions, self.config.head_width, self.config.rope_base)
        x_TD = self.model.embedding(torch.tensor(tokens, device=self.device))
        for layer, block in enumerate(self.model.blocks):
            x_TD = x_TD + self._attend(layer, block, x_TD, positions, cos_sin)
            x_TD = x_TD + block.feed_forward(block.feed_forward_norm(x_TD))
        self.cached += tokens
        return self.model.norm(x_TD[-1:])

    def _attend(self, layer: int, block, x_TD: Tensor, positions: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """What a block's attention adds to the new tokens; their keys and values go into the cache."""
        config, attention = self.config, block.attention
        q_THC, k_TKC, v_TKC = attention.project(block.attention_norm(x_TD), *cos_sin)
        first, last = len(self.cached), len(self.cached) + len(positions)
        self.keys[layer][:, first:last] = k_TKC.transpose(0, 1)
        self.values[layer][:, first:last] = v_TKC.transpose(0, 1)
        # Queries see at most a window's keys: older ones are not read.
        start = 0 if config.window is None else max(0, first - config.window + 1)
        key_positions = torch.arange(start, last, device=self.device)
        seen = key_positions[None, :] <= positions[:, None]
        if config.window is not None:
            seen &= key_positions[None, :] > positions[:, None] - config.window
        grouped = q_THC.view(len(positions), config.kv_heads, -1, config.head_width).permute(1, 2, 0, 3)
        keys, values = (cache[layer][:, None, start:last] for cache in (self.keys, self.values))
        group = grouped.shape[1]
        out = F.scaled_dot_product_attention(
            grouped, keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1), attn_mask=seen
        )
        return attention.out(out.permute(2, 0, 1, 3).reshape(len(positions), -1))

    def _grow(self, capacity: int) -> None:
        """Caches (L, K, capacity, C) with what was in the former ones."""
        config = self.config
        shape = (config.layers, config.kv_heads, capacity, config.head_width)
        grown = [torch.zeros(shape, dtype=self.model.embedding.weight.dtype, device=self.device) for _ in range(2)]
        if self.cached:
            for new, old in zip(grown, (self.keys, self.values)):
                new[:, :, : old.shape[2]] = old
        self.keys, self.values = grown


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Pieces of the answer as its ids come; together they are `tokenizer.decode(ids).strip()`.

    A piece is held back while a later id could change it: half a character, or white space that may be the last.
    """
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids).lstrip()
        ready = text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    rest = tokenizer.decode(ids).strip()[len(shown) :]
    if rest:
        yield rest

"""Streaming of answers: one conversation at a time, text that is never retracted."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.model import Transformer

from .engine import Engine
from .scheduler import Sampling

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# Ids that are decoded again with each new one: at most WINDOW, of which CONTEXT stay when the window moves.
WINDOW, CONTEXT = 64, 16


class Streamer:
    """Continues prompts one token at a time, keeping keys and values of what it has read.

    A prompt that shares a prefix with the cache, such as the next turn of a conversation, is computed from the first
    page that differs. The ids are those of `generation.generate` for the same prompt as its only row.

    Args:
        cache_tokens: capacity of the cache; default: the model's context.   allowed_ids: (V,) bool, as `Engine`.
    Attributes:
        reused: cached tokens of the last prompt.
    """

    def __init__(
        self,
        model: Transformer,
        eos_ids: Sequence[int],
        *,
        cache_tokens: int | None = None,
        allowed_ids: Tensor | None = None,
    ) -> None:
        self.config, self.eos_ids, self.reused = model.config, tuple(eos_ids), 0
        tokens = cache_tokens or model.config.max_positions + 16
        self.engine = Engine(model, cache_tokens=tokens, page_size=16, max_sequences=1, allowed_ids=allowed_ids)

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """Ids after the prompt, as they are sampled; EOS, where it comes, is the last one.

        Args:
            max_new_tokens: limit, EOS counted.   temperature: 0 is greedy.   top_k, top_p: as `kernels.sample`.
        Raises:
            ValueError: an empty prompt, no room for it and the new tokens in the context, or an answer that fails.
        """
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, eos_ids=self.eos_ids)
        (sequence,) = self.engine.add(prompt, sampling)
        try:
            while sequence.reason is None:
                grown = self.engine.step()
                if sequence.error:
                    raise ValueError(f"answer: expected a further token, got none: {sequence.error}")
                if grown:
                    self.reused = sequence.cached
                    yield sequence.ids[-1]
        finally:
            self.engine.cancel(sequence)


class TextStream:
    """The text of an answer while its ids arrive, up to the first stop string.

    Text is held back while a later id could change it: an incomplete character, white space that may be the last, the
    beginning of a stop string. All deltas together are `tokenizer.decode(ids)`, cut before the stop string, and without
    white space around it where it is stripped.

    Args:
        stop: strings that end the text.   strip: remove white space at both ends.
    Attributes:
        stopped: whether a stop string occurred.   text: what has been returned so far.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, strip: bool = True) -> None:
        self.tokenizer, self.stop, self.strip = tokenizer, [s for s in stop if s], strip
        self.stopped, self.text = False, ""
        self._ids: list[int] = []
        self._whole, self._start, self._skip, self._base, self._searched = "", 0, 0, "", 0

    def push(self, token: int) -> str:
        """The new text that is final after one more id; "" if none is."""
        if self.stopped:
            return ""
        self._decode(token)
        stops = [self._whole.find(s, max(0, self._searched - len(s) + 1)) for s in self.stop]
        stops = [place for place in stops if place >= 0]
        if stops:
            self.stopped = True
            return self._give(self._whole[: min(stops)].rstrip() if self.strip else self._whole[: min(stops)])
        ready = self._whole.rstrip(UNKNOWN)
        self._searched = len(ready)
        held = max((_overlap(ready, s) for s in self.stop), default=0)
        ready = ready[: len(ready) - held]
        return self._give(ready.rstrip() if self.strip else ready)

    def end(self) -> str:
        """The rest of the text, after the last id."""
        if self.stopped:
            return ""
        return self._give(self._whole.rstrip() if self.strip else self._whole)

    def _give(self, whole: str) -> str:
        ready = whole.lstrip() if self.strip else whole
        delta = ready[len(self.text) :]
        self.text += delta
        return delta

    def _decode(self, token: int) -> None:
        """Text of all ids, of which only the last ones are decoded again."""
        self._ids.append(token)
        self._whole = self._base + self.tokenizer.decode(self._ids[self._start :])[self._skip :]
        if len(self._ids) - self._start >= WINDOW and not self._whole.endswith(UNKNOWN):
            self._base, self._start = self._whole, len(self._ids) - CONTEXT
            self._skip = len(self.tokenizer.decode(self._ids[self._start :]))


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Deltas of the answer while its ids arrive; together they are `tokenizer.decode(ids).strip()`."""
    stream = TextStream(tokenizer)
    for token in tokens:
        delta = stream.push(token)
        if delta:
            yield delta
    rest = stream.end()
    if rest:
        yield rest

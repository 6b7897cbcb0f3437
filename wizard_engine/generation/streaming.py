"""Streaming of answers: one conversation at a time, text that is never retracted."""

import codecs
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.model import Transformer

from .engine import Engine
from .scheduler import Sampling


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


class ShownToken(NamedTuple):
    """What a token adds to a text.

    Attributes:
        index: among the pushed tokens.   start: characters of the text before it.   text: characters that it completes.
        data: its bytes, those of half characters too.
    """

    index: int
    start: int
    text: str
    data: bytes


class _Span(NamedTuple):
    """A token's characters [start, end) in the text of all tokens; `pending`: bytes of a character that goes on."""

    index: int
    start: int
    end: int
    text: str
    data: bytes
    pending: int


class TextStream:
    """The text of an answer while its ids arrive, up to the first stop string.

    Text is held back while a later id could change it: an incomplete character, white space that may be the last, the
    beginning of a stop string. All deltas together are the text of the ids' bytes, cut before the stop string, and
    without white space around it where it is stripped.

    Args:
        stop: strings that end the text.   strip: remove white space at both ends.
        continues: the ids follow a text, so that white space at the beginning stays; otherwise the text is
            `tokenizer.decode(ids)`.   keeps_tokens: have `shown_tokens`.
    Attributes:
        stopped: whether a stop string occurred.   text: what has been returned so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        strip: bool = True,
        continues: bool = False,
        keeps_tokens: bool = False,
    ) -> None:
        self.tokenizer, self.stop, self.strip = tokenizer, [s for s in stop if s], strip
        self.continues, self.keeps_tokens = continues, keeps_tokens
        self.stopped, self.text = False, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole, self._searched, self._lead, self._count = "", 0, 0, 0
        self._is_start = tokenizer.prefixes_space and not continues
        self._spans: deque[_Span] = deque()

    def push(self, token: int) -> str:
        """The new text that is final after one more id; "" if none is."""
        if self.stopped:
            return ""
        self._decode(token)
        stops = [self._whole.find(s, max(0, self._searched - len(s) + 1)) for s in self.stop]
        stops = [place for place in stops if place >= 0]
        if stops:
            return self._stopped_at(min(stops))
        ready = self._whole
        self._searched = len(ready)
        held = max((_overlap(ready, s) for s in self.stop), default=0)
        return self._give(ready[: len(ready) - held])

    def end(self) -> str:
        """The rest of the text, after the last id."""
        if self.stopped:
            return ""
        broken = self._decoder.decode(b"", True)
        self._whole += broken
        if broken and self._spans:
            last = self._spans.pop()
            self._spans.append(last._replace(end=len(self._whole), text=last.text + broken, pending=0))
        found = [place for s in self.stop if (place := self._whole.find(s)) >= 0]
        return self._stopped_at(min(found)) if found else self._give(self._whole)

    def shown_tokens(self, *, is_last: bool = False) -> list[ShownToken]:
        """Tokens whose characters have all been given out since the last call; at the end, what the text has of each.

        Their bytes, joined, are those of the text. Tokens that it has nothing of are left out.
        """
        shown, done = self._lead + len(self.text), []
        while self._spans and (self._spans[0].end <= shown or (is_last and self._spans[0].start < shown)):
            span = self._spans.popleft()
            # In text that is not stripped every token counts, special ones too.
            if span.end > max(self._lead, span.start) or not self.strip:
                done.append(self._shown(span, shown))
        return done

    def _shown(self, span: _Span, shown: int) -> ShownToken:
        """A token without the characters that are not part of the text."""
        text, data = span.text, span.data
        if span.start < self._lead:
            text = text[self._lead - span.start :]
            data = data[max(0, len(data) - len(text.encode()) - span.pending) :]
        if (over := span.end - shown) > 0 and len(text) >= over:
            data = data[: max(0, len(data) - len(text[len(text) - over :].encode()))]
            text = text[: len(text) - over]
        return ShownToken(span.index, max(0, span.start - self._lead), text, data)

    def _stopped_at(self, place: int) -> str:
        self.stopped = True
        return self._give(self._whole[:place])

    def _give(self, whole: str) -> str:
        if self.strip:
            whole = whole.rstrip()
            if not self.continues and not self.text:
                self._lead = len(self._whole) - len(self._whole.lstrip())
        delta = whole[self._lead + len(self.text) :]
        self.text += delta
        return delta

    def _decode(self, token: int) -> None:
        """The text of all ids, with one more."""
        data = self.tokenizer.token_bytes(token)
        if self._is_start and data:
            data, self._is_start = data.removeprefix(b" "), False
        text, start = self._decoder.decode(data), len(self._whole)
        self._whole += text
        if self.keeps_tokens:
            pending = len(self._decoder.getstate()[0])
            end = len(self._whole) + bool(pending and data)
            self._spans.append(_Span(self._count, start, end, text, data, pending))
        self._count += 1


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

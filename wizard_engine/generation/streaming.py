"""Answers as they come: one conversation at a time, and text that is never taken back."""

import codecs
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.model import Transformer

from .engine import Engine
from .scheduler import Sampling


class Streamer:
    """Continues prompts one token at a time, keeping keys and values of what it has read.

    A prompt that begins like what is in the cache, as the next turn of a conversation does, is read from the page where
    it differs. The ids are those of `generation.generate` for the same prompt as its only row.

    Args:
        cache_tokens: that are kept; default: the model's context.
    Attributes:
        reused: tokens of the last prompt that were there already.
    """

    def __init__(self, model: Transformer, eos_id: int, *, cache_tokens: int | None = None) -> None:
        self.config, self.eos_id, self.reused = model.config, eos_id, 0
        tokens = cache_tokens or model.config.max_positions + 16
        self.engine = Engine(model, cache_tokens=tokens, page_size=16, max_sequences=1)

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
            ValueError: an empty prompt, or no room for it and the new tokens in the context.
        """
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, eos_id=self.eos_id)
        (sequence,) = self.engine.add(prompt, sampling)
        try:
            while sequence.reason is None:
                if self.engine.step():
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
    """The text of an answer as its ids come, up to the first of some stop strings.

    A piece is held back while a later id could change it: half a character, white space that may be the last, the
    beginning of a stop string. All pieces together are the text of the ids' bytes, cut before the stop string, and
    without white space around it where it is stripped.

    Args:
        stop: strings that end the text.   strip: leave white space at its beginning and end out.
        continues: the ids follow a text, so that white space at the beginning stays; otherwise the text is
            `tokenizer.decode(ids)`.   keeps_tokens: have `shown_tokens`.
    Attributes:
        stopped: whether a stop string came.   text: what has been given out.
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
        """The piece that is sure with one more id; "" while nothing is."""
        if self.stopped:
            return ""
        self._decode(token)
        found = [self._whole.find(s, max(0, self._searched - len(s) + 1)) for s in self.stop]
        found = [place for place in found if place >= 0]
        if found:
            return self._stopped_at(min(found))
        ready = self._whole
        self._searched = len(ready)
        held = max((_overlap(ready, s) for s in self.stop), default=0)
        return self._give(ready[: len(ready) - held])

    def end(self) -> str:
        """The last piece, when no more ids come."""
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
        piece = whole[self._lead + len(self.text) :]
        self.text += piece
        return piece

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
    """Pieces of the answer as its ids come; together they are `tokenizer.decode(ids).strip()`."""
    stream = TextStream(tokenizer)
    for token in tokens:
        piece = stream.push(token)
        if piece:
            yield piece
    rest = stream.end()
    if rest:
        yield rest

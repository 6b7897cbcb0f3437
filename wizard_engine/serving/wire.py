"""Answers of the OpenAI-compatible server: state of a request's choices, and their JSON objects."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.streaming import ShownToken

from .driver import Job, Piece

# The API's number for a log-probability of minus infinity, which JSON does not have.
IMPOSSIBLE = -9999.0


@dataclass
class Choice:
    """State of one choice; `shown`: tokens of its text, where log-probabilities are requested."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: str | None = None
    error: str = ""
    ended_by_eos: bool = False
    shown: list[ShownToken] = field(default_factory=list)

    def add(self, piece: Piece, eos_ids: Sequence[int], *, shows_eos: bool = False) -> list[ShownToken]:
        """Add the piece of one step; the tokens that it shows, with `shows_eos` EOS among them."""
        self.text += piece.text
        self.reason, self.error = piece.reason, piece.error
        shown = piece.shown
        if piece.token is not None:
            self.tokens.append(piece.token)
            self.logprobs.append(piece.logprob)
            self.tops.append(piece.top)
            self.ended_by_eos = piece.token in eos_ids
            if self.ended_by_eos and shows_eos:
                shown = [*shown, ShownToken(len(self.tokens) - 1, len(self.text), "", b"")]
        self.shown += shown
        return shown


@dataclass(frozen=True)
class Echo:
    """A prompt as it comes before its completions; `tokens`: those that its text has."""

    text: str
    tokens: list[ShownToken]


@dataclass
class ParsedRequest:
    """A validated request.

    Attributes:
        jobs: one for each prompt.   queue: of (prompt, pieces).   logprobs, stream, usage: whether they are requested.
        number: id of the answer.   echoes: of the prompts, or none.
    """

    kind: Literal["chat", "completion"]
    jobs: list[Job]
    queue: asyncio.Queue
    logprobs: bool
    stream: bool
    usage: bool
    number: str
    echoes: list[Echo] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))

    def choices(self) -> list[Choice]:
        """New choices for all jobs."""
        return [Choice() for job in self.jobs for _ in range(job.n)]

    def job(self, number: int) -> tuple[Job, Echo | None]:
        """The job of a choice, and the echo of its prompt."""
        place = number // self.jobs[0].n
        return self.jobs[place], self.echoes[place] if self.echoes else None

    @property
    def shows_eos(self) -> bool:
        """Whether EOS is among the tokens with log-probabilities: in completions each token of a text is."""
        return self.logprobs and self.kind == "completion"


class AnswerFormat:
    """JSON objects of the API for one model.

    Args:
        name: of the model for clients.   fingerprint: of its weights.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, fingerprint: str) -> None:
        self.tokenizer, self.name, self.fingerprint = tokenizer, name, fingerprint

    def whole(self, parsed: ParsedRequest, choices: Sequence[Choice]) -> bytes:
        """The complete answer as JSON, without streaming."""
        # Each choice by itself: encoding all at once would hold the interpreter for as long as it takes.
        bodies = b",".join(_json(self._choice(parsed, number, choice)) for number, choice in enumerate(choices))
        rest = _json(self.envelope(parsed, []) | {"usage": self.usage(parsed, choices)})
        return rest.replace(b'"choices":[]', b'"choices":[' + bodies + b"]", 1)

    def envelope(self, parsed: ParsedRequest, choices: list[dict]) -> dict[str, Any]:
        """The object around choices or chunks."""
        chat = "chat.completion.chunk" if parsed.stream else "chat.completion"
        return {
            "id": parsed.number,
            "object": chat if parsed.kind == "chat" else "text_completion",
            "created": parsed.created,
            "model": self.name,
            "choices": choices,
            "system_fingerprint": self.fingerprint or None,
        }

    def opening(self, number: int) -> dict[str, Any]:
        """The first chunk of a chat choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def echo(self, parsed: ParsedRequest, number: int) -> dict[str, Any]:
        """The first chunk of a completion behind its prompt."""
        _, echo = parsed.job(number)
        logprobs = self.logprobs(parsed, number, Choice(), [], echoes=True) if parsed.logprobs else None
        return {"index": number, "logprobs": logprobs, "finish_reason": None, "text": echo.text}

    def piece(
        self, parsed: ParsedRequest, number: int, choice: Choice, piece: Piece, shown: Sequence[ShownToken]
    ) -> dict[str, Any]:
        """A further chunk, with the tokens that it shows."""
        logprobs = self.logprobs(parsed, number, choice, shown) if parsed.logprobs else None
        body = {"index": number, "logprobs": logprobs, "finish_reason": piece.reason}
        if parsed.kind == "chat":
            return body | {"delta": {"content": piece.text} if piece.text else {}}
        return body | {"text": piece.text}

    def usage(self, parsed: ParsedRequest, choices: Sequence[Choice]) -> dict[str, Any]:
        """Token counts: each prompt once, all choices with EOS."""
        prompt, new = sum(len(job.prompt) for job in parsed.jobs), sum(len(choice.tokens) for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(job.cached for job in parsed.jobs)},
        }

    def _choice(self, parsed: ParsedRequest, number: int, choice: Choice) -> dict[str, Any]:
        body: dict[str, Any] = {"index": number, "finish_reason": choice.reason, "logprobs": None}
        if parsed.logprobs:
            body["logprobs"] = self.logprobs(parsed, number, choice, choice.shown, echoes=True)
        if parsed.kind == "chat":
            return body | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        _, echo = parsed.job(number)
        return body | {"text": echo.text + choice.text if echo else choice.text}

    def logprobs(
        self, parsed: ParsedRequest, number: int, choice: Choice, shown: Sequence[ShownToken], *, echoes: bool = False
    ) -> dict[str, Any]:
        """Log-probabilities of tokens of a choice; with `echoes`, those of its prompt before them."""
        if parsed.kind == "chat":
            content = [
                _chat_logprob(token.text, token.data, choice.logprobs[token.index])
                | {"top_logprobs": [self._likely(*top) for top in choice.tops[token.index]]}
                for token in shown
            ]
            return {"content": content, "refusal": None}
        job, echo = parsed.job(number)
        entries: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        if echo and echoes:
            entries += self._echoed(job, echo)
        before = len(echo.text) if echo else 0
        for token in shown:
            tops = self._by_text(choice.tops[token.index])
            entries.append((token.text, _finite(choice.logprobs[token.index]), tops, before + token.start))
        texts, values, tops, offsets = zip(*entries) if entries else ((), (), (), ())
        return {
            "tokens": list(texts),
            "token_logprobs": list(values),
            "top_logprobs": list(tops) if any(tops) else None,
            "text_offset": list(offsets),
        }

    def _echoed(self, job: Job, echo: Echo) -> list[tuple[str, float | None, dict[str, float] | None, int]]:
        """Entries of a prompt's tokens. The first has no log-probability: nothing comes before it in the text."""
        logprobs, tops = job.scores or ([], [])
        entries: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        for place, token in enumerate(echo.tokens):
            if place == 0:
                entries.append((token.text, None, None, token.start))
                continue
            top = self._by_text(tops[token.index - 1]) if tops else {}
            entries.append((token.text, _finite(logprobs[token.index - 1]), top, token.start))
        return entries

    def _by_text(self, tops: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by text. Tokens without a text of their own have one that tells them apart."""
        by_text: dict[str, float] = {}
        for token, value in tops:
            data = self.tokenizer.token_bytes(token)
            text = _text(data) if data else self.tokenizer.token_name(token)
            by_text[text if text not in by_text else f"token_id:{token}"] = _finite(value)
        return by_text

    def _likely(self, token: int, value: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token)
        return _chat_logprob(_text(data) if data else self.tokenizer.token_name(token), data, value)


def _text(data: bytes) -> str:
    """The text of a token; of half characters their bytes, as the API writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(value: float) -> float:
    return max(value, IMPOSSIBLE)


def _chat_logprob(text: str, data: bytes, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(value), "bytes": list(data)}


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")

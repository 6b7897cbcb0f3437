"""Answers of the OpenAI-compatible server: state of a request's choices, and their JSON objects."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wizard_engine.data.tokenizer import Tokenizer

from .driver import Job, Piece


@dataclass
class Choice:
    """State of one choice; `shown`: characters of the tokens whose log-probabilities have been sent."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: str | None = None
    ended_by_eos: bool = False
    shown: int = 0

    def add(self, piece: Piece, eos_ids: Sequence[int]) -> None:
        """Add the piece of one step."""
        self.text += piece.text
        self.reason = piece.reason
        if piece.token is not None:
            self.tokens.append(piece.token)
            self.logprobs.append(piece.logprob)
            self.tops.append(piece.top)
            self.ended_by_eos = piece.token in eos_ids


@dataclass
class ParsedRequest:
    """A validated request.

    Attributes:
        jobs: one for each prompt.   queue: of (prompt, pieces).   logprobs, stream, usage: whether they are requested.
        number: id of the answer.
    """

    kind: Literal["chat", "completion"]
    jobs: list[Job]
    queue: asyncio.Queue
    logprobs: bool
    stream: bool
    usage: bool
    number: str
    created: int = field(default_factory=lambda: int(time.time()))

    def choices(self) -> list[Choice]:
        """New choices for all jobs."""
        return [Choice() for job in self.jobs for _ in range(job.n)]


class AnswerFormat:
    """JSON objects of the API for one model.

    Args:
        name: of the model for clients.   fingerprint: of its weights.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, fingerprint: str) -> None:
        self.tokenizer, self.name, self.fingerprint = tokenizer, name, fingerprint

    def whole(self, parsed: ParsedRequest, choices: Sequence[Choice]) -> dict[str, Any]:
        """The complete answer, without streaming."""
        bodies = [self._choice(parsed, number, choice) for number, choice in enumerate(choices)]
        return self.envelope(parsed, bodies) | {"usage": self.usage(parsed, choices)}

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

    def piece(self, parsed: ParsedRequest, number: int, choice: Choice, piece: Piece, first: int) -> dict[str, Any]:
        """A further chunk with the tokens of the choice from `first` on."""
        logprobs = self.logprobs(parsed, choice, first) if parsed.logprobs else None
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
            body["logprobs"] = self.logprobs(parsed, choice, 0)
        if parsed.kind == "chat":
            return body | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return body | {"text": choice.text}

    def logprobs(self, parsed: ParsedRequest, choice: Choice, first: int) -> dict[str, Any]:
        """Log-probabilities of the tokens of a choice from `first` on, without EOS."""
        last = len(choice.tokens) - (1 if choice.ended_by_eos else 0)
        entries = [
            (
                self._token(choice.tokens, i, choice.tokens[i]),
                choice.logprobs[i],
                [(self._token(choice.tokens, i, word), value) for word, value in choice.tops[i]],
            )
            for i in range(first, last)
        ]
        if parsed.kind == "chat":
            return {
                "content": [
                    _chat_logprob(text, value) | {"top_logprobs": [_chat_logprob(*top) for top in tops]}
                    for text, value, tops in entries
                ],
                "refusal": None,
            }
        texts = [text for text, _, _ in entries]
        offsets = [choice.shown + sum(map(len, texts[:i])) for i in range(len(texts))]
        choice.shown += sum(map(len, texts))
        return {
            "tokens": texts,
            "token_logprobs": [value for _, value, _ in entries],
            "top_logprobs": [dict(tops) for _, _, tops in entries] if any(tops for _, _, tops in entries) else None,
            "text_offset": offsets,
        }

    def _token(self, tokens: Sequence[int], place: int, word: int) -> str:
        """The text of one token after its predecessor."""
        before = list(tokens[max(0, place - 1) : place])
        return self.tokenizer.decode([*before, word])[len(self.tokenizer.decode(before)) :]


def _chat_logprob(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode(errors="replace"))}

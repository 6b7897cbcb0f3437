"""Requests of the OpenAI-compatible server: the body read within its limits, and the jobs that its fields ask for."""

import asyncio
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from wizard_engine.data.chat import encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.engine import Engine
from wizard_engine.generation.scheduler import Sampling

from .driver import Job, Piece
from .protocol import RequestError, wrong
from .wire import ParsedRequest

CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True)
class Limits:
    """Limits of requests and of the time that clients may take.

    Attributes:
        new_tokens: longest choice, and the default length of a chat answer.   choices: most choices of a request.
        body_bytes: largest body.   read_seconds: for a whole body.   write_seconds: for one chunk of an answer.
    """

    new_tokens: int
    choices: int = 64
    body_bytes: int = 4 * 2**20
    read_seconds: float = 30.0
    write_seconds: float = 30.0


class RequestReader:
    """Turns HTTP requests into jobs.

    Args:
        engine: its context limits the default length of an answer.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, limits: Limits) -> None:
        self.engine, self.tokenizer, self.limits = engine, tokenizer, limits

    async def body(self, request: Request) -> Any:
        """The request's JSON.

        Raises:
            RequestError: too long (413), too slow (408), or not JSON (400).
        """
        limit, body = self.limits.body_bytes, bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise RequestError(
                            413, f"body: expected at most {limit} bytes, got more", code="body_too_large"
                        )
        except TimeoutError:
            raise RequestError(408, f"body: expected within {self.limits.read_seconds:g} seconds") from None
        except ClientDisconnect:
            raise RequestError(CLIENT_CLOSED_REQUEST, "body: the client left before its end") from None
        try:
            return json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"body: expected JSON, got {str(error)[:200]}", code="invalid_json") from None

    def jobs(self, fields: dict[str, Any], kind: str, loop: asyncio.AbstractEventLoop) -> ParsedRequest:
        """The jobs of a request whose fields have been checked.

        Raises:
            RequestError: a prompt that cannot be encoded, or too many choices (400).
        """
        try:
            prompts = [self._chat_prompt(fields["messages"])] if kind == "chat" else self._prompts(fields["prompt"])
        except (ValueError, UnicodeError) as error:
            raise RequestError(400, str(error)[:500], param="messages" if kind == "chat" else "prompt") from None
        n = int(fields.get("n", 1))
        if n * len(prompts) > self.limits.choices:
            raise wrong("n", f"at most {self.limits.choices} choices over {len(prompts)} prompts", n)
        logprobs = fields.get("logprobs", "top_logprobs" in fields if kind == "chat" else None)
        tops = int(fields.get("top_logprobs", 0) if kind == "chat" else logprobs or 0) if logprobs else 0
        seed = int(fields["seed"]) if "seed" in fields else secrets.randbits(63)
        stop = fields.get("stop", ())
        queue: asyncio.Queue = asyncio.Queue()
        jobs = []
        for place, prompt in enumerate(prompts):
            sampling = Sampling(
                self._new_tokens(fields, kind, len(prompt)),
                float(fields.get("temperature", 1.0)),
                int(fields["top_k"]) if fields.get("top_k") else None,
                float(fields.get("top_p", 1.0)),
                seed=seed,
                row=place * n,
                eos_ids=self.tokenizer.eos_ids,
                top_logprobs=tops,
            )

            def deliver(pieces: list[Piece], place: int = place) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (place, pieces))

            stops = (stop,) if isinstance(stop, str) else tuple(stop)
            jobs.append(Job(prompt, sampling, n, deliver, stops, strip=kind == "chat"))
        options = fields.get("stream_options") or {}
        parsed = ParsedRequest(
            kind,
            jobs,
            queue,
            logprobs not in (False, None),
            bool(fields.get("stream")),
            bool(options.get("include_usage")),
            ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12),
        )
        return parsed

    def _chat_prompt(self, messages: Sequence[dict]) -> list[int]:
        turns = []
        for message in messages:
            content = message["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            role = "system" if message["role"] == "developer" else message["role"]
            turns.append(Message(role, text))
        return encode_prompt(self.tokenizer, turns)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Token ids of a completion's prompts: texts are encoded behind a BOS, ids stay as they are."""
        if isinstance(prompt, str) or isinstance(prompt[0], (int, float)):
            prompt = [prompt]
        return [
            [self.tokenizer.bos_id, *self.tokenizer.encode(item)] if isinstance(item, str) else [int(x) for x in item]
            for item in prompt
        ]

    def _new_tokens(self, fields: dict[str, Any], kind: str, prompt_tokens: int) -> int:
        """The requested length of an answer; by default the limit or the room left in the context."""
        requested = fields.get("max_completion_tokens", fields.get("max_tokens"))
        if requested is not None:
            return int(requested)
        room = self.engine.scheduler.max_length - prompt_tokens
        return max(1, min(self.limits.new_tokens if kind == "chat" else 16, room))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")

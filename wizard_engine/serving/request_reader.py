"""Requests of the OpenAI-compatible server: the body read within its limits, and the jobs that its fields ask for."""

import asyncio
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.engine import Engine
from wizard_engine.generation.scheduler import Sampling
from wizard_engine.generation.streaming import TextStream

from .conversation import encode_request, turns
from .driver import Job, Piece
from .protocol import Field, RequestError, checked, wrong
from .status import unknown_model
from .wire import Echo, ParsedRequest

CLIENT_CLOSED_REQUEST = 499
# Commas, brackets and quotes of a body: parsing more of them keeps all other threads waiting.
MOST_VALUES = 2**17
# Characters of a long text that are encoded at once, and tokens by which a cut may exceed the whole.
ENCODED_AT_ONCE, CUT_TOKENS = 2**14, 16


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
        engine: its context limits the default length of an answer.   name: of the model that requests must name.
        chat, completion: fields of the two kinds of request.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        name: str,
        chat: Mapping[str, Field],
        completion: Mapping[str, Field],
    ) -> None:
        self.engine, self.tokenizer, self.limits, self.name = engine, tokenizer, limits, name
        self.fields = {"chat": chat, "completion": completion}

    async def body(self, request: Request) -> bytearray:
        """The request's body.

        Raises:
            RequestError: too long (413), or too slow (408).
        """
        limit, body = self.limits.body_bytes, bytearray()
        too_large = RequestError(413, f"body: expected at most {limit} bytes, got more", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            raise too_large
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RequestError(408, f"body: expected within {self.limits.read_seconds:g} seconds") from None
        except ClientDisconnect:
            raise RequestError(CLIENT_CLOSED_REQUEST, "body: the client left before its end") from None
        return body

    def parse(self, body: bytearray, kind: str, loop: asyncio.AbstractEventLoop) -> ParsedRequest:
        """The jobs of a request.

        Raises:
            RequestError: a body that is not JSON, fields that do not fit, a prompt that cannot be encoded, too many
                choices (400), another model (404), too many values (413).
        """
        fields = checked(read_json(body), self.fields[kind])
        if fields["model"] != self.name:
            raise unknown_model(self.name, fields["model"])
        try:
            return self._parsed(fields, kind, loop)
        except (ValueError, UnicodeError) as error:
            raise RequestError(400, str(error)[:500], param="messages" if kind == "chat" else "prompt") from None

    def _parsed(self, fields: dict[str, Any], kind: str, loop: asyncio.AbstractEventLoop) -> ParsedRequest:
        texts_before = False
        if kind == "chat":
            turns_of = turns(fields["messages"], joins=self.tokenizer.chat_format.is_vicuna)
            self._check_length([turn.content for turn in turns_of])
            ids, texts_before = encode_request(self.tokenizer, turns_of)
            prompts = [ids]
        else:
            prompts = self._prompts(fields["prompt"])
        n = int(fields.get("n", 1))
        if n * len(prompts) > self.limits.choices:
            raise wrong("n", f"at most {self.limits.choices} choices over {len(prompts)} prompts", n)
        if fields.get("best_of", n) not in (1, n):
            raise wrong("best_of", f"1 or n, which is {n}; all choices are returned", fields["best_of"])
        has_logprobs, tops = _logprobs(fields, kind)
        echoes = self._echoes(fields, prompts) if kind == "completion" and fields.get("echo") else []
        queue: asyncio.Queue = asyncio.Queue()
        how = {
            "stop": tuple(_listed(fields.get("stop", ()))),
            "strip": kind == "chat",
            "keeps_tokens": has_logprobs,
            "score": tops if echoes and has_logprobs else None,
            "generates": fields.get("max_tokens") != 0 or kind == "chat",
        }
        jobs = []
        seed = int(fields["seed"]) if "seed" in fields else secrets.randbits(63)
        for place, prompt in enumerate(prompts):
            sampling = self._sampling(fields, kind, len(prompt), seed=seed, row=place * n, top_logprobs=tops)

            def deliver(pieces: list[Piece], place: int = place) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (place, pieces))

            continues = texts_before if kind == "chat" else any(map(self.tokenizer.token_bytes, prompt))
            jobs.append(Job(prompt, sampling, n, deliver, continues=continues, **how))
        options = fields.get("stream_options") or {}
        number = ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12)
        stream, usage = bool(fields.get("stream")), bool(options.get("include_usage"))
        return ParsedRequest(kind, jobs, queue, has_logprobs, stream, usage, number, echoes)

    def _sampling(self, fields: dict[str, Any], kind: str, prompt_tokens: int, **more: int) -> Sampling:
        """How a prompt is continued."""
        top_k = int(fields.get("top_k", 0))
        return Sampling(
            self._new_tokens(fields, kind, prompt_tokens),
            float(fields.get("temperature", 1.0)),
            top_k if top_k > 0 else None,
            float(fields.get("top_p", 1.0)),
            eos_ids=self.tokenizer.eos_ids,
            frequency_penalty=float(fields.get("frequency_penalty", 0.0)),
            presence_penalty=float(fields.get("presence_penalty", 0.0)),
            logit_bias=self._logit_bias(fields.get("logit_bias", {})),
            **more,
        )

    def _logit_bias(self, biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
        last = self.engine.config.vocab_size - 1
        for token in biases:
            is_id = token.isascii() and token.isdigit() and len(token) < 10 and str(int(token)) == token
            if not is_id or int(token) > last:
                raise wrong("logit_bias", f"token ids 0 to {last} as names", token)
        return tuple((int(token), float(bias)) for token, bias in biases.items() if bias)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Token ids of a completion's prompts: texts are encoded behind a BOS, ids stay as they are."""
        if isinstance(prompt, str) or isinstance(prompt[0], (int, float)):
            prompt = [prompt]
        for item in prompt:
            if isinstance(item, str):
                self._check_length([item])
        return [
            [self.tokenizer.bos_id, *self.tokenizer.encode(item)] if isinstance(item, str) else [int(x) for x in item]
            for item in prompt
        ]

    def _check_length(self, texts: Sequence[str]) -> None:
        """Refuse texts that are far too long before all of them are encoded.

        Raises:
            RequestError: surely more tokens than the context has.
        """
        most = self.engine.scheduler.max_length
        if sum(map(len, texts)) <= max(ENCODED_AT_ONCE, most):
            return
        tokens = 0
        for text in texts:
            for start in range(0, len(text), ENCODED_AT_ONCE):
                # A text that is cut may have some tokens more than the whole.
                tokens += max(0, len(self.tokenizer.encode(text[start : start + ENCODED_AT_ONCE])) - CUT_TOKENS)
                if tokens > most:
                    raise RequestError(
                        400,
                        f"prompt: expected at most {most} tokens, got {tokens} and more",
                        param="prompt",
                        code="context_length_exceeded",
                    )

    def _echoes(self, fields: dict[str, Any], prompts: Sequence[list[int]]) -> list[Echo]:
        """The prompts as texts, without the BOS that the server put before a text."""
        prompt = fields["prompt"]
        is_text = isinstance(prompt, str) or isinstance(prompt[0], str)
        echoes = []
        for ids in prompts:
            stream = TextStream(self.tokenizer, strip=False, keeps_tokens=True)
            for token in ids:
                stream.push(token)
            stream.end()
            echoes.append(Echo(stream.text, stream.shown_tokens(is_last=True)[1 if is_text else 0 :]))
        return echoes

    def _new_tokens(self, fields: dict[str, Any], kind: str, prompt_tokens: int) -> int:
        """The requested length of an answer; by default the limit or the room left in the context."""
        requested = fields.get("max_completion_tokens", fields.get("max_tokens"))
        if requested is not None:
            # A prompt that is only scored needs a room of one, too.
            return max(1, int(requested))
        room = self.engine.scheduler.max_length - prompt_tokens
        return max(1, min(self.limits.new_tokens if kind == "chat" else 16, room))


def read_json(body: bytearray) -> Any:
    """The JSON of a body.

    Raises:
        RequestError: 400, or 413 for more values than any request needs, which are not parsed.
    """
    values = sum(map(body.count, (b",", b"[", b"{", b'"')))
    if values > MOST_VALUES:
        raise RequestError(
            413,
            f"body: expected at most {MOST_VALUES} commas, brackets and quotes, got {values}",
            code="body_too_large",
        )
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"body: expected JSON, got {str(error)[:200]}", code="invalid_json") from None


def _logprobs(fields: dict[str, Any], kind: str) -> tuple[bool, int]:
    """Whether log-probabilities are requested, and of how many likeliest tokens."""
    logprobs = fields.get("logprobs")
    if kind == "chat":
        has_logprobs = logprobs if logprobs is not None else "top_logprobs" in fields
        return bool(has_logprobs), int(fields.get("top_logprobs", 0)) if has_logprobs else 0
    has_logprobs = logprobs is not None and logprobs is not False
    return has_logprobs, int(logprobs or 0)


def _listed(stop: str | Sequence[str]) -> Sequence[str]:
    return (stop,) if isinstance(stop, str) else stop


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")

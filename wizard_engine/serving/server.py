"""An OpenAI-compatible HTTP server over the driver: chat, completions, models, health, metrics, their schema."""

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from wizard_engine.data.chat import encode_prompt
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.scheduler import Sampling

from .driver import Driver, Full, Job, Piece
from .metrics import Metrics
from .openapi import description
from .protocol import Refused, chat_fields, checked, completion_fields, wrong
from .wire import AnswerFormat, Asked

GONE = "gone"
CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True)
class Limits:
    """What clients may ask for, and for how long they may keep the server waiting.

    Attributes:
        new_tokens: most of a choice, and of a chat that does not say.   choices: of a request.
        body_bytes: of a request.   read_seconds: for a whole body.   write_seconds: for a piece of an answer.
    """

    new_tokens: int
    choices: int = 64
    body_bytes: int = 4 * 2**20
    read_seconds: float = 30.0
    write_seconds: float = 30.0


class Server:
    """Answers HTTP requests with a driver's engine.

    Args:
        name: of the model, as clients know it.   fingerprint: of its weights.   api_key: that clients must send; None:
            they need none.   context: tokens of prompt and answer.
    """

    def __init__(
        self, driver: Driver, tokenizer: Tokenizer, limits: Limits, *, name: str, context: int, fingerprint: str = "",
        api_key: str | None = None,
    ) -> None:  # fmt: skip
        self.driver, self.tokenizer, self.limits = driver, tokenizer, limits
        self.name, self.context, self.api_key = name, context, api_key
        self.format = AnswerFormat(tokenizer, name, fingerprint)
        self.started, self.metrics = int(time.time()), Metrics()
        self.chat_fields = chat_fields(limits.new_tokens, limits.choices)
        words = driver.engine.config.vocab_size
        self.completion_fields = completion_fields(limits.new_tokens, limits.choices, words)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            ("/v1/chat/completions", self.chat, "POST"), ("/v1/completions", self.completions, "POST"),
            ("/v1/models", self.models, "GET"), ("/v1/models/{model:path}", self.model, "GET"),
            ("/health", self.health, "GET"), ("/metrics", self.show_metrics, "GET"),
            ("/openapi.json", self.schema, "GET"),
        ]  # fmt: skip
        handlers = {404: self._no_route, 405: self._no_route, 500: self._failed}
        return Starlette(
            routes=[Route(path, self._counted(path, call), methods=[method]) for path, call, method in routes],
            exception_handlers=handlers,
        )

    # Around every request

    def _counted(self, path: str, call: Callable[[Request], Awaitable[Response]]):
        async def handler(request: Request) -> Response:
            began = time.perf_counter()
            try:
                if path not in ("/health", "/openapi.json"):
                    self._authorise(request)
                response = await call(request)
            except Refused as refused:
                response = JSONResponse(refused.body(), refused.status, refused.headers)
            self.metrics.count("requests", route=path, status=str(response.status_code))
            if not isinstance(response, Events):
                self.metrics.observe("request_seconds", time.perf_counter() - began)
            return response

        return handler

    def _authorise(self, request: Request) -> None:
        if self.api_key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise Refused(
                401, "authorization: expected `Bearer KEY` with the server's key", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _no_route(self, request: Request, error: Any) -> Response:
        what = "no such path" if error.status_code == 404 else f"{request.method} is not what this path takes"
        self.metrics.count("requests", route="(none)", status=str(error.status_code))
        refused = Refused(error.status_code, f"{request.url.path[:200]}: {what}", headers=error.headers)
        return JSONResponse(refused.body(), refused.status, refused.headers)

    async def _failed(self, request: Request, error: Exception) -> Response:
        return JSONResponse(Refused(500, "the server failed; its log says why").body(), 500)

    # Small answers

    async def models(self, request: Request) -> Response:
        """The model served, as a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model served, by its name."""
        if request.path_params["model"] != self.name:
            raise self._unknown_model(request.path_params["model"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self.started, "owned_by": "wizard-engine",
            "max_model_len": self.context,
        }  # fmt: skip

    def _unknown_model(self, name: str) -> Refused:
        return Refused(404, f"model: expected {self.name!r}, got {name[:200]!r}", param="model", code="model_not_found")

    async def health(self, request: Request) -> Response:
        """Whether the engine works."""
        if self.driver.error:
            return JSONResponse({"status": "failed", "error": self.driver.error}, 503)
        return JSONResponse({"status": "ok", "open": self.driver.open})

    async def show_metrics(self, request: Request) -> Response:
        """Numbers for Prometheus."""
        engine = self.driver.engine
        gauges = {
            "sequences_open": self.driver.open, "sequences_running": len(engine.scheduler.running),
            "pages": engine.pages, "pages_free": engine.pool.free,
        }  # fmt: skip
        totals = {
            "steps_total": self.driver.steps, "step_seconds_total": self.driver.step_seconds,
            "preemptions_total": engine.scheduler.preemptions, "tokens_drawn_total": engine.generated,
            "graph_captures_total": engine.captures,
        }  # fmt: skip
        return PlainTextResponse(self.metrics.text(gauges, totals), media_type="text/plain; version=0.0.4")

    async def schema(self, request: Request) -> Response:
        """The OpenAPI description."""
        known = {"model": self.name, "needs_key": self.api_key is not None}
        return JSONResponse(description(self.chat_fields, self.completion_fields, **known))

    # Completions

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, "chat")

    async def completions(self, request: Request) -> Response:
        """Continue texts or ids."""
        return await self._answer(request, "completion")

    async def _answer(self, request: Request, kind: str) -> Response:
        body = await self._body(request)
        fields = checked(body, self.chat_fields if kind == "chat" else self.completion_fields)
        if fields["model"] != self.name:
            raise self._unknown_model(fields["model"])
        asked = await asyncio.to_thread(self._understood, fields, kind, asyncio.get_running_loop())
        self._submit(asked)
        self.metrics.add("prompt_tokens", sum(len(job.prompt) for job in asked.jobs))
        began = time.perf_counter()
        pieces = self._pieces(asked, request.receive, began)
        if asked.stream:
            return Events(self._events(asked, pieces), self.limits.write_seconds, lambda: self._cancel(asked))
        try:
            return await self._whole(asked, pieces)
        finally:
            self._cancel(asked)

    async def _body(self, request: Request) -> Any:
        """The request's JSON.

        Raises:
            Refused: it is too long (413), too slow (408), or no JSON (400).
        """
        limit, body = self.limits.body_bytes, bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise Refused(413, f"body: expected at most {limit} bytes, got more", code="body_too_large")
        except TimeoutError:
            raise Refused(408, f"body: expected within {self.limits.read_seconds:g} seconds") from None
        except ClientDisconnect:
            raise Refused(CLIENT_CLOSED_REQUEST, "body: the client left before its end") from None
        try:
            return json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"body: expected JSON, got {str(error)[:200]}", code="invalid_json") from None

    def _understood(self, fields: dict[str, Any], kind: str, loop: asyncio.AbstractEventLoop) -> Asked:
        """Jobs of a request whose fields fit."""
        try:
            prompts = [self._chat_prompt(fields["messages"])] if kind == "chat" else self._prompts(fields["prompt"])
        except (ValueError, UnicodeError) as error:
            raise Refused(400, str(error)[:500], param="messages" if kind == "chat" else "prompt") from None
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
                self._new_tokens(fields, kind, len(prompt)), float(fields.get("temperature", 1.0)),
                int(fields["top_k"]) if fields.get("top_k") else None, float(fields.get("top_p", 1.0)), seed=seed,
                row=place * n, eos_id=self.tokenizer.eos_id, top_logprobs=tops,
            )  # fmt: skip

            def deliver(pieces: list[Piece], place: int = place) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (place, pieces))

            stops = (stop,) if isinstance(stop, str) else tuple(stop)
            jobs.append(Job(prompt, sampling, n, deliver, stops, strip=kind == "chat"))
        options = fields.get("stream_options") or {}
        asked = Asked(
            kind, jobs, queue, logprobs not in (False, None), bool(fields.get("stream")),
            bool(options.get("include_usage")), ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12),
        )  # fmt: skip
        return asked

    def _chat_prompt(self, messages: Sequence[dict]) -> list[int]:
        turns = []
        for message in messages:
            content = message["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            role = "system" if message["role"] == "developer" else message["role"]
            turns.append(Message(role, text))
        return encode_prompt(self.tokenizer, turns)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Token ids of a completion's prompts; texts get a BOS in front, ids are taken as they are."""
        if isinstance(prompt, str) or isinstance(prompt[0], (int, float)):
            prompt = [prompt]
        return [
            [self.tokenizer.bos_id, *self.tokenizer.encode(item)] if isinstance(item, str) else [int(x) for x in item]
            for item in prompt
        ]

    def _new_tokens(self, fields: dict[str, Any], kind: str, prompt_tokens: int) -> int:
        """What was asked for, or what there is room for."""
        requested = fields.get("max_completion_tokens", fields.get("max_tokens"))
        if requested is not None:
            return int(requested)
        room = self.driver.engine.scheduler.max_length - prompt_tokens
        return max(1, min(self.limits.new_tokens if kind == "chat" else 16, room))

    def _submit(self, asked: Asked) -> None:
        """Hand all jobs over, or none."""
        done = []
        try:
            for job in asked.jobs:
                self.driver.submit(job)
                done.append(job)
        except ValueError as error:
            code = "context_length_exceeded" if "expected 1 to" in str(error) else None
            param = "messages" if asked.kind == "chat" else "prompt"
            raise Refused(400, str(error), param=param, code=code) from None
        except Full as full:
            if self.driver.error:
                raise Refused(503, "the engine has failed", code="engine_failed") from None
            status = 503 if "about to end" in str(full) else 429
            raise Refused(
                status, f"too many requests: {full}", code="queue_full", headers={"Retry-After": "1"}
            ) from None
        finally:
            if len(done) < len(asked.jobs):
                for job in done:
                    self.driver.cancel(job)

    def _cancel(self, asked: Asked) -> None:
        for job in asked.jobs:
            if job.open:
                self.driver.cancel(job)

    async def _pieces(self, asked: Asked, receive: Callable, began: float) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece) as they come, until all choices have ended; ClientDisconnect where nobody waits any more."""

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            asked.queue.put_nowait(GONE)

        listener = asyncio.create_task(listen())
        open_choices = sum(job.n for job in asked.jobs)
        is_first = True
        try:
            while open_choices:
                item = await asked.queue.get()
                if item == GONE:
                    self.metrics.count("disconnects")
                    raise ClientDisconnect
                place, pieces = item
                if is_first:
                    self.metrics.observe("first_token_seconds", time.perf_counter() - began)
                    is_first = False
                for piece in pieces:
                    self.metrics.add("generated_tokens", piece.token is not None)
                    open_choices -= piece.reason is not None
                    yield place * asked.jobs[place].n + piece.choice, piece
        finally:
            listener.cancel()
            if asked.stream:
                self.metrics.observe("request_seconds", time.perf_counter() - began)

    async def _whole(self, asked: Asked, pieces: AsyncIterator[tuple[int, Piece]]) -> Response:
        choices = asked.choices()
        try:
            async for number, piece in pieces:
                choices[number].take(piece, self.tokenizer.eos_id)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if any(choice.reason == "cancelled" for choice in choices):
            raise Refused(503, "the engine has failed", code="engine_failed")
        return JSONResponse(self.format.whole(asked, choices))

    async def _events(self, asked: Asked, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
        """Server-sent events of a request."""
        choices, form = asked.choices(), self.format
        extra = {"usage": None} if asked.usage else {}

        def event(deltas: list[dict], **more: Any) -> str:
            return f"data: {json.dumps(form.envelope(asked, deltas) | extra | more, ensure_ascii=False)}\n\n"

        if asked.kind == "chat":
            for number in range(len(choices)):
                yield event([form.opening(number)])
        async for number, piece in pieces:
            choice = choices[number]
            first = len(choice.tokens)
            choice.take(piece, self.tokenizer.eos_id)
            if piece.reason == "cancelled":
                yield f"data: {json.dumps(Refused(503, 'the engine has failed').body())}\n\n"
                return
            if piece.text or asked.logprobs or piece.reason:
                yield event([form.piece(asked, number, choice, piece, first)])
        if asked.usage:
            yield event([], usage=form.usage(asked, choices))
        yield "data: [DONE]\n\n"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Events(Response):
    """Server-sent events; a client that does not read them in time, or goes away, ends them.

    Args:
        events: each one as it is sent.   write_seconds: for one.   done: called at the end, whatever it is.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], write_seconds: float, done: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.write_seconds, self.done = events, write_seconds, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self.events:
                message = {"type": "http.response.body", "body": event.encode(errors="replace"), "more_body": True}
                await asyncio.wait_for(send(message), self.write_seconds)
            await asyncio.wait_for(send({"type": "http.response.body", "body": b""}), self.write_seconds)
        except (ClientDisconnect, TimeoutError, OSError):
            # Nothing can be said to this client any more.
            pass
        finally:
            self.done()
            with contextlib.suppress(RuntimeError):
                await self.events.aclose()  # type: ignore[attr-defined]

"""An OpenAI-compatible HTTP server over the driver: routes, keys, and the order of the steps of an answer."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from wizard_engine.data.tokenizer import Tokenizer

from .answers import Answers, Events
from .driver import Driver
from .guard import Access, Guard, json_response
from .metrics import Metrics
from .protocol import RequestError, chat_fields, completion_fields
from .request_reader import Limits, RequestReader
from .status import StatusPages
from .wire import AnswerFormat

# Bytes of a body that takes milliseconds to parse.
LARGE_BODY = 2**16


class Server:
    """Answers HTTP requests with a driver's engine.

    Args:
        name: the model's name for clients.   fingerprint: of its weights.   api_key: the key that clients must send;
            None: no key.   context: most tokens of prompt and answer together.   access: who may call.
    Raises:
        ValueError: a key that is blank, or that no header can have.
    """

    def __init__(
        self,
        driver: Driver,
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        name: str,
        context: int,
        fingerprint: str = "",
        api_key: str | None = None,
        access: Access | None = None,
    ) -> None:
        self.driver, self.limits, self.access = driver, limits, access or Access()
        self.api_key = None if api_key is None else checked_key(api_key).encode()
        self.metrics = Metrics()
        # Two threads: with more, the event loop would wait for the interpreter behind all of them.
        self.workers = ThreadPoolExecutor(2, "requests")
        # Large bodies take turns, so that the other thread is free for small ones.
        self.large_body = asyncio.Semaphore(1)
        self.chat_fields = chat_fields(limits.new_tokens, limits.choices)
        vocab_size = driver.engine.config.vocab_size
        self.completion_fields = completion_fields(limits.new_tokens, limits.choices, vocab_size, context)
        fields = {"chat": self.chat_fields, "completion": self.completion_fields}
        self.reader = RequestReader(driver.engine, tokenizer, limits, name=name, **fields)
        self.answers = Answers(driver, AnswerFormat(tokenizer, name, fingerprint), self.metrics, self.workers)
        self.status = StatusPages(
            driver,
            self.metrics,
            self.chat_fields,
            self.completion_fields,
            name=name,
            context=context,
            needs_key=api_key is not None,
        )

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/models", self.status.models, "GET"),
            ("/v1/models/{model:path}", self.status.model, "GET"),
            ("/health", self.status.health, "GET"),
            ("/metrics", self.status.show_metrics, "GET"),
            ("/openapi.json", self.status.schema, "GET"),
        ]
        middleware = [Middleware(Guard, self.access, self.metrics)]
        if self.access.origins:
            allowed = {"allow_methods": ("GET", "POST"), "allow_headers": ("*",)}
            middleware.insert(0, Middleware(CORSMiddleware, allow_origins=self.access.origins, **allowed))
        handlers = {404: self._no_route, 405: self._no_route, 500: self._failed}
        return Starlette(
            routes=[Route(path, self._counted(path, call), methods=[method]) for path, call, method in routes],
            exception_handlers=handlers,
            middleware=middleware,
        )

    # Around every request

    def _counted(self, path: str, call: Callable[[Request], Awaitable[Response]]):
        async def handler(request: Request) -> Response:
            began = time.perf_counter()
            try:
                if path not in ("/health", "/openapi.json"):
                    self._authorise(request)
                response = await call(request)
            except RequestError as refused:
                response = json_response(refused.body(), refused.status, refused.headers)
            self.metrics.count("requests", route=path, status=str(response.status_code))
            if not isinstance(response, Events):
                self.metrics.observe("request_seconds", time.perf_counter() - began)
            return response

        return handler

    def _authorise(self, request: Request) -> None:
        if self.api_key is None:
            return
        # Starlette reads headers as Latin-1: these are the bytes that were sent.
        kind, _, key = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key):
            raise RequestError(
                401,
                "authorization: expected `Bearer KEY` with the server's key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _no_route(self, request: Request, error: Any) -> Response:
        what = "no such path" if error.status_code == 404 else f"{request.method[:40]} is not what this path takes"
        self.metrics.count("requests", route="(none)", status=str(error.status_code))
        refused = RequestError(error.status_code, f"{request.url.path[:200]}: {what}", headers=error.headers)
        return json_response(refused.body(), refused.status, refused.headers)

    async def _failed(self, request: Request, error: Exception) -> Response:
        self.metrics.count("requests", route=request.url.path[:80], status="500")
        # uvicorn closes the connection after an exception; a client that is not told would use it again.
        headers = {"Connection": "close"}
        return json_response(RequestError(500, "the server failed; its log says why").body(), 500, headers)

    # Completions

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, "chat")

    async def completions(self, request: Request) -> Response:
        """Continue texts or ids."""
        return await self._answer(request, "completion")

    async def _answer(self, request: Request, kind: str) -> Response:
        body, loop = await self.reader.body(request), asyncio.get_running_loop()
        async with self.large_body if len(body) > LARGE_BODY else contextlib.nullcontext():
            parsed = await loop.run_in_executor(self.workers, self.reader.parse, body, kind, loop)
        self.answers.submit(parsed)
        self.metrics.add("prompt_tokens", sum(len(job.prompt) for job in parsed.jobs))
        began = time.perf_counter()
        pieces = self.answers.pieces(parsed, request.receive, began)
        if parsed.stream:
            return Events(
                self.answers.events(parsed, pieces), self.limits.write_seconds, lambda: self.answers.cancel(parsed)
            )
        try:
            return await self.answers.whole(parsed, pieces)
        finally:
            self.answers.cancel(parsed)


def checked_key(key: str) -> str:
    """The key, if clients can send it.

    Raises:
        ValueError: it is blank, or has characters that a header cannot have.
    """
    if not key.strip() or key != key.strip() or not key.isprintable():
        raise ValueError(
            "api key: expected visible characters without spaces around them, got a blank or other one; set another "
            "key, or none"
        )
    return key

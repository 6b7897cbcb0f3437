"""An OpenAI-compatible HTTP server over the driver: routes, keys, and the order of the steps of an answer."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from wizard_engine.data.tokenizer import Tokenizer

from .answers import Answers, Events
from .driver import Driver
from .metrics import Metrics
from .protocol import RequestError, chat_fields, checked, completion_fields
from .request_reader import Limits, RequestReader
from .status import StatusPages, unknown_model
from .wire import AnswerFormat


class Server:
    """Answers HTTP requests with a driver's engine.

    Args:
        name: the model's name for clients.   fingerprint: of its weights.   api_key: the key that clients must send;
            None: no key.   context: most tokens of prompt and answer together.
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
    ) -> None:
        self.driver, self.limits = driver, limits
        self.name, self.api_key = name, api_key
        self.metrics = Metrics()
        self.reader = RequestReader(driver.engine, tokenizer, limits)
        self.answers = Answers(driver, AnswerFormat(tokenizer, name, fingerprint), self.metrics)
        self.chat_fields = chat_fields(limits.new_tokens, limits.choices)
        vocab_size = driver.engine.config.vocab_size
        self.completion_fields = completion_fields(limits.new_tokens, limits.choices, vocab_size)
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
            except RequestError as refused:
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
            raise RequestError(
                401,
                "authorization: expected `Bearer KEY` with the server's key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _no_route(self, request: Request, error: Any) -> Response:
        what = "no such path" if error.status_code == 404 else f"{request.method} is not what this path takes"
        self.metrics.count("requests", route="(none)", status=str(error.status_code))
        refused = RequestError(error.status_code, f"{request.url.path[:200]}: {what}", headers=error.headers)
        return JSONResponse(refused.body(), refused.status, refused.headers)

    async def _failed(self, request: Request, error: Exception) -> Response:
        return JSONResponse(RequestError(500, "the server failed; its log says why").body(), 500)

    # Completions

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, "chat")

    async def completions(self, request: Request) -> Response:
        """Continue texts or ids."""
        return await self._answer(request, "completion")

    async def _answer(self, request: Request, kind: str) -> Response:
        body = await self.reader.body(request)
        fields = checked(body, self.chat_fields if kind == "chat" else self.completion_fields)
        if fields["model"] != self.name:
            raise unknown_model(self.name, fields["model"])
        parsed = await asyncio.to_thread(self.reader.jobs, fields, kind, asyncio.get_running_loop())
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

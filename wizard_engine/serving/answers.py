"""Answers of the OpenAI-compatible server: jobs submitted to the driver, their pieces as one object or as a stream."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from .driver import Driver, Piece, QueueFull
from .metrics import Metrics
from .protocol import RequestError
from .request_reader import CLIENT_CLOSED_REQUEST
from .wire import AnswerFormat, ParsedRequest

GONE = "gone"


class Answers:
    """Submits the jobs of requests to a driver and formats their pieces.

    Args:
        workers: threads that format long answers.
    """

    def __init__(self, driver: Driver, format: AnswerFormat, metrics: Metrics, workers: Executor) -> None:
        self.driver, self.format, self.metrics, self.workers = driver, format, metrics, workers
        self.eos_ids = driver.tokenizer.eos_ids

    def submit(self, parsed: ParsedRequest) -> None:
        """Submit all jobs of a request, or none.

        Raises:
            RequestError: the context is too short (400), the queue is full (429), the driver stops or has failed (503).
        """
        done = []
        try:
            for job in parsed.jobs:
                self.driver.submit(job)
                done.append(job)
        except ValueError as error:
            code = "context_length_exceeded" if "expected 1 to" in str(error) else None
            param = "messages" if parsed.kind == "chat" else "prompt"
            raise RequestError(400, str(error), param=param, code=code) from None
        except QueueFull as full:
            if self.driver.error:
                raise RequestError(503, "the engine has failed", code="engine_failed") from None
            status = 503 if "about to end" in str(full) else 429
            raise RequestError(
                status, f"too many requests: {full}", code="queue_full", headers={"Retry-After": "1"}
            ) from None
        finally:
            if len(done) < len(parsed.jobs):
                for job in done:
                    self.driver.cancel(job)

    def cancel(self, parsed: ParsedRequest) -> None:
        for job in parsed.jobs:
            if job.open:
                self.driver.cancel(job)

    async def pieces(self, parsed: ParsedRequest, receive: Callable, began: float) -> AsyncIterator[tuple[int, Piece]]:
        """Yields (choice, piece) until all choices have ended.

        Raises:
            ClientDisconnect: the client has closed its connection.
        """

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            parsed.queue.put_nowait(GONE)

        listener = asyncio.create_task(listen())
        open_choices = sum(job.n for job in parsed.jobs)
        is_first = True
        try:
            while open_choices:
                item = await parsed.queue.get()
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
                    yield place * parsed.jobs[place].n + piece.choice, piece
        finally:
            listener.cancel()
            if parsed.stream:
                self.metrics.observe("request_seconds", time.perf_counter() - began)

    async def whole(self, parsed: ParsedRequest, pieces: AsyncIterator[tuple[int, Piece]]) -> Response:
        choices = parsed.choices()
        try:
            async for number, piece in pieces:
                choices[number].add(piece, self.eos_ids, shows_eos=parsed.shows_eos)
                if failure := _failure(number, piece):
                    raise failure
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if parsed.logprobs:
            body = await asyncio.get_running_loop().run_in_executor(self.workers, self.format.whole, parsed, choices)
        else:
            body = self.format.whole(parsed, choices)
        return Response(body, media_type="application/json")

    async def events(self, parsed: ParsedRequest, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
        """Yields the server-sent events of a request."""
        choices, form = parsed.choices(), self.format
        extra = {"usage": None} if parsed.usage else {}
        unopened = set(range(len(choices))) if parsed.echoes else set()

        def event(deltas: list[dict], **more: Any) -> str:
            # In ASCII: clients that split Unicode's lines would end an event at U+2028 or U+0085.
            return f"data: {json.dumps(form.envelope(parsed, deltas) | extra | more)}\n\n"

        if parsed.kind == "chat":
            for number in range(len(choices)):
                yield event([form.opening(number)])
        async for number, piece in pieces:
            choice = choices[number]
            shown = choice.add(piece, self.eos_ids, shows_eos=parsed.shows_eos)
            if failure := _failure(number, piece):
                self.metrics.count("failed_streams")
                yield f"data: {json.dumps(failure.body())}\n\n"
                return
            if number in unopened:
                # The prompt is scored by now.
                unopened.remove(number)
                yield event([form.echo(parsed, number)])
            if piece.text or shown or piece.reason:
                yield event([form.piece(parsed, number, choice, piece, shown)])
        if parsed.usage:
            yield event([], usage=form.usage(parsed, choices))
        yield "data: [DONE]\n\n"


def _failure(number: int, piece: Piece) -> RequestError | None:
    """Why a choice has no answer; where the reason is "error", the engine goes on."""
    if piece.reason == "cancelled":
        return RequestError(503, "the engine has failed", code="engine_failed")
    if piece.reason == "error":
        message = f"choices[{number}]: expected an answer, got: {piece.error[:500]}"
        return RequestError(500, message, code="sequence_failed")
    return None


class Events(Response):
    """Server-sent events. The response ends early if the client disconnects or does not read an event in time.

    Args:
        events: texts of the events.   write_seconds: time limit for one event.   done: called at the end in all cases.
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
            # The client no longer reads, so no error can be sent to it.
            pass
        finally:
            self.done()
            with contextlib.suppress(RuntimeError):
                await self.events.aclose()  # type: ignore[attr-defined]

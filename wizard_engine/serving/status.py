"""Pages on the state of the server: model, health, metrics, and the OpenAPI description."""

import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .driver import Driver
from .metrics import Metrics
from .openapi import description
from .protocol import Field, RequestError


class StatusPages:
    """Handlers of GET requests.

    Args:
        chat, completion: fields of the two kinds of request.   name, context, needs_key: as for Server.
    """

    def __init__(
        self,
        driver: Driver,
        metrics: Metrics,
        chat: Mapping[str, Field],
        completion: Mapping[str, Field],
        *,
        name: str,
        context: int,
        needs_key: bool,
    ) -> None:
        self.driver, self.metrics, self.chat_fields, self.completion_fields = driver, metrics, chat, completion
        self.name, self.context, self.needs_key = name, context, needs_key
        self.started = int(time.time())

    async def models(self, request: Request) -> Response:
        """The model served, as a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model served, by its name."""
        if request.path_params["model"] != self.name:
            raise unknown_model(self.name, request.path_params["model"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "wizard-engine",
            "max_model_len": self.context,
        }

    async def health(self, request: Request) -> Response:
        """Whether the engine works."""
        if self.driver.error:
            return JSONResponse({"status": "failed", "error": self.driver.error}, 503)
        return JSONResponse({"status": "ok", "open": self.driver.open})

    async def show_metrics(self, request: Request) -> Response:
        """Numbers for Prometheus."""
        engine = self.driver.engine
        gauges = {
            "sequences_open": self.driver.open,
            "sequences_running": len(engine.scheduler.running),
            "pages": engine.pages,
            "pages_free": engine.pool.free,
        }
        totals = {
            "steps_total": self.driver.steps,
            "step_seconds_total": self.driver.step_seconds,
            "preemptions_total": engine.scheduler.preemptions,
            "tokens_drawn_total": engine.generated,
            "graph_captures_total": engine.captures,
        }
        return PlainTextResponse(self.metrics.text(gauges, totals), media_type="text/plain; version=0.0.4")

    async def schema(self, request: Request) -> Response:
        """The OpenAPI description."""
        known = {"model": self.name, "needs_key": self.needs_key}
        return JSONResponse(description(self.chat_fields, self.completion_fields, **known))


def unknown_model(name: str, requested: str) -> RequestError:
    """The refusal of a request for another model than `name`."""
    return RequestError(
        404, f"model: expected {name!r}, got {requested[:200]!r}", param="model", code="model_not_found"
    )

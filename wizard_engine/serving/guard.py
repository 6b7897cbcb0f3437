"""Who may call the server: names in the Host header, pages of a browser, kinds of bodies, and how many at once.

A server on loopback without a key is reachable from every page in the user's browser. A page names another Host where
it has its own name point here, sends an Origin where it calls across sites, and sends text/plain where it avoids the
browser's question whether it may.
"""

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .metrics import Metrics
from .protocol import RequestError

JSON_TYPES = ("application/json",)


@dataclass(frozen=True)
class Access:
    """What requests are accepted.

    Attributes:
        hosts: names that a Host header may have; None: any.   origins: of pages that may call, "*" for all.
        refuses_origins: refuse requests with another Origin; otherwise the browser keeps the answer from the page.
        content_types: of bodies; None: any.   most: requests at once.
    """

    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    refuses_origins: bool = False
    content_types: tuple[str, ...] | None = None
    most: int = 4096


def access_of(
    address: str,
    *,
    has_key: bool,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    content_types: Sequence[str] = (),
    most: int = 4096,
) -> Access:
    """The access of a server that listens on an address: without a key, pages of other sites are refused.

    Args:
        hosts, origins, content_types: accepted beside those of the default.
    """
    allowed = tuple(origin.rstrip("/").lower() for origin in origins)
    if has_key:
        return Access(origins=allowed, most=most)
    names = None
    if hosts or is_loopback(address):
        own = ("localhost", address) if is_loopback(address) else (address,)
        names = frozenset(_name(host) for host in (*own, *hosts))
    return Access(names, allowed, True, (*JSON_TYPES, *(kind.lower() for kind in content_types)), most)


def is_loopback(name: str) -> bool:
    """Whether an address or a name is this machine's loopback."""
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower().rstrip(".") == "localhost"


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer. Half characters, which UTF-8 cannot say, become `?`."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")
    return Response(body, status, headers, media_type="application/json")


class Guard:
    """ASGI middleware that refuses requests before they reach a route."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self.app, self.access, self.metrics, self.running = app, access, metrics, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.running += 1
        try:
            self._check(scope, Headers(scope=scope))
        except RequestError as refused:
            self.metrics.count("requests", route="(none)", status=str(refused.status))
            response = json_response(refused.body(), refused.status, refused.headers | {"Connection": "close"})
            return await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1

    def _check(self, scope: Scope, headers: Headers) -> None:
        if "content-length" in headers and "transfer-encoding" in headers:
            raise RequestError(400, "headers: expected Content-Length or Transfer-Encoding, got both")
        self._check_host(headers.get("host", ""))
        self._check_origin(headers)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            self._check_body(headers)
        if self.running > self.access.most:
            raise RequestError(503, f"too many requests: {self.access.most} run already", code="server_busy")

    def _check_host(self, host: str) -> None:
        hosts = self.access.hosts
        if hosts is None or not host or _name(host) in hosts:
            return
        if "localhost" in hosts and is_loopback(_name(host)):
            return
        raise RequestError(
            403, f"host: expected {' or '.join(sorted(hosts))}, got {host[:80]!r}; allow it with --allow-host"
        )

    def _check_origin(self, headers: Headers) -> None:
        access = self.access
        if not access.refuses_origins or "*" in access.origins:
            return
        origins = headers.getlist("origin")
        for origin in origins:
            if origin.lower() not in access.origins:
                raise RequestError(
                    403, f"origin: expected none of a browser's page, got {origin[:80]!r}; allow it with --allow-origin"
                )
        # A page that only loads an address, as a picture or a script, says no origin. A link that is followed may.
        site = headers.get("sec-fetch-site", "none")
        if not origins and site in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            raise RequestError(
                403, f"sec-fetch-site: expected none of another page, got {site!r}; allow pages with --allow-origin"
            )

    def _check_body(self, headers: Headers) -> None:
        kinds = self.access.content_types
        for sent in headers.getlist("content-type"):
            kind = sent.partition(";")[0].strip().lower()
            if kinds is not None and kind and kind not in kinds:
                raise RequestError(
                    415,
                    f"content-type: expected {' or '.join(kinds)}, got {kind[:80]!r}; send it so, or start the server "
                    "with --allow-content-type",
                )
        for encoding in headers.getlist("content-encoding"):
            if encoding.strip().lower() not in ("", "identity"):
                raise RequestError(415, f"content-encoding: expected none, got {encoding[:80]!r}; send plain bodies")


def _name(host: str) -> str:
    """The name in a Host header: without a port, brackets and a last dot, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, _, port = host.rpartition(":")
    return (name if name and ":" not in name and port.isdigit() else host).rstrip(".")

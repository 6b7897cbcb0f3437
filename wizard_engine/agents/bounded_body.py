"""Answers of endpoints that are read to a limit: an endless one must not fill the memory."""

import sys
from collections.abc import Awaitable, Callable
from typing import Any

MAX_BODY = 64 << 20
# Of a compressed body, as it comes: what it unpacks to is up to a thousand times as much.
MAX_COMPRESSED_BODY = 256 << 10


class BodyTooLarge(Exception):
    """A body of more bytes than are read."""


def bounded(client_class: type) -> Callable[[Any], Awaitable[None]]:
    """An event hook for the responses of an HTTP client: reading more than MAX_BODY bytes raises BodyTooLarge.

    Args:
        client_class: the asynchronous client of httpx, or a class that is derived from it.
    """
    package = next(base.__module__.partition(".")[0] for base in client_class.__mro__ if base.__name__ == "AsyncClient")
    stream_class: Any = sys.modules[package].AsyncByteStream

    class Bounded(stream_class):
        def __init__(self, stream: Any, most: int) -> None:
            self.stream, self.most = stream, most

        async def __aiter__(self):
            size = 0
            async for chunk in self.stream:
                size += len(chunk)
                if size > self.most:
                    raise BodyTooLarge(f"expected a body of at most {self.most} bytes, got more")
                yield chunk

        async def aclose(self) -> None:
            await self.stream.aclose()

    async def bound(response: Any) -> None:
        is_compressed = response.headers.get("content-encoding", "identity").lower() != "identity"
        response.stream = Bounded(response.stream, MAX_COMPRESSED_BODY if is_compressed else MAX_BODY)

    return bound

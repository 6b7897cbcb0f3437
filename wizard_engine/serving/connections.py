"""Connections of the server: time limits of uvicorn's protocol for half requests and for clients that do not read.

A connection whose request is not complete waits: it has sent nothing, a part of the headers, or a part of the body.
Waiting connections may be so many, and those whose body a handler waits for a quarter of that; beyond that the one that
waits longest is closed, so that a client that sends its request at once always finds room.
"""

import asyncio
import socket
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .admission import BACKLOG, Admission, Newcomer

# Seconds for a client to read the answer to a request that it has not ended.
LINGER = 2.0


class ConnectionPool:
    """The waiting connections of a server.

    Args:
        most_waiting: before the oldest is closed.   head_seconds: for the headers of a request.   body_seconds: for the
            body of a connection's first request.   write_seconds: for a client to read what is buffered.
        count: told the status of answers outside of the app.
    """

    def __init__(
        self,
        most_waiting: int,
        *,
        head_seconds: float = 10.0,
        body_seconds: float = 30.0,
        write_seconds: float = 30.0,
        count: Callable[[str], None] = lambda status: None,
    ) -> None:
        self.most_waiting, self.most_bodies = most_waiting, max(1, most_waiting // 4)
        self.head_seconds, self.body_seconds, self.write_seconds = head_seconds, body_seconds, write_seconds
        self.count, self.closed = count, 0
        self._waiting: dict[GuardedProtocol | Newcomer, None] = {}
        self._bodies: dict[GuardedProtocol, None] = {}

    def protocol(self) -> type["GuardedProtocol"]:
        """A class of connections of this pool, for uvicorn's `http`."""
        return type("PooledProtocol", (GuardedProtocol,), {"pool": self})

    def add(self, connection: "GuardedProtocol | Newcomer") -> None:
        """A connection waits; one that waits already keeps its place."""
        self._add(connection, self._waiting, self.most_waiting)

    def add_body(self, connection: "GuardedProtocol") -> None:
        """A handler waits for the body of a connection's request."""
        self._waiting.pop(connection, None)
        self._add(connection, self._bodies, self.most_bodies)

    def remove(self, connection: "GuardedProtocol | Newcomer") -> None:
        """A connection does not wait any more."""
        self._waiting.pop(connection, None)
        self._bodies.pop(connection, None)

    def _add(self, connection: "GuardedProtocol | Newcomer", waiting: dict, most: int) -> None:
        waiting.setdefault(connection)
        if len(waiting) > most:
            oldest = next(iter(waiting))
            self.remove(oldest)
            self.closed += 1
            oldest.abort()


class HttpServer(uvicorn.Server):
    """uvicorn's server with an own way of accepting connections."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the sockets."""
        # Before uvicorn says that it has started: whoever waits for that may connect.
        for each in sockets or ():
            each.listen(BACKLOG)
        await super().startup(sockets=[])
        kind: type[GuardedProtocol] = self.config.http_protocol_class

        def protocol() -> GuardedProtocol:
            return kind(self.config, self.server_state, self.lifespan.state)

        self.servers = [Admission(each, protocol, kind.pool) for each in sockets or ()]


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with time limits."""

    pool: ConnectionPool
    first_data = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        # asyncio sets this only for sockets that name their protocol. Without it, an answer in two writes waits 40 ms
        # for the client's acknowledgement of the first.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.data_received(self.first_data)
        self.first_data = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self.pool.remove(self)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request has come."""
        super().data_received(data)
        self._mark()

    def on_response_complete(self) -> None:
        """An answer has been written."""
        has_body = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        self._mark()
        if has_body:
            # Closed later: at once, the client would get a reset instead of the answer.
            self._limit("linger", LINGER, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self.pool.count("400")
        super().send_400_response(msg)
        self._close()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing has come after an answer."""
        super().timeout_keep_alive_handler()
        self._close()

    def pause_writing(self) -> None:
        """The client does not read as fast as the answer is written."""
        super().pause_writing()
        self._limit("write", self.pool.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._unlimit("write")

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def _mark(self) -> None:
        """See whether a whole request is here, and how long its headers may still take."""
        state = self.conn.their_state
        if self.transport.is_closing() or state not in (h11.IDLE, h11.SEND_BODY):
            self.pool.remove(self)
        elif state is h11.SEND_BODY:
            self.pool.add_body(self)
        else:
            self.pool.add(self)
        if state is h11.IDLE and self.conn.trailing_data[0]:
            self._limit("head", self.pool.head_seconds, self._late)
        else:
            self._unlimit("head")

    def _late(self) -> None:
        """The headers have not come in time."""
        if self.conn.trailing_data[0] and not self.transport.is_closing():
            self.pool.count("408")
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
        self._close()

    def _close(self) -> None:
        """A closed connection ends, whether its client reads what is left or not."""
        self.pool.remove(self)
        self._limit("close", self.pool.write_seconds, self.transport.abort)

    def _limit(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, call)

    def _unlimit(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()

"""Connections before their first request is there: accepted, read and closed at little cost each.

A newcomer costs the event loop some microseconds until its request is complete; only then it gets a parser and a task.
So thousands of connections that never complete one do not hold up the others. Each turn of the event loop accepts,
watches, admits and closes few of them: complete requests first, and of the others those that came last.
"""

import asyncio
import contextlib
import errno
import re
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

# Connections that the system keeps until they are accepted. Beyond them, clients would wait for a second to try again.
BACKLOG = 4096
# Of one turn of the event loop: connections that are accepted, that the system is asked to watch, and that are closed
# as late; complete requests that are admitted, and incomplete ones.
ACCEPTED_AT_ONCE, WATCHED_AT_ONCE, CLOSED_AT_ONCE, COMPLETE_AT_ONCE, PARTIAL_AT_ONCE = 256, 32, 32, 8, 2
# Bytes of headers that the parser takes, of a request that waits here for its end, and of what is read at first.
MOST_HEAD, MOST_BUFFERED, READ_FIRST = 2**14, 2**16, 2**12
# Complete requests that wait to be admitted before no more connections are accepted.
MOST_COMPLETE = 256
# Seconds until accepting goes on after the system had no room for another connection.
NO_ROOM_SECONDS = 0.5
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

_FRAMING = re.compile(rb"\n(content-length|transfer-encoding|expect)[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)


class FirstRequest:
    """The bytes of a connection's first request, as far as they have come.

    `is_complete`: it can be answered, or refused, at once.   `is_partial`: its rest is for the app to wait for: it is
    long, comes in chunks, or the client waits for a sign.   `has_head`: the headers are there.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.is_complete = self.is_partial = self.has_head = False
        self._seen = self._length = 0

    def add(self, data: bytes) -> None:
        """More has come."""
        self.data += data
        if not self.has_head:
            self._find_head()
        if self.has_head and not self.is_partial:
            self.is_complete = len(self.data) >= self._length

    def _find_head(self) -> None:
        start = max(0, self._seen - 3)
        self._seen = len(self.data)
        ends = [at + len(end) for end in (b"\n\r\n", b"\n\n") if (at := self.data.find(end, start)) >= 0]
        if ends:
            self.has_head = True
            self._read_framing(min(ends))
        else:
            # Too long, or no HTTP: the parser refuses it.
            self.is_complete = len(self.data) > MOST_HEAD or self.data[0] <= 0x20

    def _read_framing(self, end: int) -> None:
        """How the body's end is known; where that is not clear, the parser or the app says so at once."""
        fields = [(name.lower(), value.strip()) for name, value in _FRAMING.findall(self.data, 0, end)]
        lengths = [value for name, value in fields if name == b"content-length"]
        self._length = end
        if len(fields) == len(lengths) == 1 and lengths[0].isdigit() and len(lengths[0]) < 19:
            self._length += int(lengths[0])
            self.is_partial = self._length > MOST_BUFFERED
        elif len(fields) > len(lengths):
            self.is_partial = not self.data.endswith(b"\r\n0\r\n\r\n")


class Newcomer:
    """A connection whose first request is not complete."""

    __slots__ = ("admission", "deadline", "is_watched", "request", "socket")

    def __init__(self, admission: "Admission", connection: socket.socket, deadline: float) -> None:
        self.admission, self.socket, self.deadline, self.is_watched = admission, connection, deadline, False
        self.request: FirstRequest | None = None

    def abort(self) -> None:
        """Close the connection."""
        self.admission.drop(self)


class Admission:
    """Accepts the connections of a listening socket and hands them to a protocol with their first request.

    Args:
        protocol: makes the protocol of a connection.   pool: limits of time and number.
    """

    def __init__(self, listening: socket.socket, protocol: Callable[[], Any], pool: Any) -> None:
        self.listening, self.protocol, self.pool = listening, protocol, pool
        self.loop = asyncio.get_running_loop()
        # By deadline: those without their headers, and those without their whole body.
        self._heads: dict[Newcomer, None] = {}
        self._bodies: dict[Newcomer, None] = {}
        self._complete: deque[Newcomer] = deque()
        self._partial: dict[Newcomer, None] = {}
        self._unwatched: dict[Newcomer, None] = {}
        self._tasks: set[asyncio.Task] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._goes_on = False
        listening.setblocking(False)
        listening.listen(BACKLOG)
        self.loop.add_reader(listening, self._accept)

    def close(self) -> None:
        """Accept no more, and close the connections without a complete request."""
        self.loop.remove_reader(self.listening)
        for newcomer in (*self._heads, *self._bodies, *self._complete, *self._partial):
            self.drop(newcomer)
        self._complete.clear()
        if self._timer is not None:
            self._timer.cancel()

    async def wait_closed(self) -> None:
        """Nothing is left to wait for."""

    def drop(self, newcomer: Newcomer) -> None:
        """Close a connection."""
        self._forget(newcomer)
        newcomer.socket.close()

    def _accept(self) -> None:
        """Accept some connections, and read what they have sent already."""
        deadline = self.loop.time() + self.pool.head_seconds
        for _ in range(ACCEPTED_AT_ONCE if len(self._complete) < MOST_COMPLETE else 0):
            try:
                connection, _ = self.listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                self.loop.remove_reader(self.listening)
                self.loop.call_later(NO_ROOM_SECONDS, self._accept_again)
                break
            connection.setblocking(False)
            newcomer = Newcomer(self, connection, deadline)
            self._heads[newcomer] = self._unwatched[newcomer] = None
            self.pool.add(newcomer)
            self._read(newcomer)
        self._wait_for_the_first()
        if self._unwatched:
            self._go_on_soon()

    def _accept_again(self) -> None:
        if self.listening.fileno() >= 0:
            self.loop.add_reader(self.listening, self._accept)

    def _watch(self) -> None:
        """Hear of what newcomers send, the last first: clients that send at once do not wait behind the others."""
        for _ in range(min(WATCHED_AT_ONCE, len(self._unwatched))):
            newcomer, _ = self._unwatched.popitem()
            self.loop.add_reader(newcomer.socket, self._read, newcomer)
            newcomer.is_watched = True

    def _read(self, newcomer: Newcomer) -> None:
        try:
            data = newcomer.socket.recv(READ_FIRST if newcomer.request is None else MOST_BUFFERED)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            return self.drop(newcomer)
        request = newcomer.request = newcomer.request or FirstRequest()
        request.add(data)
        if request.is_complete:
            self._forget(newcomer)
            self._complete.append(newcomer)
            self._go_on_soon()
        elif request.is_partial:
            self._forget(newcomer)
            self._partial[newcomer] = None
            self.pool.add(newcomer)
            self._go_on_soon()
        elif request.has_head and newcomer in self._heads:
            del self._heads[newcomer]
            newcomer.deadline = self.loop.time() + self.pool.body_seconds
            self._bodies[newcomer] = None
            self._wait_for_the_first()

    def _forget(self, newcomer: Newcomer) -> None:
        """A newcomer does not wait any more."""
        self._heads.pop(newcomer, None)
        self._bodies.pop(newcomer, None)
        self._partial.pop(newcomer, None)
        self._unwatched.pop(newcomer, None)
        self.pool.remove(newcomer)
        if newcomer.is_watched:
            self.loop.remove_reader(newcomer.socket)
            newcomer.is_watched = False

    def _go_on_soon(self) -> None:
        if not self._goes_on:
            self._goes_on = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """One turn's share of what is to be done."""
        self._goes_on = False
        self._admit()
        self._watch()
        if self._complete or self._partial or self._unwatched:
            self._go_on_soon()

    def _admit(self) -> None:
        waiting, most = (self._complete, COMPLETE_AT_ONCE) if self._complete else (self._partial, PARTIAL_AT_ONCE)
        for _ in range(min(most, len(waiting))):
            newcomer = self._complete.popleft() if waiting is self._complete else next(iter(self._partial))
            self._forget(newcomer)
            protocol = self.protocol()
            protocol.first_data = bytes(newcomer.request.data)
            task = self.loop.create_task(self._connect(protocol, newcomer.socket))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, protocol: Any, connection: socket.socket) -> None:
        await self.loop.connect_accepted_socket(lambda: protocol, connection)

    def _wait_for_the_first(self) -> None:
        """Come back when the next newcomer is late."""
        deadlines = [next(iter(waiting)).deadline for waiting in (self._heads, self._bodies) if waiting]
        if deadlines and (self._timer is None or min(deadlines) < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(min(deadlines), self._close_late)

    def _close_late(self) -> None:
        self._timer, now = None, self.loop.time()
        for waiting in (self._heads, self._bodies):
            for newcomer in [newcomer for newcomer, _ in zip(waiting, range(CLOSED_AT_ONCE))]:
                if newcomer.deadline > now:
                    break
                self._close(newcomer)
        self._wait_for_the_first()

    def _close(self, newcomer: Newcomer) -> None:
        """Close a connection whose request has not come in time."""
        if newcomer.request is not None:
            self.pool.count("408")
            with contextlib.suppress(OSError):
                newcomer.socket.send(LATE)
        self.drop(newcomer)

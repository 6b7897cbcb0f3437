"""One event loop for the agents of a recipe: rows flow from call to call, every agent works at its own rate.

Each row of a stage is a coroutine (`Scheduler.rows`) that awaits its calls (`Scheduler.ask`). No call waits for another
row's: an endpoint always has as many calls as it takes, and a model in this process always has a batch. What rows give
is kept on disk in the order of the rows (`Spill`), so memory holds only the rows that are being worked on.

A call is looked up in the ledger first. Equal calls that run at the same time are one call. A reply is written to the
ledger before the row that asked for it goes on, so a run that is killed repeats no call that was answered. The replies
of programs, which take no time, are written together at the end of a turn of the loop.
"""

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from wizard_engine.runtime.metrics import progress
from wizard_engine.runtime.process import Interrupted

from .ledger import Ledger, Stored, request_key
from .missing import shown_reasons
from .prices import Price
from .protocol import Agent, ConcurrentAgent, Reply, Request, is_concurrent
from .unreadable import FIRST_REQUESTS

T = TypeVar("T")
R = TypeVar("R")
_Waiting = tuple[Request, asyncio.Future[Reply]]
BATCH_SIZE = 256
SYNC_SECONDS = 1.0
# Rows worked on at once, for each call that an agent can run at once.
ROWS_AHEAD = 4
# Calls of the row at work that are answered, in a list of its own; None outside of rows.
_answered: ContextVar[list[int] | None] = ContextVar("answered", default=None)


class Stopped(Interrupted):
    """Raised after a signal to end; the same command goes on."""

    def __init__(self, number: int, ledger: Ledger | None) -> None:
        kept = f"; what was answered is in {ledger.path}, and the same command goes on" if ledger is not None else ""
        SystemExit.__init__(self, f"stopped by {signal.Signals(number).name}{kept}")


class Scheduler:
    """Asks agents for rows, through a ledger, within one event loop.

    Args:
        ledger: of all calls; None keeps none.
        batch_size: requests that an agent of this process answers together.
        prices: by agent's name, for the cost on the progress bar.
        quiet: no progress bar.
        unreadable: requests of an agent and task after which a stage ends if none of them could be read; 0 for never.
    Attributes:
        asked: task -> calls made.   served: task -> replies without a call.   failed: reason -> failed calls.
        tokens_in, tokens_out, cost: of the calls made.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        prices: dict[str, Price] | None = None,
        quiet: bool = False,
        unreadable: int = FIRST_REQUESTS,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}; give the requests of one batch")
        self.ledger, self.batch_size, self.quiet, self.prices = ledger, batch_size, quiet, prices or {}
        self.unreadable = unreadable
        self.asked: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        # Of each reason the whole error of one call.
        self.examples: dict[str, str] = {}
        self.tokens_in = self.tokens_out = 0
        self.cost = 0.0
        self._lines: dict[int, _Batches] = {}
        self._running: dict[bytes, asyncio.Future[Reply]] = {}
        self._unsaved: list[tuple[Stored, asyncio.Future[Reply] | None]] = []
        self._fresh: dict[bytes, Reply] = {}
        self._agents: dict[int, Agent | ConcurrentAgent] = {}
        self._bar = _Bar(self)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that asks agents; not for use within a running loop.

        Raises:
            ValueError: an agent makes no more calls (its budget is spent, its endpoint is down or refuses the key).
            Stopped: SIGINT or SIGTERM came.
        """
        with asyncio.Runner() as runner:
            return runner.run(self._until_signal(work))

    async def _until_signal(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work. The first signal to end gives it up; a second one ends the process as usual."""
        whole, received = asyncio.ensure_future(self._whole(work)), []

        def give_up(number: int) -> None:
            received.append(number)
            whole.cancel()

        with _signals(give_up):
            try:
                return await whole
            except asyncio.CancelledError:
                if not received:
                    raise
                raise Stopped(received[0], self.ledger) from None

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        self._turn, self._broken = asyncio.Lock(), asyncio.get_running_loop().create_future()
        working, saving = asyncio.ensure_future(work), asyncio.ensure_future(self._sync())
        try:
            await asyncio.wait({working, saving, self._broken}, return_when=asyncio.FIRST_COMPLETED)
            self._flush()
            ended = (self._broken, working, saving)
            return await next(task for task in ended if task.done())
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            await self._end(working, saving, self._broken)

    async def _end(self, *tasks: asyncio.Future) -> None:
        """Give up what still runs, close the connections, and bring what was stored to the disk."""
        self._flush()
        for agent in self._agents.values():
            # A batch under way would keep the process.
            getattr(agent, "stop", list)()
        left = [*tasks, *self._running.values(), *(task for line in self._lines.values() for task in line.tasks)]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._lines.clear()
        self._fresh.clear()
        agents, self._agents = self._agents, {}
        for agent in agents.values():
            if is_concurrent(agent):
                await agent.aclose()
        if self.ledger is not None:
            self.ledger.sync()

    async def _sync(self) -> None:
        """Bring what was stored to the disk and the bar up to date, every second; ends only by an error."""
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            self._bar.refresh(is_drawn=True)
            if self.ledger is not None:
                await asyncio.to_thread(self.ledger.sync)

    async def rows(
        self,
        items: Iterable[T],
        work: Callable[[T], Awaitable[R]],
        done: Callable[[int, R], object],
        *,
        desc: str,
        total: int | None = None,
        width: int = 1,
        calls: int = 1,
        ahead: int = ROWS_AHEAD,
        agents: Sequence[Agent | ConcurrentAgent] = (),
    ) -> None:
        """Works on every item, many of them at once.

        Args:
            items: taken one after another, as room becomes free.
            work: what is done with an item.
            done: called with the item's place and its result as soon as there is one, in any order.
            desc, total: of the progress bar.
            width: calls that one item may have open at once.   ahead: items for each call that can run at once.
            calls: that an item usually takes in all. The bar counts calls: many items may be open for long, and no
            one of them done.
            agents: that are asked; how many items are worked on at once depends on what they can run at once.
        Raises:
            the first error of any item; the others are given up.
        """
        room = asyncio.Semaphore(self.window(agents, width, ahead))

        async def one(place: int, item: T) -> None:
            _answered.set([0])
            try:
                done(place, await work(item))
                self._bar.row_done()
            finally:
                room.release()

        try:
            with self._bar.stage(desc, total, calls):
                async with asyncio.TaskGroup() as group:
                    for place, item in enumerate(items):
                        await room.acquire()
                        group.create_task(one(place, item))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    def at_most(self, what: str, *, taken: int, most: int, calls: int) -> None:
        """Says that verdicts decide how many of something there are: an estimate names the calls that may come on top.

        Args:
            taken, most: how many there are, and how many there could be.   calls: of one of them, at most.
        """

    def window(self, agents: Sequence[Agent | ConcurrentAgent], width: int = 1, ahead: int = ROWS_AHEAD) -> int:
        """Items to work on at once, so that none of the agents waits for a call."""
        calls = sum(getattr(agent, "concurrency", self.batch_size) for agent in _distinct(agents)) or self.batch_size
        return max(4, -(-ahead * calls // width))

    async def each(self, agent: Agent | ConcurrentAgent, requests: Sequence[Request]) -> list[Reply]:
        """Replies to requests in their order, asked at once."""
        return list(await asyncio.gather(*(self.ask(agent, request) for request in requests)))

    async def ask(self, agent: Agent | ConcurrentAgent, request: Request) -> Reply:
        """The reply to a request, from the ledger if it is there.

        Raises:
            ValueError: the agent makes no more calls.
        """
        reply = await self._asked(agent, request)
        self._bar.call_done()
        return reply

    async def _asked(self, agent: Agent | ConcurrentAgent, request: Request) -> Reply:
        key = request_key(agent.fingerprint, request)
        running = self._running.get(key)
        if running is not None:
            self.served[request.task] += 1
            return await asyncio.shield(running)
        if self.ledger is not None:
            stored = self._fresh.get(key) or self.ledger.lookup_one(key)
            if stored is not None:
                self.served[request.task] += 1
                return stored
        if getattr(agent, "is_instant", False):
            return self._at_once(agent, key, request)
        self._agents.setdefault(id(agent), agent)
        call = asyncio.ensure_future(self._call(agent, key, request))
        self._keep(key, call)
        return await asyncio.shield(call)

    def _keep(self, key: bytes, call: asyncio.Future[Reply]) -> None:
        """Equal calls wait for this one."""
        self._running[key] = call
        call.add_done_callback(lambda call: self._drop(key, call))

    def _drop(self, key: bytes, call: asyncio.Future[Reply]) -> None:
        self._running.pop(key, None)
        # An error is raised by those who wait for the call. Where all of them were given up, nobody misses it.
        if not call.cancelled():
            call.exception()

    def _at_once(self, agent: Agent, key: bytes, request: Request) -> Reply:
        """The reply of an agent that takes no time; stored with all those of this turn of the loop."""
        (reply,) = _replies(agent, [request])
        self._count(agent, request, reply)
        if self.ledger is not None:
            if reply.ok:
                self._fresh[key] = reply
            self._save(Stored(agent.name, agent.fingerprint, key, request, reply), None)
        return reply

    async def _call(self, agent: Agent | ConcurrentAgent, key: bytes, request: Request) -> Reply:
        reply = await (agent if is_concurrent(agent) else self._line(agent)).reply(request)
        self._count(agent, request, reply)
        if self.ledger is not None:
            reply = await self._saved(Stored(agent.name, agent.fingerprint, key, request, reply))
        ended = getattr(agent, "ended", "")
        if ended and not reply.ok:
            raise ValueError(
                f"agent {agent.name}: {ended}; what came is in the ledger, and the same command goes on from there"
            )
        return reply

    def _count(self, agent: Agent | ConcurrentAgent, request: Request, reply: Reply) -> None:
        self.asked[request.task] += 1
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        price = self.prices.get(agent.name) or getattr(agent, "price", None)
        self.cost += price.of(reply.tokens_in, reply.tokens_out) if price else 0.0
        if reply.reason:
            self.failed[reply.reason] += 1
            self.examples.setdefault(reply.reason, reply.error or "")
        self._bar.refresh()

    async def _saved(self, call: Stored) -> Reply:
        """The reply once it is stored, or the one that another process stored first."""
        future = asyncio.get_running_loop().create_future()
        self._save(call, future)
        return await future

    def _save(self, call: Stored, future: asyncio.Future[Reply] | None) -> None:
        """Store a reply: all those that come in one turn of the loop are one transaction."""
        if not self._unsaved:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsaved.append((call, future))

    def _flush(self) -> None:
        calls, self._unsaved = self._unsaved, []
        if not calls:
            return
        waiting = [(call, future) for call, future in calls if future is not None and not future.done()]
        try:
            are_first = self.ledger.store([call for call, _ in calls])
            first = {} if are_first else self.ledger.lookup([call.key for call, _ in waiting if call.reply.ok])
        # Whatever it is, it ends the run, and those who wait for these replies.
        except BaseException as error:
            for _, future in waiting:
                future.set_exception(error)
            if not self._broken.done():
                self._broken.set_exception(error)
            return
        self._fresh.clear()
        for call, future in waiting:
            future.set_result(first.get(call.key, call.reply))

    def generating(self) -> tuple[int, int]:
        """Replies that models of this machine have finished in the batches that run, and all of those batches."""
        running = [getattr(line.agent, "generating", (0, 0)) for line in self._lines.values()]
        return sum(done for done, _ in running), sum(count for _, count in running)

    def _line(self, agent: Agent) -> "_Batches":
        if id(agent) not in self._lines:
            self._lines[id(agent)] = _Batches(agent, self.batch_size, self._turn)
        return self._lines[id(agent)]


class InOrder:
    """Lets the rows of a stage pass a place one after another, whatever order they come in.

    Every row, from 0 on, calls `reach` and then `leave`, or `leave` alone where it has nothing to do there.
    """

    def __init__(self) -> None:
        self._next, self._passed = 0, set()
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def reach(self, row: int) -> None:
        """Wait until all rows before this one have left."""
        if row != self._next:
            self._waiting[row] = asyncio.get_running_loop().create_future()
            await self._waiting[row]

    def leave(self, row: int) -> None:
        """Let the next row pass."""
        self._passed.add(row)
        while self._next in self._passed:
            self._passed.remove(self._next)
            self._next += 1
        waiting = self._waiting.pop(self._next, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


class _Batches:
    """The requests that wait for an agent that answers many at once.

    A batch takes requests until no more come for the moment and the batches before it have ended. While it runs, in a
    thread, other agents go on.

    Args:
        turn: batches of this process run one after another, because they share its device.
    """

    def __init__(self, agent: Agent, size: int, turn: asyncio.Lock) -> None:
        self.agent, self.size, self.turn = agent, size, turn
        self._open: list[_Waiting] | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def reply(self, request: Request) -> Reply:
        """The reply to one request, as part of a batch."""
        if self._open is None:
            self._open = []
            task = asyncio.create_task(self._answer(self._open))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        reply = asyncio.get_running_loop().create_future()
        self._open.append((request, reply))
        if len(self._open) == self.size:
            self._open = None
        return await reply

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            async with self.turn:
                await self._until_quiet(batch)
                if self._open is batch:
                    self._open = None
                replies = await asyncio.to_thread(_replies, self.agent, [request for request, _ in batch])
        except BaseException as error:
            for _, reply in batch:
                if not reply.done():
                    reply.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            for (_, reply), said in zip(batch, replies):
                if not reply.done():
                    reply.set_result(said)

    async def _until_quiet(self, batch: list[_Waiting]) -> None:
        """Wait while requests still come in, turn by turn of the loop, up to a full batch."""
        still = 0
        while still < 3 and len(batch) < self.size:
            before = len(batch)
            await asyncio.sleep(0)
            still = still + 1 if len(batch) == before else 0


class _Bar:
    """The progress bar of a stage: its calls or rows, and beside it rows, calls a second, tokens, failures, cost.

    A row counts as as many calls as it usually takes, each once it is answered, and the last one once the row is done.
    """

    EVERY = 0.5

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self._bar, self._next = scheduler, None, 0.0

    def stage(self, desc: str, total: int | None, calls: int):
        """A context with the bar of one stage."""
        self._start, self._before = time.monotonic(), self.scheduler.asked.total()
        self._calls, self._rows, self._all_rows = calls, 0, total
        unit, count = ("row", total) if calls == 1 else ("call", None if total is None else total * calls)
        self._bar = progress(desc=desc, unit=unit, total=count, quiet=self.scheduler.quiet)
        return self._bar

    def call_done(self) -> None:
        """One more call of a row is answered."""
        row = _answered.get()
        if self._bar is not None and row is not None and row[0] < self._calls - 1:
            row[0] += 1
            self._bar.update()

    def row_done(self) -> None:
        """One more row is done."""
        self._rows += 1
        self._bar.update(self._calls - _answered.get()[0])

    def refresh(self, *, is_drawn: bool = False) -> None:
        """Say how far the calls are, at most twice a second.

        Args:
            is_drawn: now; otherwise with the next call or row.
        """
        if self._bar is None or not self._bar.is_shown:
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self.EVERY
        self._bar.set_postfix_str(self.text(now), refresh=is_drawn)

    def text(self, now: float) -> str:
        """What stands beside the bar."""
        run = self.scheduler
        calls = run.asked.total() - self._before
        parts = [f"{calls} calls, {calls / max(now - self._start, 1e-3):.1f}/s"]
        if self._calls > 1:
            parts.insert(0, f"{self._rows}/{'?' if self._all_rows is None else self._all_rows} rows")
        finished, generated = run.generating()
        if generated:
            parts.append(f"generated {finished} of {generated}")
        if run.tokens_in or run.tokens_out:
            parts.append(f"{run.tokens_in + run.tokens_out} tokens")
        if run.failed:
            parts.append(f"failed: {shown_reasons(run.failed)}")
        if run.cost:
            parts.append(f"cost {run.cost:.2f}")
        return ", ".join(parts)


def _replies(agent: Agent, requests: Sequence[Request]) -> list[Reply]:
    """Replies of an agent that answers many requests at once."""
    replies = agent.respond(requests)
    if len(replies) != len(requests):
        raise ValueError(
            f"agent {agent.name}: expected {len(requests)} replies, got {len(replies)}; return one a request"
        )
    return replies


@contextmanager
def _signals(receive: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM are received within the running loop, the first of them; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, former = asyncio.get_running_loop(), {}

    def restore() -> None:
        for number, handler in former.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
        former.clear()

    def once(number: int) -> None:
        restore()
        receive(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        former[number] = signal.getsignal(number)
        loop.add_signal_handler(number, once, number)
    try:
        yield
    finally:
        restore()


def _distinct(agents: Sequence[Agent | ConcurrentAgent]) -> list[Agent | ConcurrentAgent]:
    return list({id(agent): agent for agent in agents}.values())


def _first(errors: BaseExceptionGroup) -> BaseException:
    """The first error of a group that is no cancellation."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

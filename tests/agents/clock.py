"""An event loop whose time passes at once: it jumps to the next timer whenever nothing else is to be done."""

import asyncio
from functools import partial


class Clock(asyncio.SelectorEventLoop):
    def __init__(self):
        super().__init__()
        self.now = 1000.0
        select = self._selector.select

        def jump(timeout):
            events = select(0)
            if not events and timeout is None:
                raise AssertionError("nothing will ever happen again")
            if not events and timeout > 0:
                self.now += timeout
            return events

        self._selector.select = jump

    def time(self):
        return self.now


def run(work):
    """The result of a coroutine on a loop of this kind."""
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(work)


def use(monkeypatch):
    """Schedulers run on such loops."""
    monkeypatch.setattr(asyncio, "Runner", partial(asyncio.Runner, loop_factory=Clock))


def ideal_seconds(latencies, servers):
    """When the last of some calls ends, each of which is taken by the first server that is free."""
    free = [0.0] * servers
    for latency in latencies:
        free.sort()
        free[0] += latency
    return max(free)

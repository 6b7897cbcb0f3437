"""Agents of several ranks: rank 0 conducts a stage, and the others answer for it with their models.

Rank 0 runs the event loop and makes all calls to endpoints. A batch for a model or program of this process is sharded
over the ranks, each of which has its own copy.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from wizard_engine.runtime.object_collectives import from_main, gather_objects
from wizard_engine.runtime.process import Runtime

from .protocol import Agent, Reply, Request

T = TypeVar("T")
# The other ranks hear from rank 0 at least this often: collectives have a timeout.
KEEPALIVE_SECONDS = 20.0


class Ranks:
    """What rank 0 tells the other ranks to do.

    Args:
        make: the agent of a spec, on this rank.
    """

    def __init__(self, runtime: Runtime, make: Callable[[str], Agent]) -> None:
        self.runtime, self.make = runtime, make
        self._lock = threading.Lock()
        self._told = time.monotonic()
        self._ended = threading.Event()

    def conduct(self, work: Callable[[], T]) -> T:
        """The result of `work`, which rank 0 does while the others answer for it; sent to every rank.

        Raises:
            ValueError: whatever `work` raised, on every rank; on rank 0 also other errors as they are.
        """
        if self.runtime.world_size == 1:
            return work()
        if not self.runtime.is_main:
            self._serve()
            return from_main(self.runtime, work)
        return from_main(self.runtime, lambda: self._lead(work))

    def respond(self, spec: str, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, which are sharded over the ranks. On rank 0, from any thread."""
        with self._lock:
            self._tell(("ask", spec, list(requests)))
            parts = self._parts(spec, requests)
        replies: list[Any] = [None] * len(requests)
        for other, given in enumerate(parts):
            if isinstance(given, str):
                raise ValueError(given)
            replies[other :: self.runtime.world_size] = given
        return replies

    def _lead(self, work: Callable[[], T]) -> T:
        self._ended.clear()
        keeper = threading.Thread(target=self._keep_alive, daemon=True, name="wizard ranks")
        keeper.start()
        try:
            return work()
        finally:
            self._ended.set()
            keeper.join()
            with self._lock:
                self._tell(("end",))

    def _keep_alive(self) -> None:
        while not self._ended.wait(min(1.0, KEEPALIVE_SECONDS)):
            if time.monotonic() - self._told > KEEPALIVE_SECONDS and self._lock.acquire(blocking=False):
                try:
                    self._tell(("wait",))
                finally:
                    self._lock.release()

    def _tell(self, order: tuple) -> None:
        self._told = time.monotonic()
        dist.broadcast_object_list([order], 0)

    def _serve(self) -> None:
        """Do what rank 0 tells, until it has ended."""
        while True:
            order: list[Any] = [None]
            dist.broadcast_object_list(order, 0)
            kind, *details = order[0]
            if kind == "end":
                return
            if kind == "ask":
                self._parts(*details)

    def _parts(self, spec: str, requests: Sequence[Request]) -> list[Any]:
        """The replies of every rank to its share of the requests, or the text of its error. Rank 0 raises that."""
        rank, size = self.runtime.rank, self.runtime.world_size
        own = requests[rank::size]
        try:
            part: Any = self.make(spec).respond(own) if own else []
            if len(part) != len(own):
                part = f"agent {spec}: expected {len(own)} replies, got {len(part)}; return one a request"
        except (ValueError, OSError) as error:
            part = f"{error}"
        return gather_objects(f"[rank {rank}/{size}] {part}" if isinstance(part, str) else part)


class RankedAgent:
    """An agent of rank 0 whose requests all ranks answer, each with its own copy of the model."""

    def __init__(self, ranks: Ranks, spec: str, agent: Agent) -> None:
        self.ranks, self.spec, self.agent = ranks, spec, agent
        self.name, self.fingerprint = agent.name, agent.fingerprint
        self.converses = getattr(agent, "converses", True)

    @property
    def generating(self) -> tuple[int, int]:
        """Finished replies and all of rank 0's share of the batch that runs."""
        return getattr(self.agent, "generating", (0, 0))

    def stop(self) -> None:
        """End what rank 0 answers."""
        getattr(self.agent, "stop", list)()

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests."""
        return self.ranks.respond(self.spec, requests)

"""What a stand-in GPU was asked to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["triton", "torch", "copy", "sync", "graph", "mark", "wait"]


@dataclass
class Event:
    """One request to the device, or one wait for it.

    Attributes:
        kind: a Triton kernel, a torch operator, a copy between host and device, a wait of the host for all of it, a
            CUDA graph, the record of an event (a mark), or a wait of the host for that.
        name: of the kernel or operator, what the host waited for, or the number of the mark.
        bytes: read and written.   flops: operations.   launches: kernels that the device runs.
        where: "file:line" of the engine's code that asked, of waits.
        replayed: of a graph, the events that it replays.   launch: of a Triton kernel.
    """

    kind: Kind
    name: str
    bytes: int = 0
    flops: float = 0.0
    launches: int = 1
    where: str = ""
    replayed: tuple["Event", ...] = ()
    launch: Any = None


@dataclass
class Log:
    """Events in order; inside `capture` they go into a graph instead.

    Attributes:
        variants: Triton kernel -> what each compilation was asked for, and what Triton made of its run-time numbers.
    """

    events: list[Event] = field(default_factory=list)
    variants: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        self.events.append(event)

    @contextmanager
    def capture(self) -> Iterator[list[Event]]:
        """Collect the events of the block apart, as a CUDA graph does."""
        before, self.events = self.events, []
        try:
            yield self.events
        finally:
            self.events = before

    def of(self, kind: Kind) -> list[Event]:
        """The events of a kind; those inside graphs are not among them."""
        return [event for event in self.events if event.kind == kind]

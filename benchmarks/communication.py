"""What a block of code moves between ranks, and how long it waits for that: by kind of collective and axis of the mesh.

    bytes    whole buffers, as planning/estimate.py counts them: of a gather what comes out, of a reduction
             what goes in, of an exchange what this rank sends
    seconds  exposed communication: on a GPU, how long the compute stream stands still for a collective, measured with
             events around each wait; on a CPU, wall clock inside `wait` and inside collectives that block

A collective that runs beside the computation and has ended before it is waited for costs nothing here. A wait includes
that for ranks which come later. Sums of a few numbers, objects and barriers go by the name `numbers`: the closed forms
leave them out.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist

from wizard_engine.parallel import Mesh
from wizard_engine.planning.simulate import axis_names

# Methods of a process group -> kind of collective, and which argument is the whole buffer. torch 2.13 has new names.
METHODS = {
    "_allgather_base": ("gather", 0),
    "all_gather_single": ("gather", 0),
    "_reduce_scatter_base": ("reduce", 1),
    "reduce_scatter_single": ("reduce", 1),
    "alltoall_base": ("exchange", 1),
    "all_to_all_single": ("exchange", 1),
    "allreduce": ("sum", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("objects", 0),
    "barrier": ("barrier", None),
}
NUMBERS_KEY = "numbers"

Key = tuple[str, str]


@dataclass
class Communication:
    """Of one rank and one stretch of time.

    bytes: (kind, axis) -> bytes of whole buffers.   seconds: axis -> exposed communication.
    """

    bytes: dict[Key, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class CommunicationMeter:
    """Counts inside its `with` block, which wraps the methods of torch's process groups.

    Args:
        mesh: whose axes the groups go by.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.names, self.on_gpu = axis_names(mesh), mesh.device.type == "cuda"
        self.bytes: defaultdict[Key, int] = defaultdict(int)
        self.spans: list[tuple[str, Any, Any]] = []
        # Work that nobody has waited for yet; it is held, so that its id stays its own.
        self.open: dict[int, tuple[Any, str, Any]] = {}
        self.originals: list[tuple[type, str, Any]] = []

    def __enter__(self) -> Self:
        for name, (kind, which) in METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                self._replace(dist.ProcessGroup, name, self._counted(getattr(dist.ProcessGroup, name), kind, which))
        self._replace(dist.Work, "wait", self._timed(dist.Work.wait))
        return self

    def __exit__(self, *exception: object) -> None:
        for owner, name, original in reversed(self.originals):
            setattr(owner, name, original)
        self.originals.clear()

    def _replace(self, owner: type, name: str, method: Any) -> None:
        # What stands in the class: what `getattr` gives of these methods would not bind again.
        self.originals.append((owner, name, vars(owner)[name]))
        setattr(owner, name, method)

    def _now(self) -> Any:
        """The present in the order of the device's work."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _counted(self, original: Callable, kind: str, which: int | None) -> Callable:
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            options = kwargs.get("opts", args[-1] if args else None)
            blocks = not getattr(options, "asyncOp", True)
            began = self._now() if blocks else None
            work = original(group, *args, **kwargs)
            buffers = [] if which is None else args[which] if isinstance(args[which], list) else [args[which]]
            key = self._key(kind, group.group_name, buffers)
            self.bytes[key] += sum(x.nbytes for y in buffers for x in (y if isinstance(y, list) else [y]))
            if work is not None:
                self.open[id(work)] = work, key[1], began
            elif blocks:
                self.spans.append((key[1], began, self._now()))
            return work

        return call

    def _key(self, kind: str, group_name: str, buffers: list) -> Key:
        axis = self.names.get(group_name, "world")
        if kind in ("gather", "reduce", "exchange"):
            return kind, axis
        # Sums of numbers are of fp64 and int64, those of gradients over the copies of the model of fp32.
        is_gradient = kind == "sum" and buffers[0].dtype == torch.float32
        return (kind, axis) if is_gradient else (kind, NUMBERS_KEY)

    def _timed(self, original: Callable) -> Callable:
        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            _, axis, began = self.open.pop(id(work), (None, None, None))
            if axis is not None and began is None:
                began = self._now()
            out = original(work, *args, **kwargs)
            if axis is not None:
                self.spans.append((axis, began, self._now()))
            return out

        return wait

    def take(self) -> Communication:
        """What was counted since the last call; the device must have ended its work."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for axis, began, ended in self.spans:
            seconds[axis] += 1e-3 * began.elapsed_time(ended) if self.on_gpu else ended - began
        communication = Communication(dict(self.bytes), dict(seconds))
        self.bytes.clear()
        self.spans.clear()
        self.open.clear()
        return communication

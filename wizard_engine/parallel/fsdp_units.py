"""What is gathered at once and what a rank keeps of it: units, their flat tensors, the places they take in turn."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .flat_layout import Layout, Span
from .mesh import Axis
from .offload import DONE, Event


@dataclass(frozen=True)
class UnitSpec:
    """What is gathered at once.

    Attributes:
        name: for messages.   parameters: name -> parameter.   dtype: what it computes in.
        over: the axis of the mesh whose ranks divide it and add up its gradients: `shard`; `copy` where every rank of a
            copy has tokens of its own for it; `efsdp` of experts.
        resident: stays gathered.   needs_weights: its backward reads them.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    over: Literal["shard", "copy", "efsdp"] = "shard"
    resident: bool = False
    needs_weights: bool = True


@dataclass
class Flat:
    """The parameters of a unit that train, or those that do not, as one flat tensor divided over an axis.

    weights: this rank's part in the compute dtype.   master: in the master dtype, of those that train.
    gradient: in the master dtype, or on one device that of the weights (see accumulate.py); that of a divided one takes
    memory from its first reduction of a step to the next step.   fresh: the next reduction is the first of the step.
    arrived: parameters with a gradient in this step, on one device.   staged: weights in host memory, on their way to
    the device.   landed, sent: events of the last copies of gradients to host memory, and of weights from there.
    """

    layout: Layout
    parameters: list[nn.Parameter]
    axis: Axis
    dtype: torch.dtype
    trains: bool
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    master: Tensor | None = None
    gradient: Tensor | None = None
    fresh: bool = True
    arrived: set[str] = field(default_factory=set)
    staged: Tensor | None = None
    landed: Event = DONE
    sent: Event = DONE

    def spans(self) -> Iterator[Span]:
        """This rank's part of each parameter."""
        return self.layout.spans(self.axis.index)

    def pairs(self, whole: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter with its view of a whole flat tensor."""
        views = self.layout.views(whole)
        return [(parameter, views[slot.name]) for parameter, slot in zip(self.parameters, self.layout.slots)]

    def halves(self) -> tuple[int, int]:
        """Elements of this rank's part that belong to matrices, and to vectors."""
        matrices = self.layout.decayed(self.axis.index)
        return matrices, self.layout.shard_size - matrices


class Place:
    """A buffer for whole units in turn, who has it, and what still moves into it."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.size = 0
        self.owner: Unit | None = None
        self.works: list[Any] = []


class Unit:
    """A unit at work: its flats, the place that it takes, and whether its gradients are on their way.

    slopes: whole gradients that wait for the step's last micro-batch.
    """

    def __init__(self, spec: UnitSpec, index: int, flats: list[Flat], place: Place) -> None:
        self.spec, self.index, self.flats, self.place = spec, index, flats, place
        self.trains = any(flat.trains for flat in flats)
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        self.grads: list[Tensor] = []
        self.attached, self.passed = False, False
        self.absent = [(p, _absent(p, spec.dtype, p.device)) for flat in flats for p in flat.parameters]

    @property
    def sizes(self) -> list[int]:
        """Elements of its place for each flat; none for one that is this rank's alone, used where it stands."""
        return [flat.layout.size if flat.axis.size > 1 else 0 for flat in self.flats]

    def wholes(self) -> list[Tensor]:
        """Whole flat tensors, those in the place to be gathered into."""
        rooms = self.place.buffer[: sum(self.sizes)].split(self.sizes)
        return [room if flat.axis.size > 1 else flat.weights for flat, room in zip(self.flats, rooms)]

    def attach(self, views: Iterable[tuple[nn.Parameter, Tensor]] | None = None) -> None:
        """Point the parameters at gathered numbers."""
        for parameter, view in self.views if views is None else views:
            parameter.data = view
        self.attached = True

    def detach(self) -> None:
        """Point them at NaN of their shape, which takes no memory."""
        for parameter, nothing in self.absent:
            parameter.data = nothing
        self.attached = False


def _absent(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN of a parameter's shape, one of them in memory."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(parameter.shape)


def is_absent(tensor: Tensor) -> bool:
    """Whether a parameter stands for numbers that are not there: several elements, one of them in memory."""
    return tensor.numel() > 1 and not any(tensor.stride())


def materialised(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its parameters on the meta device replaced by absent ones on a device, in place."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta and device.type != "meta":
            owner, _, leaf = name.rpartition(".")
            new = nn.Parameter(_absent(parameter, parameter.dtype, device), requires_grad=parameter.requires_grad)
            setattr(module.get_submodule(owner), leaf, new)
    return module


def merged(units: Sequence[UnitSpec]) -> list[UnitSpec]:
    """One unit per dtype: where nothing is gathered, the fewer buffers the better."""
    dtypes = dict.fromkeys(unit.dtype for unit in units)
    return [
        UnitSpec(
            str(dtype), {n: p for u in units if u.dtype == dtype for n, p in u.parameters.items()}, dtype, resident=True
        )
        for dtype in dtypes
    ]

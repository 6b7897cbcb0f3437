"""Units of FSDP: what is gathered at once, its flat tensors, and the buffers that units take in turn."""

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
    """Parameters that are gathered at once.

    Attributes:
        name: for messages.   parameters: name -> parameter.   dtype: of the computation.
        over: the axis of the mesh that shards the unit and sums its gradients: `shard`; `copy` for parameters that
            every rank of a copy uses with different tokens; `efsdp` for experts.
        resident: stays gathered.   needs_weights: the backward reads the weights.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    over: Literal["shard", "copy", "efsdp"] = "shard"
    resident: bool = False
    needs_weights: bool = True


@dataclass
class Flat:
    """The trained parameters of a unit, or its frozen ones, as one flat tensor sharded over an axis.

    Attributes:
        weights: this rank's shard in the compute dtype.   master: in the master dtype, of trained parameters.
        gradient: in the master dtype; on one device maybe in that of the weights (see gradient_accumulation.py). A
            sharded one exists from the first reduction of a step until the next step.
        fresh: the next reduction is the first of the step.   arrived: parameters with a gradient in this step, on one
            device.
        staged: new weights in host memory, to be copied to the device.   grad_copied, weights_copied: events of the
            last copies of gradients to host memory, and of weights from there.
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
    grad_copied: Event = DONE
    weights_copied: Event = DONE

    def spans(self) -> Iterator[Span]:
        """This rank's range of each parameter."""
        return self.layout.spans(self.axis.index)

    def pairs(self, whole: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter with its view of a whole flat tensor."""
        views = self.layout.views(whole)
        return [(parameter, views[slot.name]) for parameter, slot in zip(self.parameters, self.layout.slots)]

    def decay_split(self) -> tuple[int, int]:
        """Elements of this rank's shard in matrices, which decay, and in vectors, which do not."""
        matrices = self.layout.decayed(self.axis.index)
        return matrices, self.layout.shard_size - matrices


class GatherBuffer:
    """A buffer that units take in turn: its memory, its owner, and the gathers in flight into it."""

    def __init__(self) -> None:
        self.data: Tensor | None = None
        self.size = 0
        self.owner: Unit | None = None
        self.works: list[Any] = []


class Unit:
    """A unit at run time: its flats, its gather buffer, and the state of its gradients.

    Attributes:
        full_grads: unreduced gradients that wait for the step's last micro-batch.   attached: its parameters point at
            gathered weights.   grads_sent: this backward has started to reduce its gradients.
    """

    def __init__(self, spec: UnitSpec, index: int, flats: list[Flat], gather_buffer: GatherBuffer) -> None:
        self.spec, self.index, self.flats, self.gather_buffer = spec, index, flats, gather_buffer
        self.trains = any(flat.trains for flat in flats)
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        self.full_grads: list[Tensor] = []
        self.attached, self.grads_sent = False, False
        self.absent = [(p, _absent(p, spec.dtype, p.device)) for flat in flats for p in flat.parameters]

    @property
    def sizes(self) -> list[int]:
        """Elements of the gather buffer for each flat; 0 for an unsharded flat, which is used in place."""
        return [flat.layout.size if flat.axis.size > 1 else 0 for flat in self.flats]

    def full_tensors(self) -> list[Tensor]:
        """Full flat tensors: views of the gather buffer, or the weights of an unsharded flat."""
        buffers = self.gather_buffer.data[: sum(self.sizes)].split(self.sizes)
        return [buffer if flat.axis.size > 1 else flat.weights for flat, buffer in zip(self.flats, buffers)]

    def attach(self, views: Iterable[tuple[nn.Parameter, Tensor]] | None = None) -> None:
        """Point the parameters at gathered weights."""
        for parameter, view in self.views if views is None else views:
            parameter.data = view
        self.attached = True

    def detach(self) -> None:
        """Point the parameters at NaN of their shape, so that a use without a gather shows; takes no memory."""
        for parameter, nothing in self.absent:
            parameter.data = nothing
        self.attached = False


def _absent(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN of a parameter's shape: one element in memory, expanded."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(parameter.shape)


def is_absent(tensor: Tensor) -> bool:
    """Whether a parameter is a placeholder for weights that are not in memory (see `_absent`)."""
    return tensor.numel() > 1 and not any(tensor.stride())


def materialised(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace a module's parameters on the meta device by placeholders on a device, in place; returns the module."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta and device.type != "meta":
            owner, _, leaf = name.rpartition(".")
            new = nn.Parameter(_absent(parameter, parameter.dtype, device), requires_grad=parameter.requires_grad)
            setattr(module.get_submodule(owner), leaf, new)
    return module


def merged(units: Sequence[UnitSpec]) -> list[UnitSpec]:
    """One unit per dtype, for models without gathers: fewer buffers mean fewer launches."""
    dtypes = dict.fromkeys(unit.dtype for unit in units)
    return [
        UnitSpec(
            str(dtype), {n: p for u in units if u.dtype == dtype for n, p in u.parameters.items()}, dtype, resident=True
        )
        for dtype in dtypes
    ]

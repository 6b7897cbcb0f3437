"""AdamW over this rank's parts of a sharded model: matrices with weight decay, vectors without."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.adamw import adamw
from kernels.offloaded_adamw import offloaded_adamw

from ..parallel import Sharded, parallelize, sharded
from ..parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW of one copy of a model, whose state is divided over the ranks as the parameters are.

    One buffer makes the gradient norm, clipping and the reduction over copies a single operation each, whatever the
    number of parameters. `zero_grad` must be used instead of setting gradients to None.

    Args:
        model: what `parallelize` gave; a plain module becomes one that is not divided.
        betas, epsilon, weight_decay: as in the paper; decay is applied to tensors of two or more dims.
    Attributes:
        count: updates so far.   exp_avg, exp_avg_sq: moments, standing as `Sharded.master` does.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if sharded(model) is None:
            parallelize(model, Mesh(next(model.parameters()).device))
        self.sharded: Sharded = sharded(model)
        self.betas, self.epsilon, self.weight_decay, self.count = betas, epsilon, weight_decay, 0
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.sharded.master) for _ in range(2))

    @property
    def gradients(self) -> list[Tensor]:
        """The flat gradient buffers of this rank."""
        return self.sharded.gradients

    def zero_grad(self) -> None:
        """Begin a step."""
        self.sharded.zero_grad()

    def clip(self, max_norm: float) -> float:
        """Scale the gradients to a norm, over all ranks, of at most `max_norm`; returns the norm before.

        A non-finite norm leaves them alone: the caller decides what to do with the step.
        """
        norm = self.sharded.norm()
        if max_norm > 0 and norm > max_norm and norm != float("inf"):
            for gradient in self.gradients:
                gradient.mul_(max_norm / norm)
        return norm

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`."""
        self.count += 1
        engine = self.sharded
        for where, gradient, decayed, copy in engine.segments():
            buffers = (*(x[where] for x in (engine.master, self.exp_avg, self.exp_avg_sq)), gradient)
            update = offloaded_adamw if engine.host or (copy is not None and copy.device.type == "cpu") else adamw
            update(
                *buffers, lr=lr, betas=self.betas, epsilon=self.epsilon, step=self.count,
                weight_decay=self.weight_decay if decayed else 0.0, copy=copy,
            )  # fmt: skip
        engine.updated()

    def state_parts(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(moment, parameter, start, values): this rank's elements of the moments, from `start` on."""
        for moment in MOMENTS:
            for name, start, values in self.sharded.parts(getattr(self, moment)):
                yield moment, name, start, values

"""AdamW over this rank's parts of a sharded model: matrices with weight decay, vectors without."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels.adamw import adamw
from kernels.offloaded_adamw import offloaded_adamw
from wizard_engine.parallel import Sharded, parallelize, sharded
from wizard_engine.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW of one copy of a model, whose state is divided over the ranks as the parameters are.

    One buffer makes the gradient norm and the update one or two launches each, whatever the number of parameters.
    Nothing waits for the device: whether a step was skipped is read with its other numbers, and `take_back` told then.
    `zero_grad` must be used instead of setting gradients to None.

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
        self._scale: Tensor | None = None

    @property
    def gradients(self) -> list[Tensor]:
        """The flat gradient buffers of this rank."""
        return self.sharded.gradients

    def zero_grad(self, *, multiple: bool = False) -> None:
        """Begin a step; `multiple` as in `Sharded.zero_grad`."""
        self._scale = None
        self.sharded.zero_grad(multiple=multiple)

    def clip(self, max_norm: float, *others: Tensor) -> Tensor:
        """() fp64 on the device: the gradients' norm over all ranks, to which the coming `step` will cut them.

        scale = min(1, max_norm / norm), 1 where max_norm is 0; not finite, so that the step changes nothing, where the
        norm or one of the others is not.

        Args:
            others: () each, on the device, the same on every rank: the loss.
        """
        norm = self.sharded.norm()
        # Tensor by tensor: a number divided by one is multiplied by its reciprocal, which rounds twice.
        factor = norm.new_full((), max_norm) / norm.clamp(min=max_norm) if max_norm > 0 else torch.ones_like(norm)
        for number in (norm, *others):
            # 0 where it is finite, NaN otherwise.
            factor = factor + 0.0 * number
        self._scale = factor.float()
        return norm

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`, of gradients scaled as `clip` said."""
        self.count += 1
        engine, (scale, self._scale) = self.sharded, (self._scale, None)
        host = None
        for where, gradient, decayed, copy in engine.segments():
            buffers = (*(x[where] for x in (engine.master, self.exp_avg, self.exp_avg_sq)), gradient)
            options: dict[str, Any] = {
                "lr": lr,
                "betas": self.betas,
                "epsilon": self.epsilon,
                "step": self.count,
                "copy": copy,
                "weight_decay": self.weight_decay if decayed else 0.0,
            }
            if not (engine.host or (copy is not None and copy.device.type == "cpu")):
                adamw(*buffers, scale=scale, **options)
                continue
            # In host memory the update waits for the gradients, and so may for their scale.
            host = (1.0 if scale is None else float(scale)) if host is None else host
            offloaded_adamw(*buffers, scale=host, **options)
        engine.updated()

    def take_back(self) -> None:
        """The last step's scale was not finite, so that it changed nothing: it does not count."""
        self.count -= 1

    def state_shards(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(moment, parameter, start, values): this rank's elements of the moments, from `start` on."""
        for moment in MOMENTS:
            for name, start, values in self.sharded.shards(getattr(self, moment)):
                yield moment, name, start, values

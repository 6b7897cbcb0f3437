"""AdamW over two flat fp32 buffers: parameters with weight decay (matrices) and without (vectors)."""

import torch
from torch import Tensor, nn

from kernels.adamw import adamw

# Elements of a partial norm: one fp32 sum over a large buffer is off by 1e-4 at 4M and 4e-3 at 50M elements.
NORM_CHUNK = 2**16
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW whose parameters and gradients are views of flat buffers.

    One buffer makes the gradient norm, the all-reduce, clipping and the update a single operation each, whatever the
    number of parameters. Gradients accumulate into the views, so `zero_grad` must be used instead of setting None.

    Args:
        model: its parameters that require a gradient; each is re-pointed into the buffers, in named order.
        betas, epsilon, weight_decay: as in the paper; decay is applied to tensors of two or more dims.
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
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.groups = [[x for x in named if x[1].dim() >= 2], [x for x in named if x[1].dim() < 2]]
        self.groups = [group for group in self.groups if group]
        self.flat = [self._flatten(group) for group in self.groups]
        self.decays = [weight_decay if group[0][1].dim() >= 2 else 0.0 for group in self.groups]
        self.betas, self.epsilon, self.count = betas, epsilon, 0
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(flat.data) for flat in self.flat] for _ in range(2))

    @staticmethod
    def _flatten(group: list[tuple[str, nn.Parameter]]) -> nn.Parameter:
        flat = nn.Parameter(torch.cat([p.detach().float().flatten() for _, p in group]))
        flat.grad = torch.zeros_like(flat)
        offset = 0
        for _, parameter in group:
            end = offset + parameter.numel()
            parameter.data = flat.data[offset:end].view(parameter.shape)
            parameter.grad = flat.grad[offset:end].view(parameter.shape)
            offset = end
        return flat

    @property
    def gradients(self) -> list[Tensor]:
        """The flat gradient buffers."""
        return [flat.grad for flat in self.flat]

    def zero_grad(self) -> None:
        """Clear the gradients in place."""
        for gradient in self.gradients:
            gradient.zero_()

    def clip(self, max_norm: float) -> float:
        """Scale the gradients to a norm of at most `max_norm`; returns the norm before.

        A non-finite norm leaves them alone: the caller decides what to do with the step.
        """
        norm = float(torch.stack([part.norm() for g in self.gradients for part in g.split(NORM_CHUNK)]).norm())
        if max_norm > 0 and norm > max_norm and norm != float("inf"):
            for gradient in self.gradients:
                gradient.mul_(max_norm / norm)
        return norm

    def step(self, lr: float) -> None:
        """One update at learning rate `lr`."""
        self.count += 1
        for flat, exp_avg, exp_avg_sq, decay in zip(self.flat, self.exp_avg, self.exp_avg_sq, self.decays):
            adamw(
                flat.data, exp_avg, exp_avg_sq, flat.grad, lr=lr, betas=self.betas, epsilon=self.epsilon,
                weight_decay=decay, step=self.count,
            )  # fmt: skip

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step count by parameter name, for a checkpoint; nothing before the first step."""
        if not self.count:
            return {}
        tensors = {"step": torch.tensor([float(self.count)])}
        for buffers, group in zip(zip(self.exp_avg, self.exp_avg_sq), self.groups):
            sizes = [parameter.numel() for _, parameter in group]
            for (name, parameter), *parts in zip(group, *(buffer.split(sizes) for buffer in buffers)):
                for moment, part in zip(MOMENTS, parts):
                    tensors[f"{moment}.{name}"] = part.view(parameter.shape).clone()
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` gave.

        Raises:
            ValueError: a moment is missing.
        """
        if not tensors:
            return
        names = [[name for name, _ in group] for group in self.groups]
        for name in (name for group in names for name in group):
            if any(f"{moment}.{name}" not in tensors for moment in MOMENTS):
                raise ValueError(f"optimizer state: expected the moments of {name}, found none")
        self.count = int(tensors["step"])
        for buffers, group in zip(zip(self.exp_avg, self.exp_avg_sq), names):
            for moment, buffer in zip(MOMENTS, buffers):
                buffer.copy_(torch.cat([tensors[f"{moment}.{name}"].float().flatten() for name in group]))

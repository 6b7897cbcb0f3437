"""Losses of a mixture's routers and the load of its experts, over a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wizard_engine.model import ModelConfig
from wizard_engine.model.mixture import Routes, load_metrics
from wizard_engine.parallel import Mesh, pack_over_rows
from wizard_engine.runtime.object_collectives import is_distributed


class RouterMeter:
    """Losses of a mixture's routers and the load of its experts, over a step.

    All calls do nothing for a dense model. No call synchronises the host with the device.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        self.config, self.device, self.mesh = config, mesh.device, mesh
        self._num_tokens: Tensor | float = 0.0
        self._clear()

    def _clear(self) -> None:
        self._loss: Tensor | float = 0.0
        shape = self.config.layers, self.config.experts
        self._load = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def start(self, tokens: int) -> None:
        """Begin a step with this rank's tokens of all its micro-batches; every rank makes the call."""
        if self.config.experts:
            sum_of_ranks = is_distributed()
            self._num_tokens = pack_over_rows({"tokens": tokens}, self.mesh)[0].float() if sum_of_ranks else tokens

    def loss(self, routes: Routes) -> Tensor | float:
        """Router losses of a micro-batch, to be added to its loss; 0.0 for a dense model."""
        router_loss = routes.loss(self.config, self._num_tokens) if routes.logits else 0.0
        load = routes.load()
        if load is not None:
            self._load += load
            self._loss = self._loss + (router_loss.detach() if isinstance(router_loss, Tensor) else router_loss)
        return router_loss

    def pop_sums(self) -> list[Tensor | float]:
        """This rank's router loss and expert load of the step, to be summed over all ranks; clears them. Empty for a
        dense model."""
        if not self.config.experts:
            return []
        sums = [self._loss, self._load]
        self._clear()
        return sums

    def metrics(self, sums: Sequence[float]) -> dict[str, float | list[float]]:
        """The step's router loss and load, out of the sums over all ranks of what `pop_sums` returned."""
        if not self.config.experts:
            return {}
        load = torch.tensor(sums[1:], dtype=torch.float64).view(self._load.shape)
        return {"router_loss": sums[0]} | load_metrics(load)

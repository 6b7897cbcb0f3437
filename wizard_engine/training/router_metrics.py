"""What the routers of a model with experts add to a step: their losses, and the load of the experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wizard_engine.model import ModelConfig
from wizard_engine.model.mixture import Routes, load_metrics
from wizard_engine.parallel import Mesh, pack_over_rows
from wizard_engine.runtime.object_collectives import is_distributed


class RouterMeter:
    """What the routers of a model with experts add to a step: their losses, and the load of the experts.

    For a dense model every call costs nothing and gives nothing. No call reads a number on the host.
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
        """A micro-batch's share of the router's losses, to be added to its loss; 0.0 for a dense model."""
        found = routes.loss(self.config, self._num_tokens) if routes.logits else 0.0
        load = routes.load()
        if load is not None:
            self._load += load
            self._loss = self._loss + (found.detach() if isinstance(found, Tensor) else found)
        return found

    def take(self) -> list[Tensor | float]:
        """This rank's router loss and load of the experts in this step, to be summed over all ranks, and a clean slate;
        nothing for a dense model."""
        if not self.config.experts:
            return []
        numbers = [self._loss, self._load]
        self._clear()
        return numbers

    def metrics(self, sums: Sequence[float]) -> dict[str, float | list[float]]:
        """The step's router loss and load, out of the sums over all ranks of what `take` gave."""
        if not self.config.experts:
            return {}
        load = torch.tensor(sums[1:], dtype=torch.float64).view(self._load.shape)
        return {"router_loss": sums[0]} | load_metrics(load)

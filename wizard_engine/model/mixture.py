"""The mixture of experts: a router and a stack of gated feed-forward blocks, of which each token meets a few."""

import torch
from torch import Tensor, nn

from kernels.moe_route import Routing, expert_counts, load_balancing_loss, moe_route, router_z_loss
from wizard_engine.parallel.context import SINGLE_DEVICE, ParallelContext
from wizard_engine.parallel.expert_parallel import Dispatch

from .config import ModelConfig


class Routes:
    """What the mixture layers of a forward pass chose: given to `model(..., routes=routes)`, it fills up.

    A layer that it already knows is replayed: its tokens go to the same experts, with the gates of now. So a block that
    is computed again in the backward, with the object that its forward had, routes as it did; and a trainer routes as
    its sampler did with `Routes(experts)` of what was recorded there.

    On several ranks that divide the tokens of a row, what it is given is that of the whole row, and what it has then
    that of this rank's tokens.

    Args:
        experts: (T, L, A) integers, the choices to replay; None: each layer chooses.
    Attributes:
        experts: layer -> (T, A).   logits: layer -> (T, E) fp32 of the first pass, with its graph.
        dispatches: layer -> how many rows go to which rank, of the pass that began last.
        real: (T,) bool, False for padding behind the last sequence, or None.
    """

    def __init__(self, experts: Tensor | None = None) -> None:
        self.experts: dict[int, Tensor] = {} if experts is None else dict(enumerate(experts.unbind(1)))
        self.logits: dict[int, Tensor] = {}
        self.dispatches: dict[int, Dispatch] = {}
        self.real: Tensor | None = None
        self._parallel = SINGLE_DEVICE

    def begin(self, real: Tensor, parallel: ParallelContext) -> None:
        """A forward pass over a row starts, of whose tokens those in `real` (T,) are no padding."""
        self._parallel, self.real, self.dispatches = parallel, parallel.shard_tokens(real), {}
        if parallel.shards_tokens:
            self.experts = {layer: _of_tokens(experts, parallel) for layer, experts in self.experts.items()}

    def stacked(self) -> Tensor:
        """(T, L, A) int32 choices of all layers, as the constructor takes them.

        Raises:
            ValueError: no mixture layer has run.
        """
        if not self.experts:
            raise ValueError("routes: expected those of a forward pass of a model with experts, got none")
        return torch.stack([self.experts[layer].int() for layer in sorted(self.experts)], dim=1)

    def loss(self, config: ModelConfig, num_tokens: float | Tensor) -> Tensor | float:
        """This rank's share of the router's losses of a micro-batch, mean over the layers; 0.0 for a dense model.

        balance_loss * load-balancing loss + z_loss * router z-loss, both over real tokens only.

        Args:
            num_tokens: tokens of the step over all ranks and micro-batches.
        """
        total: Tensor | float = 0.0
        counts: dict[int, Tensor] = {}
        if config.balance_loss and self.logits and self._parallel.shards_tokens:
            counts = dict(zip(sorted(self.logits), self._parallel.sum_counts(self.load())))
        for layer, logits_TE in self.logits.items():
            options = {"num_tokens": num_tokens * len(self.logits), "real": self.real}
            if config.balance_loss:
                total = total + config.balance_loss * load_balancing_loss(
                    logits_TE, self.experts[layer], counts=counts.get(layer), **options
                )
            if config.z_loss:
                total = total + config.z_loss * router_z_loss(logits_TE, **options)
        return total

    @torch.no_grad()
    def load(self) -> Tensor | None:
        """(L, E) int64 real tokens that each expert of each layer got; None for a dense model."""
        if not self.logits:
            return None
        layers = sorted(self.logits)
        return torch.stack([expert_counts(self.experts[i], self.logits[i].shape[1], self.real) for i in layers])


def _of_tokens(experts_TA: Tensor, parallel: ParallelContext) -> Tensor:
    """A rank's share of replayed choices; padding goes to the first experts."""
    first_A = torch.arange(experts_TA.shape[1], device=experts_TA.device, dtype=experts_TA.dtype)
    # Offset by one, so that what stands for padding can be told from a choice.
    local_tA = parallel.shard_tokens(experts_TA + 1)
    return torch.where(local_tA > 0, local_tA - 1, first_A)


class Experts(nn.Module):
    """Stacked gated feed-forward blocks, of which a rank may have some alone.

    gate_up: (E, 2 F, D), the gate in the first F rows.   down: (E, D, F).
    """

    parallel: ParallelContext = SINGLE_DEVICE

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.ffn_width, config.width))
        self.down = nn.Parameter(torch.empty(config.experts, config.width, config.ffn_width))
        for weight in (self.gate_up, self.down):
            if not weight.is_meta:
                nn.init.normal_(weight, std=config.init_std)

    def forward(self, x_TD: Tensor, routing: Routing, dispatch: Dispatch | None = None) -> Tensor:
        """(T, D): each token's weighted sum over the experts that it is sent to."""
        return self.parallel.expert_mlp(x_TD, self.gate_up, self.down, routing, dispatch)


class Router(nn.Linear):
    """Scores of the experts."""

    is_router = True


class Mixture(nn.Module):
    """E gated feed-forward blocks behind a router, (E, D); nothing is dropped, whatever the load."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.experts_per_token = layer, config.experts_per_token
        self.experts = Experts(config)
        self.router = Router(config.width, config.experts, bias=False)

    def forward(self, x_TD: Tensor, routes: Routes | None = None) -> Tensor:
        """(T, D): each token's weighted sum over its experts; `routes` records the choice, or replays what it has."""
        replayed = None if routes is None else routes.experts.get(self.layer)
        routing = moe_route(
            x_TD, self.router.weight, experts_per_token=self.experts_per_token, replayed_experts=replayed
        )
        if routes is None:
            return self.experts(x_TD, routing)
        routes.experts.setdefault(self.layer, routing.experts)
        routes.logits.setdefault(self.layer, routing.logits)
        return self.experts(x_TD, routing, routes.dispatches.setdefault(self.layer, Dispatch()))


def load_metrics(load: Tensor) -> dict[str, list[float]]:
    """Per layer, the largest and smallest share of an expert over the mean share, 1.0 where the load is even.

    Args:
        load: (L, E) tokens that each expert of each layer got.
    """
    share_LE = load.double() / load.double().mean(1, keepdim=True).clamp(min=1e-9)
    return {
        "expert_load_max": [round(x, 4) for x in share_LE.amax(1).tolist()],
        "expert_load_min": [round(x, 4) for x in share_LE.amin(1).tolist()],
    }

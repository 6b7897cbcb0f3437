"""Experts that are divided among ranks: tokens travel to the ranks that have their experts, and what those make of them
travels back. Nothing is dropped, whatever the load; every rank takes part in every exchange, also without a row."""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.expert_permute import combine, permute_rows
from kernels.grouped_matmul import expert_mlp
from kernels.moe_route import Routing, expert_layout

from .collectives import Exchange
from .mesh import Axis


def dispatched_mlp(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, axis: Axis) -> Tensor:
    """`kernels.expert_mlp` where rank r of the axis has experts r E / size to (r + 1) E / size.

    The rows of a routing are sorted by expert, so that those for one rank stand together; how many there are is
    exchanged first, and is the only thing that the host waits for.

    Args:
        x: (T, D) this rank's tokens.   gate_up: (E / size, 2 F, D).   down: (E / size, D, F).
        routing: of these tokens over all E experts.
    Returns:
        (T, D). Differentiable in x, routing.gates, gate_up and down; what the weights get is the sum over the tokens of
        all ranks.
    """
    local = gate_up.shape[0]
    counts = routing.counts.view(axis.size, local)
    incoming = torch.empty_like(counts)
    dist.all_to_all_single(incoming, counts.contiguous(), group=axis.group)
    sent, received = split_sizes(counts, incoming, routing)
    rows = Exchange.apply(permute_rows(x, routing), sent, received, axis)
    own = expert_mlp(rows, gate_up, down, expert_layout(incoming, sum(received)))
    return combine(Exchange.apply(own, received, sent, axis), routing)


def split_sizes(counts: Tensor, incoming: Tensor, routing: Routing) -> tuple[list[int], list[int]]:
    """Rows sent to each rank, and received from each, on the host.

    On the meta device, where there are no numbers, an even load.
    """
    if counts.is_meta:
        even = routing.rows.numel() // counts.shape[0]
        rest = routing.rows.numel() - even * counts.shape[0]
        sizes = [even + (rank < rest) for rank in range(counts.shape[0])]
        return sizes, sizes
    sent, received = torch.stack((counts.sum(1), incoming.sum(1))).tolist()
    return sent, received

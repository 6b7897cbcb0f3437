"""Expert parallelism: tokens travel to the ranks that have their experts, and the results travel back.

Nothing is dropped, whatever the load. Every rank takes part in every exchange, even without a row to send.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.expert_permute import combine, permute_rows
from kernels.grouped_matmul import expert_mlp
from kernels.moe_route import Routing, expert_layout

from .collectives import AllToAll
from .mesh import Axis


class Dispatch:
    """Row counts of a layer's all-to-all, per rank of an axis. They are exchanged and read by the host once.

    A recomputed block and both backward exchanges use the same counts, so that the host waits once per layer.

    Attributes:
        incoming: (size, E / size) rows of each of this rank's experts from each rank; None before `begin`.
    """

    def __init__(self) -> None:
        self.incoming: Tensor | None = None
        self._sizes: tuple[list[int], list[int]] | None = None
        self._host: Tensor | None = None
        self._event: Any = None

    def begin(self, counts: Tensor, axis: Axis) -> None:
        """Exchange counts (size, E / size), and start to copy the row totals of both directions to the host."""
        self.incoming = torch.empty_like(counts)
        dist.all_to_all_single(self.incoming, counts.contiguous(), group=axis.group)
        # The planner simulates steps on the meta device: collectives count there, values do not exist.
        if counts.is_meta:
            return
        # The host needs the totals to size the all-to-all. The copy goes to pinned memory without a wait, so that the
        # permutation can be queued before `sizes` blocks.
        totals = torch.stack((counts.sum(1), self.incoming.sum(1)))
        self._host = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=totals.is_cuda)
        self._host.copy_(totals, non_blocking=True)
        if totals.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(totals.device))

    def sizes(self, rows: int) -> tuple[list[int], list[int]]:
        """Rows sent to each rank, and received from each; the first call waits for the device.

        On the meta device, which has no values, `rows` rows spread evenly.
        """
        if self._sizes is None:
            self._sizes = self._even(rows) if self.incoming.is_meta else self._read()
        return self._sizes

    def _even(self, rows: int) -> tuple[list[int], list[int]]:
        ranks = self.incoming.shape[0]
        sizes = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
        return sizes, sizes

    def _read(self) -> tuple[list[int], list[int]]:
        if self._event is not None:
            self._event.synchronize()
        sent, received = self._host.tolist()
        self._host = self._event = None
        return sent, received


def dispatched_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, axis: Axis, dispatch: Dispatch | None = None
) -> Tensor:
    """`kernels.expert_mlp` where rank r of the axis has experts r E / size to (r + 1) E / size.

    The rows of a routing are sorted by expert, so that the rows for one rank are contiguous. Their counts are exchanged
    first. They are the only values that the host waits for, and the permutation is queued before it waits.

    Args:
        x: (T, D) this rank's tokens.   gate_up: (E / size, 2 F, D).   down: (E / size, D, F).
        routing: of these tokens over all E experts.   dispatch: of this layer; pass the same one to a recomputation.
    Returns:
        (T, D). Differentiable in x, routing.gates, gate_up and down. Gradients of the weights are sums over the tokens
        of all ranks.
    """
    dispatch = Dispatch() if dispatch is None else dispatch
    if dispatch.incoming is None:
        dispatch.begin(routing.counts.view(axis.size, gate_up.shape[0]), axis)
    # Queued before the wait in `sizes`: the device permutes while the host waits for the counts.
    permuted = permute_rows(x, routing)
    sent, received = dispatch.sizes(routing.rows.numel())
    # Rows arrive by source rank, each part sorted by expert; `expert_layout` finds every expert's ranges among them.
    rows = AllToAll.apply(permuted, sent, received, axis)
    expert_out = expert_mlp(rows, gate_up, down, expert_layout(dispatch.incoming, sum(received)))
    return combine(AllToAll.apply(expert_out, received, sent, axis), routing)

"""How the tokens of a packed row, the matrices and the experts of a model are divided among ranks.

    row     a packed row of T tokens, padded to what divides evenly, is cut into 2 cp chunks; context-parallel rank r
            has chunks r and 2 cp - 1 - r, so that all have as many pairs of query and key
    tokens  tensor-parallel ranks divide those evenly: norms, routers, the residual stream
    matrix  before a product whose rows are divided (q, k, v; gate, up; the vocabulary) the tokens are gathered over tp,
            behind one whose columns are divided (out; down) they are summed and divided again
    keys    keys and values are gathered over cp
    experts tokens go to the ranks that have their experts and back

On one device every one of these does nothing, and so they do while a model is gathered whole to sample from.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention
from kernels.grouped_matmul import expert_mlp
from kernels.linear_logprob import VocabularyShard
from kernels.moe_route import Routing
from kernels.shared_prefix import Prefixes, pick, shared_attention

from .collectives import AllGather, AllGatherLinear, AllGatherReplicated, ReduceScatter, all_gather_rows
from .expert_parallel import Dispatch, dispatched_mlp
from .mesh import Axis, Mesh


@dataclass
class ParallelContext:
    """What one rank has of rows, tokens, matrices and experts.

    Attributes:
        tp, cp, ep, row: axes of the mesh.   words: of the whole vocabulary.
        keeps_tokens: products with gathered tokens keep this rank's alone (else what they gathered: right where the
            backward computes it again).   whole: nothing is divided for now.
    """

    tp: Axis = field(default_factory=Axis)
    cp: Axis = field(default_factory=Axis)
    ep: Axis = field(default_factory=Axis)
    row: Axis = field(default_factory=Axis)
    vocab_size: int = 0
    regather_in_backward: bool = True
    is_gathered: bool = False

    @classmethod
    def from_mesh(cls, mesh: Mesh, vocab_size: int, *, regather_in_backward: bool) -> "ParallelContext":
        """That of a mesh."""
        return cls(mesh.tp, mesh.cp, mesh.ep, mesh.row, vocab_size, regather_in_backward)

    # Which tokens

    @property
    def shards_tokens(self) -> bool:
        """Whether several ranks have the same rows and each its own tokens of them."""
        return self._shards(self.row)

    def _shards(self, axis: Axis) -> bool:
        return axis.size > 1 and not self.is_gathered

    def _padded(self, tokens: int) -> int:
        """Tokens of a row that divides evenly."""
        least = self.tp.size * (2 * self.cp.size if self.cp.size > 1 else 1)
        return -(-tokens // least) * least

    def shard_over_cp(self, x_T: Tensor, fill: float = 0) -> Tensor:
        """What this context-parallel rank has of per-token values (T, ...) of a whole row, padding included."""
        if not self._shards(self.row):
            return x_T
        missing = self._padded(x_T.shape[0]) - x_T.shape[0]
        if missing:
            x_T = torch.cat((x_T, x_T.new_full((missing, *x_T.shape[1:]), fill)))
        if self.cp.size == 1:
            return x_T
        chunks = x_T.chunk(2 * self.cp.size)
        return torch.cat((chunks[self.cp.index], chunks[-1 - self.cp.index]))

    def shard_tokens(self, x_T: Tensor, fill: float = 0) -> Tensor:
        """What this rank has of per-token values (T, ...) of a whole row, padding included."""
        if not self._shards(self.row):
            return x_T
        return self.shard_over_cp(x_T, fill).chunk(self.tp.size)[self.tp.index]

    def gather_over_cp(self, x: Tensor, tokens: int) -> Tensor:
        """Per-token values (T, ...) of a whole row from those that each context-parallel rank has; no gradient."""
        if not self._shards(self.row):
            return x
        if self.cp.size > 1:
            x = _in_order(all_gather_rows(x, self.cp)[0], self.cp.size)
        return x[:tokens]

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """Per-token values (T, ...) of a whole row from those of each rank's tokens; all do the same with them."""
        if not self._shards(self.row):
            return x
        # Ranks of a row are in the order of cp, then of tp, as their tokens are.
        return _in_order(AllGatherReplicated.apply(x, self.row), self.cp.size)[:tokens]

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Counts of this rank's tokens summed over the ranks of a row."""
        if not self._shards(self.row):
            return counts
        total = counts.clone()
        torch.distributed.all_reduce(total, group=self.row.group)
        return total

    # Products

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        """This rank's rows of an embedding of its row's tokens, whose words are divided over tp."""
        if not self._shards(self.tp):
            return F.embedding(tokens_T, weight_VD)
        local_T = tokens_T - self.tp.index * weight_VD.shape[0]
        elsewhere_T = (local_T < 0) | (local_T >= weight_VD.shape[0])
        x_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), weight_VD).masked_fill(elsewhere_T[:, None], 0.0)
        return ReduceScatter.apply(x_TD, self.tp)

    def gather_over_tp(self, x_TD: Tensor) -> Tensor:
        """The tokens of the row's ranks of tp, each of which has its own use for them."""
        return AllGather.apply(x_TD, self.tp) if self._shards(self.tp) else x_TD

    def pick(self, x_TD: Tensor, rows: Tensor) -> Tensor:
        """Rows of the tokens of a whole row, which `head` takes for another row: padded as it pads one."""
        if self._shards(self.row):
            rows = torch.cat((rows, rows.new_zeros(self._padded(rows.shape[0]) - rows.shape[0])))
        return pick(x_TD, rows)

    def column_parallel(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        """All tokens of the row's ranks of tp times a matrix (N, D) of which each has other rows."""
        if not self._shards(self.tp):
            return F.linear(x_TD, weight)
        if self.regather_in_backward:
            return AllGatherLinear.apply(x_TD, weight, self.tp)
        return F.linear(AllGather.apply(x_TD, self.tp), weight)

    def row_parallel(self, x: Tensor, weight: Tensor) -> Tensor:
        """This rank's tokens of the product with a matrix (D, N) of which tp ranks have other columns each, as of x."""
        out = F.linear(x, weight)
        return ReduceScatter.apply(out, self.tp) if self._shards(self.tp) else out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | Prefixes, max_seqlen: int, *, window: int | None
    ) -> Tensor:  # fmt: skip
        """`kernels.attention` of this rank's queries over the keys of the whole row.

        A chunk's queries stand at the end of the keys before the chunk's end, document by document.
        """
        if isinstance(cu_seqlens, Prefixes):
            assert not self._shards(self.cp), "context-parallel ranks take whole sequences"
            return shared_attention(q, k, v, cu_seqlens, window=window)
        if not self._shards(self.cp):
            return attention(q, k, v, cu_seqlens, max_seqlen, window=window)
        size, chunk = self.cp.size, q.shape[0] // 2
        k, v = (_in_order(AllGather.apply(x, self.cp), size) for x in (k, v))
        out = []
        for number, queries in zip((self.cp.index, 2 * size - 1 - self.cp.index), q.split(chunk)):
            first, last = number * chunk, (number + 1) * chunk
            out.append(
                attention(
                    queries, k[:last], v[:last], cu_seqlens.clamp(first, last) - first, min(max_seqlen, chunk),
                    cu_seqlens_k=cu_seqlens.clamp(max=last), max_seqlen_k=min(max_seqlen, last), window=window,
                )
            )  # fmt: skip
        return torch.cat(out)

    def expert_mlp(
        self, x_TD: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, dispatch: Dispatch | None
    ) -> Tensor:
        """`kernels.expert_mlp` of this rank's tokens, each expert where it is."""
        if not self._shards(self.ep):
            return expert_mlp(x_TD, gate_up, down, routing)
        return dispatched_mlp(x_TD, gate_up, down, routing, self.ep, dispatch)

    def vocabulary_shard(self, weight_VD: Tensor) -> VocabularyShard | None:
        """What this rank has of the vocabulary and of a row's tokens, for the kernels that end in log-probabilities."""
        if not self._shards(self.row):
            return None

        def gather(local: Tensor) -> Tensor:
            return all_gather_rows(local[None], self.tp)[0] if self.tp.size > 1 else local[None]

        def to_row(local: Tensor, tokens: int) -> Tensor:
            return self.gather_over_cp(local.T, tokens).T.contiguous()

        return VocabularyShard(self.tp.index * weight_VD.shape[0], self.vocab_size, gather, self.shard_over_cp, to_row)


def _in_order(x: Tensor, size: int) -> Tensor:
    """Per-token values in the order of the row from those in the order of its context-parallel ranks."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size)
    return torch.cat([*chunks[::2], *reversed(chunks[1::2])])


SINGLE_DEVICE = ParallelContext()

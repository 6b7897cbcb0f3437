"""Tensor, sequence, context and expert parallelism of a forward pass, as methods that the model calls.

    context   a packed row of T tokens is padded and cut into 2 cp chunks. Rank r has chunks r and 2 cp - 1 - r, so that
              under a causal mask all ranks have the same number of query-key pairs
    sequence  tp ranks shard these tokens evenly: norms, routers, the residual stream
    tensor    tokens are all-gathered over tp before a column-parallel product (q, k, v; gate, up; the vocabulary), and
              reduce-scattered after a row-parallel one (out; down)
    keys      keys and values are all-gathered over cp
    experts   tokens travel to the ranks that have their experts, and back

On one device all of these do nothing. The same holds while a model is gathered whole to sample from.

Source: Shoeybi et al. 2019, arXiv:1909.08053 (tensor); Korthikanti et al. 2022, arXiv:2205.05198 (sequence).
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
    """One rank's position in tensor, context and expert parallelism.

    Attributes:
        tp, cp, ep, row: axes of the mesh; row joins cp and tp.   vocab_size: of the whole vocabulary.
        regather_in_backward: column-parallel products save this rank's tokens and gather them again in the backward;
            otherwise they save the gathered ones, which is right where a recomputation gathers them anyway.
        is_gathered: the model is whole for now, so nothing is sharded.
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
        """The context of this rank of a mesh."""
        return cls(mesh.tp, mesh.cp, mesh.ep, mesh.row, vocab_size, regather_in_backward)

    # Tokens

    @property
    def shards_tokens(self) -> bool:
        """Whether several ranks share a packed row, each with different tokens."""
        return self._shards(self.row)

    def _shards(self, axis: Axis) -> bool:
        return axis.size > 1 and not self.is_gathered

    def _padded(self, tokens: int) -> int:
        """Tokens of a row padded to a multiple of the ranks' chunks."""
        least = self.tp.size * (2 * self.cp.size if self.cp.size > 1 else 1)
        return -(-tokens // least) * least

    def shard_over_cp(self, x_T: Tensor, fill: float = 0) -> Tensor:
        """This cp rank's tokens of per-token values (T, ...) of a whole row, with padding."""
        if not self._shards(self.row):
            return x_T
        missing = self._padded(x_T.shape[0]) - x_T.shape[0]
        # Padding stands at the end of the row, behind the last document, where no query of a real token sees it.
        if missing:
            x_T = torch.cat((x_T, x_T.new_full((missing, *x_T.shape[1:]), fill)))
        if self.cp.size == 1:
            return x_T
        # A late chunk attends to more keys than an early one: pairing r with 2 cp - 1 - r balances the work.
        chunks = x_T.chunk(2 * self.cp.size)
        return torch.cat((chunks[self.cp.index], chunks[-1 - self.cp.index]))

    def shard_tokens(self, x_T: Tensor, fill: float = 0) -> Tensor:
        """This rank's tokens of per-token values (T, ...) of a whole row, with padding."""
        if not self._shards(self.row):
            return x_T
        return self.shard_over_cp(x_T, fill).chunk(self.tp.size)[self.tp.index]

    def gather_over_cp(self, x: Tensor, tokens: int) -> Tensor:
        """Per-token values (T, ...) of a whole row out of those of all cp ranks; not differentiable."""
        if not self._shards(self.row):
            return x
        if self.cp.size > 1:
            x = _in_order(all_gather_rows(x, self.cp)[0], self.cp.size)
        return x[:tokens]

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """Per-token values (T, ...) of a whole row out of those of all ranks. Differentiable where every rank computes
        the same from the result."""
        if not self._shards(self.row):
            return x
        # Ranks of a row are ordered by cp, then tp, and so are their tokens: only the cp chunks need reordering.
        return _in_order(AllGatherReplicated.apply(x, self.row), self.cp.size)[:tokens]

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Token counts summed over the ranks of a row."""
        if not self._shards(self.row):
            return counts
        total = counts.clone()
        torch.distributed.all_reduce(total, group=self.row.group)
        return total

    # Products

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Embeddings of this rank's tokens, out of a table whose vocabulary entries are sharded over tp."""
        if not self._shards(self.tp):
            return F.embedding(tokens_T, weight_VD)
        # Every rank embeds all tokens of its cp rank, with zeros for entries of other ranks; the sum is the embedding.
        local_T = tokens_T - self.tp.index * weight_VD.shape[0]
        elsewhere_T = (local_T < 0) | (local_T >= weight_VD.shape[0])
        x_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), weight_VD).masked_fill(elsewhere_T[:, None], 0.0)
        return ReduceScatter.apply(x_TD, self.tp)

    def gather_over_tp(self, x_TD: Tensor) -> Tensor:
        """The tokens of all tp ranks. Each rank computes something else from them, so gradients are summed."""
        return AllGather.apply(x_TD, self.tp) if self._shards(self.tp) else x_TD

    def pick(self, x_TD: Tensor, rows: Tensor) -> Tensor:
        """Chosen tokens of a whole row as a new row, padded so that `vocabulary_shard` accepts it."""
        if self._shards(self.row):
            rows = torch.cat((rows, rows.new_zeros(self._padded(rows.shape[0]) - rows.shape[0])))
        return pick(x_TD, rows)

    def column_parallel(self, x_TD: Tensor, weight: Tensor) -> Tensor:
        """The tokens of all tp ranks times this rank's output features: weight (N / tp, D)."""
        if not self._shards(self.tp):
            return F.linear(x_TD, weight)
        # One autograd node for gather and product, so that the backward can overlap its collectives with products.
        if self.regather_in_backward:
            return AllGatherLinear.apply(x_TD, weight, self.tp)
        return F.linear(AllGather.apply(x_TD, self.tp), weight)

    def row_parallel(self, x: Tensor, weight: Tensor) -> Tensor:
        """This rank's tokens of x times a matrix, whose input features are sharded over tp: weight (D, N / tp)."""
        out = F.linear(x, weight)
        return ReduceScatter.apply(out, self.tp) if self._shards(self.tp) else out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | Prefixes, max_seqlen: int, *, window: int | None
    ) -> Tensor:
        """`kernels.attention` of this rank's queries over the keys of the whole row.

        A chunk ends at key `last`. Its queries belong to the last of the keys up to there, document by document, which
        is what `attention` assumes when there are more keys than queries.
        """
        if isinstance(cu_seqlens, Prefixes):
            assert not self._shards(self.cp), "context-parallel ranks take whole sequences"
            return shared_attention(q, k, v, cu_seqlens, window=window)
        if not self._shards(self.cp):
            return attention(q, k, v, cu_seqlens, max_seqlen, window=window)
        size, chunk = self.cp.size, q.shape[0] // 2
        k, v = (_in_order(AllGather.apply(x, self.cp), size) for x in (k, v))
        out = []
        # Two calls, one per chunk: between the two chunks lie tokens of other ranks.
        for number, queries in zip((self.cp.index, 2 * size - 1 - self.cp.index), q.split(chunk)):
            first, last = number * chunk, (number + 1) * chunk
            # Clamping the boundaries to [first, last) leaves empty documents where a document has no query or key.
            out.append(
                attention(
                    queries,
                    k[:last],
                    v[:last],
                    cu_seqlens.clamp(first, last) - first,
                    min(max_seqlen, chunk),
                    cu_seqlens_k=cu_seqlens.clamp(max=last),
                    max_seqlen_k=min(max_seqlen, last),
                    window=window,
                )
            )
        return torch.cat(out)

    def expert_mlp(
        self, x_TD: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, dispatch: Dispatch | None
    ) -> Tensor:
        """`kernels.expert_mlp` of this rank's tokens; each expert runs on the rank that has it."""
        if not self._shards(self.ep):
            return expert_mlp(x_TD, gate_up, down, routing)
        return dispatched_mlp(x_TD, gate_up, down, routing, self.ep, dispatch)

    def vocabulary_shard(self, weight_VD: Tensor) -> VocabularyShard | None:
        """This rank's vocabulary entries and tokens, for the kernels that end in log-probabilities; None: all."""
        if not self._shards(self.row):
            return None

        # Closures, so that the loss kernels shard and gather without knowing about meshes.
        def gather(local: Tensor) -> Tensor:
            return all_gather_rows(local[None], self.tp)[0] if self.tp.size > 1 else local[None]

        def to_row(local: Tensor, tokens: int) -> Tensor:
            return self.gather_over_cp(local.T, tokens).T.contiguous()

        return VocabularyShard(self.tp.index * weight_VD.shape[0], self.vocab_size, gather, self.shard_over_cp, to_row)


def _in_order(x: Tensor, size: int) -> Tensor:
    """Per-token values in the order of the row, out of those in the order of cp ranks: chunks 0, 2n-1, 1, 2n-2, ..."""
    if size == 1:
        return x
    chunks = x.chunk(2 * size)
    return torch.cat([*chunks[::2], *reversed(chunks[1::2])])


SINGLE_DEVICE = ParallelContext()

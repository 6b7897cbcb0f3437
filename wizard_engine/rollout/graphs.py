"""Steps of single tokens as CUDA graphs: one launch instead of hundreds, for batches and lengths of a few sizes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.paged_attention import PagedBatch

if TYPE_CHECKING:
    from .engine import Step

# Keys that the smallest graph is for; larger ones are for four times as many each.
FIRST_LENGTH = 512


def batch_size(sequences: int, most: int) -> int:
    """The number of sequences of the graph for so many: 1, 2, 4, 8, multiples of 16, at most `most`."""
    small = [n for n in (1, 2, 4, 8) if n >= sequences]
    return min(small[0] if small else -(-sequences // 16) * 16, most)


def length_size(longest: int, most: int) -> int:
    """The number of keys of the graph for so many, at most `most`."""
    size = FIRST_LENGTH
    while size < longest:
        size *= 4
    return min(size, most)


class DecodeGraphs:
    """Graphs of a function of a step, by the numbers of sequences and keys that they have room for.

    A graph reads its inputs from tensors of its own, into which a step is copied. Sequences that are not there have no
    keys, and write into the page behind the last one.

    Args:
        function: of a step of single tokens, to hidden states.   sequences: most of a step.   length: most keys.
        scratch: where the keys of padding go.
    """

    def __init__(
        self, function: Callable[["Step"], Tensor], device: torch.device, *, sequences: int, length: int, scratch: int
    ) -> None:
        self.function, self.device = function, device
        self.sequences, self.length, self.scratch = sequences, length, scratch
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Step, Tensor]] = {}
        self._pool = None

    def run(self, step: "Step") -> Tensor:
        """(B, D) hidden states of a step of B single tokens."""
        count = len(step.batch.counts)
        padded = self.padded(step)
        key = len(padded.batch.counts), padded.batch.max_length
        if key not in self._graphs:
            self._graphs[key] = self._capture(padded)
        graph, inputs, hidden = self._graphs[key]
        for mine, given in zip(tensors(inputs), tensors(padded)):
            mine.copy_(given)
        graph.replay()
        return hidden[:count]

    def padded(self, step: "Step") -> "Step":
        """The step with more sequences, without keys, and columns of the table up to the next size."""
        batch = step.batch
        count, page = len(batch.counts), batch.page
        size = batch_size(count, self.sequences)
        length = -(-length_size(batch.max_length, self.length) // page) * page
        missing = size - count
        return type(step)(
            F.pad(step.tokens[:count], (0, missing)), F.pad(step.positions[:count], (0, missing)),
            F.pad(step.slots[:count], (0, missing), value=self.scratch),
            PagedBatch(
                F.pad(batch.page_table, (0, length // page - batch.page_table.shape[1], 0, missing)),
                F.pad(batch.lengths, (0, missing)), [1] * size, length, size, page, checked=True,
            ),
        )  # fmt: skip

    def forget(self) -> None:
        """The tensors that graphs read are no more."""
        self._graphs.clear()
        self._pool = None

    def _capture(self, step: "Step") -> tuple[torch.cuda.CUDAGraph, "Step", Tensor]:
        inputs = type(step)(*(x.clone() for x in step[:3]), _copied(step.batch))
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            # Kernels are compiled and libraries loaded before anything is recorded.
            self.function(inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self.function(inputs)
        self._pool = self._pool or graph.pool()
        return graph, inputs, hidden


def tensors(step: "Step") -> list[Tensor]:
    """All that a graph reads."""
    return [*step[:3], step.batch.page_table, step.batch.lengths]


def _copied(batch: PagedBatch) -> PagedBatch:
    return PagedBatch(
        batch.page_table.clone(), batch.lengths.clone(), batch.counts, batch.max_length, batch.decodes, batch.page, True
    )

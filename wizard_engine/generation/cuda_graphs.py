"""Decode steps as CUDA graphs: one launch instead of hundreds, for batches and lengths of a few sizes."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .step_batch import Step

# Keys of the smallest graph; each larger graph has room for four times as many.
FIRST_LENGTH = 512


def batch_size(sequences: int, limit: int) -> int:
    """Sequences of the graph that runs `sequences`: 1, 2, 4, 8 or a multiple of 16, at most `limit`."""
    small = [n for n in (1, 2, 4, 8) if n >= sequences]
    return min(small[0] if small else -(-sequences // 16) * 16, limit)


def length_size(longest: int, limit: int) -> int:
    """Keys of the graph that runs `longest` keys, at most `limit`."""
    size = FIRST_LENGTH
    while size < longest:
        size *= 4
    return min(size, limit)


class Replayed(Protocol):
    """Interface of a captured graph."""

    def replay(self) -> None:
        """Launch the graph."""


class Captured(NamedTuple):
    """A graph, the step whose tensors it reads, and the tensor of its result."""

    graph: Replayed
    inputs: Step
    hidden: Tensor


class DecodeGraphs:
    """Graphs of a function of a decode step, one for each size in sequences and keys.

    A graph reads the tensors that it was captured with. A step of the same sizes must have the same addresses, which
    `Staging` guarantees. So must all other tensors that the function reads.

    Graphs share one pool of memory. It holds the temporaries of the largest and the results of all, (rows, D) each: at
    most (max_sequences / 16 + 4) graphs a length, 18 MB of results at D = 4096 in bf16 and 256 sequences.

    Args:
        function: decode step -> hidden states.   sequences: largest number in a step.   length: largest number of keys.
    Attributes:
        captures: number of captures so far.   pool_bytes: memory of the pool.
    """

    def __init__(
        self, function: Callable[[Step], Tensor], device: torch.device, *, sequences: int, length: int
    ) -> None:
        self.function, self.device = function, device
        self.sequences, self.length = sequences, length
        self.captures = self.pool_bytes = 0
        self._graphs: dict[tuple[int, int], Captured] = {}
        self._pool = None

    def room(self, sequences: int, longest: int, page: int) -> tuple[int, int]:
        """Sequences and keys, whole pages, of the graph for a step."""
        return batch_size(sequences, self.sequences), -(-length_size(longest, self.length) // page) * page

    def lengths(self, longest: int) -> list[int]:
        """Lengths of the graphs for steps of up to `longest` keys."""
        sizes = [length_size(1, self.length)]
        while sizes[-1] < min(longest, self.length):
            sizes.append(length_size(sizes[-1] + 1, self.length))
        return sizes

    def run(self, step: Step) -> Tensor:
        """(T, D) hidden states of a step padded to a graph's sizes; valid until the next call."""
        key = len(step.batch.counts), step.batch.max_length
        if key not in self._graphs:
            self._graphs[key] = self._capture(step)
            self.captures += 1
        graph, inputs, hidden = self._graphs[key]
        assert inputs.batch.page_table.data_ptr() == step.batch.page_table.data_ptr(), (
            "the step has other addresses than the captured one"
        )
        graph.replay()
        return hidden

    def forget(self) -> None:
        """Drop all graphs: a tensor that they read has moved or is freed."""
        self._graphs.clear()
        self._pool, self.pool_bytes = None, 0

    def _capture(self, step: Step) -> Captured:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            # Compile kernels and load libraries before the capture.
            self.function(step)
        torch.cuda.current_stream(self.device).wait_stream(side)
        # A capture empties the cache, too. Do it before, so that the difference is the pool's memory alone.
        torch.cuda.empty_cache()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(self.device)
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self.function(step)
        self.pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        self._pool = self._pool or graph.pool()
        return Captured(graph, step, hidden)

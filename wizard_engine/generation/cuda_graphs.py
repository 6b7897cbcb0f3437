"""Decode steps as CUDA graphs: one launch instead of hundreds, for batches and lengths of a few sizes."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .step_batch import Step

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


class Replayed(Protocol):
    """What a captured graph does."""

    def replay(self) -> None:
        """Run what was captured."""


class Captured(NamedTuple):
    """A graph, the step whose tensors it reads, and where its result stands."""

    graph: Replayed
    inputs: Step
    hidden: Tensor


class DecodeGraphs:
    """Graphs of a function of a decode step, by the numbers of sequences and keys that they have room for.

    A graph reads the tensors that it was captured with: a step of the same sizes must stand at the same addresses, as
    `Staging` has it, and so must all else that the function reads.

    Graphs share one pool of memory. It holds the temporaries of the largest and the results of all, (rows, D) each: at
    most (max_sequences / 16 + 4) graphs a length, 18 MB of results at D = 4096 in bf16 and 256 sequences.

    Args:
        function: of a decode step, to hidden states.   sequences: most of a step.   length: most keys.
    Attributes:
        captures: graphs captured since the beginning.   pool_bytes: memory that their captures have taken.
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
        """A length for each graph that steps of up to `longest` keys take."""
        found = [length_size(1, self.length)]
        while found[-1] < min(longest, self.length):
            found.append(length_size(found[-1] + 1, self.length))
        return found

    def run(self, step: Step) -> Tensor:
        """(T, D) hidden states of a step of exactly a graph's sizes, padding included; they hold until the next one."""
        key = len(step.batch.counts), step.batch.max_length
        if key not in self._graphs:
            self._graphs[key] = self._capture(step)
            self.captures += 1
        graph, inputs, hidden = self._graphs[key]
        assert inputs.batch.page_table.data_ptr() == step.batch.page_table.data_ptr(), "the step stands elsewhere"
        graph.replay()
        return hidden

    def forget(self) -> None:
        """What graphs read stands elsewhere now, or is no more."""
        self._graphs.clear()
        self._pool, self.pool_bytes = None, 0

    def _capture(self, step: Step) -> Captured:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            # Kernels are compiled and libraries loaded before anything is recorded.
            self.function(step)
        torch.cuda.current_stream(self.device).wait_stream(side)
        # A capture begins with this, too: only what the pool takes is counted.
        torch.cuda.empty_cache()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(self.device)
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self.function(step)
        self.pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        self._pool = self._pool or graph.pool()
        return Captured(graph, step, hidden)

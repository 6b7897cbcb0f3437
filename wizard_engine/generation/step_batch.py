"""Inputs of a step from the host: the packed tokens of its chunks and their positions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.paged_attention import PagedBatch

from .scheduler import Chunk


class Step(NamedTuple):
    """The tokens of a step and their positions; T counts the padding.

    tokens: (M + T,) int64: those that the previous step sampled, then those from the host.
    sources: (T,) int64, index into `tokens` of each one.   positions, slots: (T,) int64.   batch: of the attention.
    """

    tokens: Tensor
    sources: Tensor
    positions: Tensor
    slots: Tensor
    batch: PagedBatch


class Packed(NamedTuple):
    """A step on the host.

    arrays: tokens, sources, positions, slots (T,) int64, lengths (S,) and page_table (S, N) int32, to be staged.
    """

    arrays: tuple[Tensor, ...]
    counts: list[int]
    longest: int
    decodes: int
    checked: bool

    def step(self, staged: list[Tensor], tokens: Tensor, page: int) -> Step:
        """The step out of what was staged, with (M + T,) `tokens`."""
        _, sources, positions, slots, lengths, table = staged
        batch = PagedBatch(table, lengths, self.counts, self.longest, self.decodes, page, checked=self.checked)
        return Step(tokens, sources, positions, slots, batch)


class Packer:
    """Packs the chunks of steps, and keeps their page table.

    Args:
        pages: of the cache; page `pages` takes the keys of padding.   page_size: tokens of each.
        max_sequences, max_length: of a step.   sampled: M, room for the tokens that the previous step sampled.
        unit: rows of a step are padded to multiples of it.
    """

    def __init__(
        self, *, pages: int, page_size: int, max_sequences: int, max_length: int, sampled: int, unit: int
    ) -> None:
        self.page_size, self.scratch = page_size, pages * page_size
        self.sampled, self.unit = sampled, unit
        self.table = torch.zeros(max_sequences, -(-max_length // page_size), dtype=torch.int32)

    def pack(self, chunks: list[Chunk], room: tuple[int, int] | None = None) -> Packed:
        """The step of some chunks, single tokens first.

        Args:
            room: sequences and keys to pad a decode step to; absent sequences have no keys.
        """
        self._write_table(chunks)
        counts = [chunk.count for chunk in chunks]
        lengths = torch.tensor([chunk.start + chunk.count for chunk in chunks], dtype=torch.int32)
        decodes = sum(count == 1 for count in counts)
        sequences, longest = room or (len(chunks), max(chunk.start + chunk.count for chunk in chunks))
        table = self.table[[chunk.sequence.row for chunk in chunks]]
        tokens, sources = self._tokens(chunks)
        if decodes == len(chunks):
            positions = lengths.long() - 1
            pages = table.gather(1, (positions // self.page_size)[:, None])[:, 0]
        else:
            owner = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(counts))
            positions = torch.cat([torch.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks])
            pages = table[owner, positions // self.page_size]
        slots = pages.long() * self.page_size + positions % self.page_size
        table = table[:, : -(-longest // self.page_size)]
        rows = len(tokens) + sequences - len(chunks)
        missing = rows + -rows % self.unit - len(tokens)
        tokens, positions = F.pad(tokens, (0, missing)), F.pad(positions, (0, missing))
        # The first of the padding is token 0, whatever the step has.
        sources = F.pad(sources, (0, missing), value=self.sampled + len(sources))
        slots = F.pad(slots, (0, missing), value=self.scratch)
        absent = sequences - len(chunks)
        table, lengths = F.pad(table, (0, 0, 0, absent)).contiguous(), F.pad(lengths, (0, absent))
        arrays = tokens, sources, positions, slots, lengths, table
        if room is None:
            return Packed(arrays, counts, longest, decodes, False)
        return Packed(arrays, [1] * sequences, longest, sequences, True)

    def _tokens(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
        """Ids that the host knows (0 for others), and each token's index: after the sampled ones, or among them."""
        tokens, sources = [], []
        for sequence, start, count in chunks:
            if start == len(sequence.ids):
                tokens.append(0)
                sources.append(sequence.place)
            else:
                sources += range(self.sampled + len(tokens), self.sampled + len(tokens) + count)
                tokens += sequence.ids[start : start + count]
        return torch.tensor(tokens, dtype=torch.int64), torch.tensor(sources, dtype=torch.int64)

    def _write_table(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            pages = sequence.allocation.pages
            if sequence.tabled < len(pages):
                self.table[sequence.row, sequence.tabled : len(pages)] = torch.tensor(
                    pages[sequence.tabled :], dtype=torch.int32
                )
                sequence.tabled = len(pages)

"""Generation on a model's own weights: each step packs tokens of many sequences, whose keys stand in pages."""

import functools
import itertools
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from kernels.paged_attention import paged_attention, write_pages
from kernels.rope import rope_tables
from kernels.sample import sample
from wizard_engine.model import Routes, Transformer
from wizard_engine.parallel.collectives import all_gather_rows

from .cuda_graphs import DecodeGraphs
from .device_memory import LentTensors
from .paged_cache import PagePool
from .scheduler import Chunk, Reason, Sampling, Scheduler, Sequence, numbered
from .staging import Staging
from .step_batch import Packed, Packer, Step
from .token_sampling import Draws, Flight

# Rows of a product that a CPU computes alike whatever their number: it has other code for fewer.
CPU_ROWS = 16


def cache_bytes(model: Transformer, tokens: int) -> int:
    """Memory of the keys and values of so many tokens on this rank."""
    config = model.config
    kv_heads = config.kv_heads // model.parallel.tp.size
    return 2 * config.layers * tokens * kv_heads * config.head_width * model.embedding.weight.element_size()


class Engine:
    """Continues prompts with continuous batching over a paged cache of keys and values.

    `add` sequences, call `step` while there `has_work`; each step computes one token of every running sequence and
    pieces of new prompts. What a sequence gets depends on its own prompt and sampling alone: on a CPU its numbers are
    bit-equal whatever runs beside it, on a GPU up to the rounding that a matrix product's code for another number of
    rows has.

    Where tensor- or expert-parallel ranks divide the model, each of them makes the same calls and gets the same tokens.

    Args:
        model: whole on this rank, or divided over tp and ep.   cache_tokens: that the cache holds, all sequences.
        page_size: tokens of a page; default 16 on a CPU, 64 on a GPU.   max_sequences: that run at once.
        max_tokens: of one step.   record_routes: keep where the experts of a mixture sent each token.
        use_graphs: on a GPU, replay decode steps as CUDA graphs.
        keeps_addresses: graphs stay valid over `release` and `restore`, on a GPU whose driver can.
        lookahead: start a step before the tokens of the one before are read: the host plans while the device computes;
            default: on a GPU. Sequences get the same tokens, one call of `step` later.
    Raises:
        ValueError: numbers out of range, or a model whose rows context-parallel ranks divide.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        cache_tokens: int,
        page_size: int | None = None,
        max_sequences: int = 256,
        max_tokens: int = 2048,
        record_routes: bool = False,
        use_graphs: bool = True,
        keeps_addresses: bool = False,
        lookahead: bool | None = None,
    ) -> None:
        self.model, self.config = model, model.config
        self.device = model.embedding.weight.device
        on_gpu = self.device.type == "cuda"
        self.page_size = page_size or (64 if on_gpu else 16)
        if self.page_size % 16:
            raise ValueError(f"page_size: expected a multiple of 16, got {self.page_size}")
        if model.parallel.cp.size > 1 and not model.parallel.is_gathered:
            raise ValueError("model: expected one whose rows no context-parallel ranks divide")
        self.pages = max(1, cache_tokens // self.page_size)
        self.max_sequences, self.max_tokens = max_sequences, max(max_tokens, max_sequences)
        self.records_routes = record_routes and bool(self.config.experts)
        self.lookahead = on_gpu if lookahead is None else lookahead
        self.pool = PagePool(self.pages, self.page_size)
        self.scheduler = Scheduler(
            self.pool, max_sequences=max_sequences, max_tokens=self.max_tokens, max_length=self.config.max_positions
        )
        self._stage()
        positions = torch.arange(self.scheduler.max_length, device=self.device)
        self.tables = rope_tables(positions, self.config.head_width, self.config.rope_base) if on_gpu else None
        self.memory = self._memory(keeps_addresses)
        self.keys = self.values = self.routes = None
        self._addresses: tuple[int, ...] = ()
        uses_graphs = use_graphs and on_gpu and not model.parallel.ep.size > 1
        self.graphs = self._graphs() if uses_graphs else None
        self.flight: Flight | None = None
        self.steps = self.generated = 0
        self.restore()

    def _stage(self) -> None:
        """Have buffers for what the host tells the device, and for the tokens that a step samples in front of it."""
        longest, most = self.scheduler.max_length, self.max_sequences
        unit = 1 if self.model.parallel.is_gathered else self.model.parallel.tp.size
        unit *= CPU_ROWS if self.device.type == "cpu" else 1
        columns = -(-longest // self.page_size)
        # Of each token, four numbers; of each sequence its length and pages, its row, a copy, and how it is sampled.
        room = 32 * (self.max_tokens + unit) + 4 * most * (1 + columns) + 8 * (most + CPU_ROWS) + 32 * most + 256
        self.staging = Staging(self.device, room, kept=8 * most)
        self.words = self.staging.buffer.view(torch.int64)
        self.sampled = self.words[: self.staging.kept // 8]
        self.packer = Packer(
            pages=self.pages,
            page_size=self.page_size,
            max_sequences=most,
            max_length=longest,
            sampled=len(self.sampled),
            unit=unit,
        )

    def _graphs(self) -> DecodeGraphs:
        return DecodeGraphs(self._blocks, self.device, sequences=self.max_sequences, length=self.scheduler.max_length)

    # Memory and weights

    def _memory(self, stays: bool) -> LentTensors:
        """That of keys, values and routes."""
        config, model = self.config, self.model
        kv_heads = config.kv_heads // (1 if model.parallel.is_gathered else model.parallel.tp.size)
        # A page more, for the keys of padding.
        cache = (config.layers, self.pages + 1, self.page_size, kv_heads, config.head_width)
        like = [(cache, model.embedding.weight.dtype)] * 2
        if self.records_routes:
            like.append(((self.pages + 1, self.page_size, config.layers, config.experts_per_token), torch.int16))
        return LentTensors(like, self.device, stays=stays)

    def restore(self) -> None:
        """Have memory for the cache, after `release`."""
        if self.keys is None:
            self.keys, self.values, *routes = self.memory.restore()
            self.routes = routes[0] if routes else None
            self._find_graphs()

    def release(self) -> None:
        """Give the memory of the cache back; what was in it is forgotten.

        Raises:
            ValueError: sequences have not ended.
        """
        if self.has_work:
            raise ValueError("engine: expected no sequences that have not ended when its memory is given back")
        self.keys = self.values = self.routes = self.flight = None
        self.memory.release()
        self.pool.forget()

    def forget(self) -> None:
        """The weights have changed: no new sequence takes keys of the former ones."""
        self.pool.forget()
        self._find_graphs()

    def _find_graphs(self) -> None:
        """Graphs are valid as long as weights and cache stand where they stood."""
        if self.graphs is None or self.keys is None:
            return
        tensors = [*self.model.parameters(), *(x for x in (self.keys, self.values, self.routes) if x is not None)]
        now = tuple(x.data_ptr() for x in tensors)
        if now != self._addresses:
            self.graphs.forget()
        self._addresses = now

    # Sequences in and out

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended, or waits for a token that is not read yet."""
        unread = () if self.flight is None else self.flight.grown
        return self.scheduler.has_work or any(s.reason is None for s in unread)

    def add(self, prompt: Several[int], sampling: Sampling, *, n: int = 1) -> list[Sequence]:
        """`n` sequences of one prompt, with the uniform numbers of `n` rows.

        Raises:
            ValueError: an empty prompt, one that leaves no room, or ids outside the vocabulary.
        """
        return self.add_all(prompt, numbered(sampling, n))

    def add_all(self, prompt: Several[int], samplings: Several[Sampling]) -> list[Sequence]:
        """A sequence of one prompt for each sampling."""
        self.check(prompt, *samplings)
        return self.scheduler.add(prompt, samplings)

    def check(self, prompt: Several[int], *samplings: Sampling) -> None:
        """ValueError unless a prompt has room beside its new tokens, and ids of the vocabulary alone."""
        self.scheduler.check(prompt, samplings)
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise ValueError(
                f"prompt: expected ids of 0 to {self.config.vocab_size - 1}, got {min(prompt)} to {max(prompt)}"
            )

    def finish(self, sequence: Sequence, reason: Reason) -> None:
        """End a sequence where it stands; its pages are free for others at once, and a token on its way is dropped."""
        sequence.pending = 0
        self._keep_experts(sequence)
        self.scheduler.finish(sequence, reason)

    def cancel(self, sequence: Sequence) -> None:
        """Nobody wants the sequence any more."""
        self.finish(sequence, "cancelled")

    def run(self) -> None:
        """Step until every sequence has ended."""
        while self.has_work:
            self.step()

    # A step

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """Compute the next tokens; the sequences that got one that the host has read, those that ended included.

        With `lookahead` those are the tokens of the step before, read while this one runs.
        """
        grown = []
        if self.flight is not None and self.scheduler.is_short:
            # Who has ended already gives up its pages before anybody else does.
            grown = self._land()
        chunks = self.scheduler.plan()
        flight = self._launch(chunks) if chunks else None
        if self.flight is not None:
            grown = self._land()
        self.flight = flight
        if flight is not None and not self.lookahead:
            return self._land()
        for sequence in flight.grown if flight is not None else ():
            if sequence.reason is None and sequence.drawn == sequence.sampling.max_new_tokens:
                self._keep_experts(sequence)
                self.scheduler.retire(sequence)
        return grown

    def _launch(self, chunks: list[Chunk]) -> Flight | None:
        """Tell the device to compute some chunks and draw the tokens behind them."""
        single = all(chunk.count == 1 for chunk in chunks)
        room = None
        if self.graphs is not None and single:
            longest = max(chunk.start + 1 for chunk in chunks)
            room = self.graphs.room(len(chunks), longest, self.page_size)
        packed = self.packer.pack(chunks, room)
        for chunk in chunks:
            self.scheduler.done(chunk)
        rows, grown, copies = self._grown(chunks)
        draws = Draws.of(grown)
        step, (rows_R, copies_2N, *options) = self._staged(packed, self._padded(rows), copies, draws.arrays)
        hidden_TD = self._blocks(step) if room is None else self.graphs.run(step)[: len(chunks)]
        if copies:
            self._copy_pages(*copies_2N)
        self.steps += 1
        if not grown:
            return None
        logits_BV = self._logits(hidden_TD, rows, rows_R)
        tokens, logprobs = sample(logits_BV, **draws.options(options))
        if self.lookahead:
            self.sampled[: len(grown)].copy_(tokens)
        for place, sequence in enumerate(grown):
            sequence.pending, sequence.place = sequence.pending + 1, place
        return Flight.of(grown, logits_BV, tokens, logprobs)

    def _land(self) -> list[Sequence]:
        """Read what the step before has drawn; the sequences that it was for. Tokens behind an end are dropped."""
        flight, self.flight = self.flight, None
        grown = []
        for sequence, (token, logprob, top) in zip(flight.grown, flight.read()):
            if sequence.reason is not None:
                continue
            grown.append(sequence)
            sequence.pending -= 1
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            if top is not None:
                sequence.top.append(top)
            if token in sequence.sampling.eos_ids:
                self.finish(sequence, "stop")
            elif sequence.steps == sequence.sampling.max_new_tokens:
                self.finish(sequence, "length")
            elif sequence.row >= 0:
                self.scheduler.register(sequence)
        self.generated += len(grown)
        return grown

    def _grown(self, chunks: list[Chunk]) -> tuple[list[int], list[Sequence], list[tuple[int, int]]]:
        """Rows of the step whose hidden state a sequence's next token comes of; those sequences; pages to copy."""
        rows, grown, copies, at = [], [], [], -1
        for chunk in chunks:
            at += chunk.count
            if not chunk.is_last:
                continue
            rows.append(at)
            grown.append(chunk.sequence)
            if chunk.sequence.followers:
                for follower, source, target in self.scheduler.fork(chunk.sequence):
                    rows.append(at)
                    grown.append(follower)
                    if source >= 0:
                        copies.append((source, target))
        return rows, grown, copies

    def _padded(self, rows: list[int]) -> list[int]:
        """Rows of the logits' product, of a number that changes nothing on a CPU."""
        return rows + rows[-1:] * (-len(rows) % CPU_ROWS if self.device.type == "cpu" else 0)

    def _staged(
        self, packed: Packed, rows: list[int], copies: list[tuple[int, int]], options: tuple[Tensor, ...]
    ) -> tuple[Step, list[Tensor]]:
        """The step on the device; rows, copies and options there."""
        others = (
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(copies, dtype=torch.int64).view(-1, 2).T.contiguous(),
        )
        staged = self.staging.put((*packed.arrays, *others, *options))
        mine, others = staged[: len(packed.arrays)], staged[len(packed.arrays) :]
        words = self.words[: self.packer.sampled + len(packed.arrays[0])]
        return packed.step(mine, words, self.page_size), others

    def _copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        for cache in (self.keys, self.values):
            cache[:, targets] = cache[:, sources]
        if self.routes is not None:
            self.routes[targets] = self.routes[sources]

    def capture(self, batches: Several[int], longest: int) -> None:
        """Capture the graphs of decode steps of these numbers of sequences and up to so many keys, ahead of the steps.

        Does nothing without graphs.
        """
        if self.graphs is None:
            return
        with torch.no_grad():
            for sequences, length in itertools.product(batches, self.graphs.lengths(longest)):
                room = self.graphs.room(sequences, length, self.page_size)
                self.graphs.run(self._staged(self.packer.pack([], room), [], [], ())[0])

    @property
    def captures(self) -> int:
        """Graphs that were captured so far."""
        return 0 if self.graphs is None else self.graphs.captures

    def _blocks(self, step: Step) -> Tensor:
        """(T, D) hidden states of a packed step after the last norm; keys and values go into the cache."""
        model, config, parallel = self.model, self.config, self.model.parallel
        tables, positions = self.tables, step.positions
        if tables is None:
            tables, positions = rope_tables(positions, config.head_width, config.rope_base), None
        stream_TD, delta_TD = model.embedding(step.tokens.index_select(0, step.sources)), None
        routes = Routes() if self.records_routes else None
        if routes is not None:
            routes.begin(torch.ones_like(step.sources, dtype=torch.bool), parallel)
        for layer, block in enumerate(model.blocks):
            attend = functools.partial(self._attend, layer, step, *tables, positions)
            stream_TD, delta_TD = block.decode(stream_TD, delta_TD, attend, routes)
        if routes is not None:
            chosen = parallel.gather_over_tp(routes.stacked())
            self.routes.view(-1, *self.routes.shape[2:])[step.slots] = chosen.to(torch.int16)
        # Not called as a module: that would start a gather where a trainer shards this model.
        return parallel.gather_over_tp(model.norm.forward(delta_TD, stream_TD)[0])

    def _attend(
        self, layer: int, step: Step, cos: Tensor, sin: Tensor, positions: Tensor | None, qkv: Tensor
    ) -> Tensor:
        """(T, H, C) attention of a step's tokens over their pages, which its keys and values join."""
        keys, values = self.keys[layer], self.values[layer]
        heads = qkv.view(qkv.shape[0], -1, self.config.head_width)
        q_THC = write_pages(heads, cos, sin, keys, values, step.slots, positions)
        return paged_attention(q_THC, keys, values, step.batch, window=self.config.window)

    def _logits(self, hidden_TD: Tensor, rows: list[int], rows_R: Tensor) -> Tensor:
        """(B, V) fp32 logits after some rows, which are on the device, and padded, as `rows_R`."""
        parallel = self.model.parallel
        if rows != list(range(hidden_TD.shape[0])):
            hidden_TD = hidden_TD.index_select(0, rows_R)
        logits_BV = self.model.logits(hidden_TD)[: len(rows)]
        if parallel.tp.size > 1 and not parallel.is_gathered:
            parts, _ = all_gather_rows(logits_BV[None], parallel.tp)
            logits_BV = parts.transpose(0, 1).reshape(len(rows), -1)
        return logits_BV

    def _keep_experts(self, sequence: Sequence) -> None:
        """Have (n, L, A) int16 experts of every token that a sequence has read, before its pages are others'."""
        if self.records_routes and sequence.row >= 0:
            read = min(sequence.computed, sequence.length - 1)
            pages = torch.tensor(sequence.held.pages, device=self.device)
            sequence.experts = self.routes[pages].flatten(0, 1)[:read].cpu()

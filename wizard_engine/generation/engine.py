"""Generation engine: each step packs tokens of many sequences, with a paged KV cache."""

import functools
import itertools
from collections import abc

import torch
from torch import Tensor

from kernels.paged_attention import paged_attention, write_pages
from kernels.rope import rope_tables
from kernels.sample import sample
from wizard_engine.model import Routes, Transformer
from wizard_engine.parallel.collectives import all_gather_rows

from . import penalties
from .allowed_ids import masked_ids
from .cuda_graphs import DecodeGraphs
from .device_memory import LentTensors
from .paged_cache import PagePool
from .scheduler import Chunk, Reason, Sampling, Scheduler, Sequence, numbered
from .staging import Staging, copy_to_host
from .step_batch import Packed, Packer, Step
from .token_sampling import Draws, Flight, kept, likeliest

# Products with a multiple of this many rows are bit-equal on a CPU, which has other code for fewer.
CPU_ROWS = 16


def cache_bytes(model: Transformer, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens on this rank."""
    config = model.config
    kv_heads = config.kv_heads // model.parallel.tp.size
    return 2 * config.layers * tokens * kv_heads * config.head_width * model.embedding.weight.element_size()


class Engine:
    """Continues prompts with continuous batching over a paged cache of keys and values.

    `add` sequences and call `step` while the engine `has_work`. Each step computes one token of every running sequence
    and prefill chunks of new prompts. The tokens of a sequence depend on its prompt and sampling alone. On a CPU its
    logits are bit-equal for every batch. On a GPU they differ by the rounding of matrix products with another number of
    rows. What fails for one sequence ends it with reason "error" and a text in `error`; the others are not changed.

    Tensor- and expert-parallel ranks make the same calls and get the same tokens.

    Args:
        model: unsharded, or sharded over tp and ep.   cache_tokens: capacity of the cache over all sequences.
        page_size: tokens of a page; default 16 on a CPU, 64 on a GPU.   max_sequences: that run at once.
        max_tokens: of one step.   record_routes: for mixtures, keep the experts of each token.
        use_graphs: on a GPU, replay decode steps as CUDA graphs.
        keeps_addresses: graphs stay valid over `release` and `restore`, if the GPU's driver supports it.
        lookahead: start a step before the previous one's tokens are read, so that the host plans while the device
            computes; default: on a GPU. `step` returns the same tokens one call later.
        allowed_ids: (V,) bool, see `allowed_ids.allowed_ids`; other ids are never drawn. None: all are allowed.
    Raises:
        ValueError: an option out of range, or a model with context parallelism.
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
        allowed_ids: Tensor | None = None,
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
        self.masked_ids = masked_ids(allowed_ids, self.config.vocab_size, self.device)
        self._unbiased = frozenset() if self.masked_ids is None else frozenset(self.masked_ids.tolist())
        self.pool = PagePool(self.pages, self.page_size)
        self.scheduler = Scheduler(
            self.pool, max_sequences=max_sequences, max_tokens=self.max_tokens, max_length=self.config.max_positions
        )
        self.failures = self.scheduler.failures
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
        """Allocate the staging buffer, with a region for sampled tokens in front."""
        longest, most = self.scheduler.max_length, self.max_sequences
        unit = 1 if self.model.parallel.is_gathered else self.model.parallel.tp.size
        unit *= CPU_ROWS if self.device.type == "cpu" else 1
        columns = -(-longest // self.page_size)
        # Four integers a token; for each sequence its length, pages, row, page copy and sampling parameters.
        room = 32 * (self.max_tokens + unit) + 4 * most * (1 + columns) + 8 * (most + CPU_ROWS) + 32 * most + 256
        self.staging = Staging(self.device, room, kept=8 * most)
        self.buffer_int64 = self.staging.buffer.view(torch.int64)
        self.sampled = self.buffer_int64[: self.staging.kept // 8]
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
        """Memory of keys, values and routes."""
        config, model = self.config, self.model
        kv_heads = config.kv_heads // (1 if model.parallel.is_gathered else model.parallel.tp.size)
        # One more page, for the keys of padding.
        cache = (config.layers, self.pages + 1, self.page_size, kv_heads, config.head_width)
        like = [(cache, model.embedding.weight.dtype)] * 2
        if self.records_routes:
            like.append(((self.pages + 1, self.page_size, config.layers, config.experts_per_token), torch.int16))
        return LentTensors(like, self.device, stays=stays)

    def restore(self) -> None:
        """Allocate the cache again after `release`."""
        if self.keys is None:
            self.keys, self.values, *routes = self.memory.restore()
            self.routes = routes[0] if routes else None
            self._find_graphs()

    def release(self) -> None:
        """Free the cache and drop its contents.

        Raises:
            ValueError: sequences have not ended.
        """
        if self.has_work:
            raise ValueError("engine: expected no sequences that have not ended when its memory is given back")
        self.keys = self.values = self.routes = self.flight = None
        self.memory.release()
        self.pool.forget()

    def forget(self) -> None:
        """Drop cached keys after a change of the weights."""
        self.pool.forget()
        self._find_graphs()

    def _find_graphs(self) -> None:
        """Drop the graphs if an address of the weights or the cache has changed."""
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
        """Whether a sequence has not ended or has an unread token."""
        unread = () if self.flight is None else self.flight.grown
        return self.scheduler.has_work or any(s.reason is None for s in unread)

    def add(self, prompt: abc.Sequence[int], sampling: Sampling, *, n: int = 1) -> list[Sequence]:
        """`n` sequences of one prompt, with the uniform numbers of `n` rows.

        Raises:
            ValueError: an empty prompt, one that leaves no room, or ids outside the vocabulary.
        """
        return self.add_all(prompt, numbered(sampling, n))

    def add_all(self, prompt: abc.Sequence[int], samplings: abc.Sequence[Sampling]) -> list[Sequence]:
        """A sequence of one prompt for each sampling."""
        self.check(prompt, *samplings)
        return self.scheduler.add(prompt, samplings)

    def check(self, prompt: abc.Sequence[int], *samplings: Sampling) -> None:
        """Raise ValueError unless the prompt has room beside its new tokens and all ids are in the vocabulary."""
        self.scheduler.check(prompt, samplings)
        for token, _ in itertools.chain.from_iterable(sampling.logit_bias for sampling in samplings):
            if not 0 <= token < self.config.vocab_size or token in self._unbiased:
                raise ValueError(f"logit_bias: expected ids that text has, below {self.config.vocab_size}, got {token}")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise ValueError(
                f"prompt: expected ids of 0 to {self.config.vocab_size - 1}, got {min(prompt)} to {max(prompt)}"
            )

    def finish(self, sequence: Sequence, reason: Reason) -> None:
        """End a sequence now: free its pages and drop its unread tokens."""
        sequence.pending = 0
        self.failures.attempt(sequence, self._keep_experts, sequence)
        self.scheduler.finish(sequence, reason)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence with reason "cancelled"."""
        self.finish(sequence, "cancelled")

    def run(self) -> None:
        """Step until every sequence has ended."""
        while self.has_work:
            self.step()

    # A step

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """Compute the next tokens; returns the sequences with a new token, ended ones included, and those that failed.

        With `lookahead` these are the tokens of the previous step, read while this one runs. A sequence that failed has
        the reason "error" and no new token.
        """
        grown = self._advance()
        failed = self.failures.take()
        return [s for s in grown if s.reason != "error"] + failed if failed else grown

    def _advance(self) -> list[Sequence]:
        """Plan and launch a step, and read a flight; returns the sequences of the flight."""
        grown = []
        if self.flight is not None and self.scheduler.is_short:
            # Ended sequences release their pages before a running one is preempted.
            grown = self._land()
        chunks = self.scheduler.plan()
        flight = self._launch(chunks) if chunks else None
        if self.flight is not None:
            grown = self._land()
        self.flight = flight
        if flight is not None and not self.lookahead:
            return self._land()
        if flight is not None:
            ended = [(s,) for s in flight.grown if s.reason is None and s.drawn == s.sampling.max_new_tokens]
            self.failures.each(ended, self._retire)
        return grown

    def _retire(self, sequence: Sequence) -> None:
        """Free row and pages of a sequence whose last token is sampled."""
        self._keep_experts(sequence)
        self.scheduler.retire(sequence)

    def _launch(self, chunks: list[Chunk]) -> Flight | None:
        """Launch the chunks and the sampling of their next tokens."""
        chunks, packed = self.failures.together(chunks, self._packed)
        if packed is None:
            return None
        packed, is_graph = packed
        self.failures.each(chunks, self.scheduler.done)
        grown_rows, copies = self._grown(chunks)
        grown_rows, draws = self.failures.together(grown_rows, Draws.of)
        grown, rows = [s for s, _ in grown_rows], [row for _, row in grown_rows]
        options = () if draws is None else draws.arrays
        step, (rows_R, copies_2N, *options) = self._staged(packed, self._padded(rows), copies, options)
        hidden_TD = self.graphs.run(step)[: len(chunks)] if is_graph else self._blocks(step)
        if copies:
            self._copy_pages(*copies_2N)
        self.steps += 1
        if not grown:
            return None
        logits_BV = self._logits(hidden_TD, rows, rows_R)
        changes = self._penalties(grown) if self.scheduler.penalised else None
        if changes is not None:
            changes.apply(logits_BV)
        tokens, logprobs = sample(logits_BV, **draws.options(options), checks_values=False)
        if changes is not None:
            changes.count(tokens)
        if self.lookahead:
            self.sampled[: len(grown)].copy_(tokens)
        for place, sequence in enumerate(grown):
            sequence.pending, sequence.place = sequence.pending + 1, place
        return Flight.of(grown, tokens, logprobs, self._tops(grown, logits_BV, tokens, logprobs))

    def _packed(self, chunks: list[Chunk]) -> tuple[Packed, bool]:
        """The packed chunks, and whether a graph runs them."""
        if self.graphs is None or any(chunk.count > 1 for chunk in chunks):
            return self.packer.pack(chunks), False
        longest = max(chunk.start + 1 for chunk in chunks)
        return self.packer.pack(chunks, self.graphs.room(len(chunks), longest, self.page_size)), True

    def _penalties(self, grown: list[Sequence]) -> penalties.Penalties | None:
        for sequence in grown:
            self.failures.attempt(sequence, penalties.start, sequence, self.config.vocab_size, self.device)
        return penalties.Penalties.of(grown, self.device)

    def _tops(
        self, grown: list[Sequence], logits_BV: Tensor, tokens: Tensor, logprobs: Tensor
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Likeliest tokens of the rows that report them, in a copy to the host."""

        def top(i: int, sampling: Sampling) -> tuple[Tensor, ...]:
            return tuple(copy_to_host(x) for x in likeliest(logits_BV[i], sampling, tokens[i], logprobs[i]))

        reporting = [(i, s) for i, s in enumerate(grown) if s.sampling.top_logprobs]
        return {i: self.failures.attempt(s, top, i, s.sampling) for i, s in reporting}

    def _land(self) -> list[Sequence]:
        """Read the sampled tokens of the previous step; returns its sequences. Drops tokens of ended sequences."""
        flight, self.flight = self.flight, None
        landed = [row for row in flight.read() if row[0].reason is None]
        self.failures.each(landed, self._grow)
        self.generated += len(landed)
        return [sequence for sequence, *_ in landed]

    def _grow(self, sequence: Sequence, token: int, logprob: float, top: tuple[Tensor, Tensor] | None) -> None:
        """Append a sequence's next token; end the sequence where that is the last one."""
        sampling = sequence.sampling
        if logprob != logprob:
            raise ValueError(
                f"logits: expected numbers for new token {sequence.steps}, got NaN or infinity; look for them in the "
                "model's weights, or take a dtype with a larger range"
            )
        if top is not None:
            sequence.top.append(kept(sampling, *top))
        sequence.pending -= 1
        sequence.ids.append(token)
        sequence.logprobs.append(logprob)
        if token in sampling.eos_ids:
            self.finish(sequence, "stop")
        elif sequence.steps == sampling.max_new_tokens:
            self.finish(sequence, "length")
        elif sequence.row >= 0:
            self.scheduler.register(sequence)

    def _grown(self, chunks: list[Chunk]) -> tuple[list[tuple[Sequence, int]], list[tuple[int, int]]]:
        """Sequences that get their next token, and their rows of the step; pages to copy."""
        grown, copies, at = [], [], -1
        for chunk in chunks:
            at += chunk.count
            if chunk.sequence.reason is not None or not chunk.is_last:
                continue
            grown.append((chunk.sequence, at))
            if chunk.sequence.followers:
                for follower, source, target in self.scheduler.fork(chunk.sequence):
                    grown.append((follower, at))
                    if source >= 0:
                        copies.append((source, target))
        return grown, copies

    def _padded(self, rows: list[int]) -> list[int]:
        """Rows of the logits' product, padded to a multiple of CPU_ROWS on a CPU."""
        return rows + rows[-1:] * (-len(rows) % CPU_ROWS if self.device.type == "cpu" else 0)

    def _staged(
        self, packed: Packed, rows: list[int], copies: list[tuple[int, int]], options: tuple[Tensor, ...]
    ) -> tuple[Step, list[Tensor]]:
        """The step, rows, copies and options on the device."""
        others = (
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(copies, dtype=torch.int64).view(-1, 2).T.contiguous(),
        )
        staged = self.staging.stage((*packed.arrays, *others, *options))
        mine, others = staged[: len(packed.arrays)], staged[len(packed.arrays) :]
        tokens = self.buffer_int64[: self.packer.sampled + len(packed.arrays[0])]
        return packed.step(mine, tokens, self.page_size), others

    def _copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        for cache in (self.keys, self.values):
            cache[:, targets] = cache[:, sources]
        if self.routes is not None:
            self.routes[targets] = self.routes[sources]

    def capture(self, batches: abc.Sequence[int], longest: int) -> None:
        """Capture the graphs of decode steps with these batch sizes and up to `longest` keys in advance.

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
        """Number of graphs captured so far."""
        return 0 if self.graphs is None else self.graphs.captures

    def _blocks(self, step: Step) -> Tensor:
        """(T, D) hidden states of a packed step after the last norm; writes keys and values to the cache."""
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
        """(T, H, C) attention of a step's tokens over their pages; writes their keys and values first."""
        keys, values = self.keys[layer], self.values[layer]
        heads = qkv.view(qkv.shape[0], -1, self.config.head_width)
        q_THC = write_pages(heads, cos, sin, keys, values, step.slots, positions)
        return paged_attention(q_THC, keys, values, step.batch, window=self.config.window)

    def _logits(self, hidden_TD: Tensor, rows: list[int], rows_R: Tensor) -> Tensor:
        """(B, V) fp32 logits of some rows; `rows_R`: the same rows, padded, on the device."""
        parallel = self.model.parallel
        if rows != list(range(hidden_TD.shape[0])):
            hidden_TD = hidden_TD.index_select(0, rows_R)
        logits_BV = self.model.logits(hidden_TD)[: len(rows)]
        if parallel.tp.size > 1 and not parallel.is_gathered:
            shards, _ = all_gather_rows(logits_BV[None], parallel.tp)
            logits_BV = shards.transpose(0, 1).reshape(len(rows), -1)
        if self.masked_ids is not None:
            logits_BV.index_fill_(1, self.masked_ids, -torch.inf)
        return logits_BV

    def _keep_experts(self, sequence: Sequence) -> None:
        """Copy the (n, L, A) int16 experts of a sequence's tokens to the host before its pages are reused."""
        if self.records_routes and sequence.row >= 0:
            read = min(sequence.computed, sequence.length - 1)
            pages = torch.tensor(sequence.allocation.pages, device=self.device)
            sequence.experts = self.routes[pages].flatten(0, 1)[:read].cpu()

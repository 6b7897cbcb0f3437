"""Generation on a model's own weights: each step packs tokens of many sequences, whose keys stand in pages."""

from collections.abc import Sequence as Several
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.paged_attention import PagedBatch, paged_attention, write_pages
from kernels.rope import rope_tables
from kernels.sample import sample

from ..model import Routes, Transformer
from ..model.mixture import Mixture
from ..parallel.collectives import gathered_rows
from .graphs import DecodeGraphs
from .pages import PagePool
from .scheduler import Chunk, Reason, Sampling, Scheduler, Sequence, next_uniforms, numbered

# Rows of a product that a CPU computes alike whatever their number: it has other code for fewer.
CPU_ROWS = 8


class Step(NamedTuple):
    """Where the tokens of a step stand.

    tokens, positions, slots: (T,) int64, padding included.   batch: of the attention.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    batch: PagedBatch


def cache_bytes(model: Transformer, tokens: int) -> int:
    """Memory of the keys and values of so many tokens on this rank."""
    config = model.config
    kv_heads = config.kv_heads // model.spread.tp.size
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
        use_graphs: on a GPU, replay the step of single tokens as a CUDA graph.
    Raises:
        ValueError: numbers out of range, or a model whose rows context-parallel ranks divide.
    """

    def __init__(
        self, model: Transformer, *, cache_tokens: int, page_size: int | None = None, max_sequences: int = 256,
        max_tokens: int = 2048, record_routes: bool = False, use_graphs: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.config = model, model.config
        self.device = model.embedding.weight.device
        self.page_size = page_size or (16 if self.device.type == "cpu" else 64)
        if self.page_size % 16:
            raise ValueError(f"page_size: expected a multiple of 16, got {self.page_size}")
        if model.spread.cp.size > 1 and not model.spread.whole:
            raise ValueError("model: expected one whose rows no context-parallel ranks divide")
        self.pages = max(1, cache_tokens // self.page_size)
        self.max_sequences, self.max_tokens = max_sequences, max(max_tokens, max_sequences)
        self.records_routes = record_routes and bool(self.config.experts)
        self.pool = PagePool(self.pages, self.page_size)
        self.scheduler = Scheduler(
            self.pool, max_sequences=max_sequences, max_tokens=self.max_tokens, max_length=self.config.max_positions
        )
        longest = self.scheduler.max_length
        self.table = torch.zeros(max_sequences, -(-longest // self.page_size), dtype=torch.int32)
        # A page more, for the keys of padding.
        self.keys = self.values = self.routes = None
        uses_graphs = use_graphs and self.device.type == "cuda" and not model.spread.ep.size > 1
        self.graphs = self._graphs() if uses_graphs else None
        self.steps = self.generated = 0
        self.restore()

    def _graphs(self) -> DecodeGraphs:
        scratch = self.pages * self.page_size
        return DecodeGraphs(
            self._blocks, self.device, sequences=self.max_sequences, length=self.scheduler.max_length, scratch=scratch
        )

    # Memory and weights

    def restore(self) -> None:
        """Have memory for the cache, after `release`."""
        if self.keys is not None:
            return
        config, model = self.config, self.model
        kv_heads = config.kv_heads // (1 if model.spread.whole else model.spread.tp.size)
        shape = (config.layers, self.pages + 1, self.page_size, kv_heads, config.head_width)
        options = {"device": self.device, "dtype": model.embedding.weight.dtype}
        self.keys, self.values = torch.empty(shape, **options), torch.empty(shape, **options)
        if self.records_routes:
            shape = (self.pages + 1, self.page_size, config.layers, config.experts_per_token)
            self.routes = torch.empty(shape, dtype=torch.int16, device=self.device)

    def release(self) -> None:
        """Give the memory of the cache back; what was in it is forgotten.

        Raises:
            ValueError: sequences have not ended.
        """
        if self.has_work:
            raise ValueError("engine: expected no sequences that have not ended when its memory is given back")
        self.keys = self.values = self.routes = None
        if self.graphs is not None:
            self.graphs.forget()
        self.forget()

    def forget(self) -> None:
        """The weights have changed: no new sequence takes keys of the former ones."""
        self.pool.forget()

    # Sequences in and out

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return self.scheduler.has_work

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
        """End a sequence where it stands; its pages are free for others at once."""
        if self.records_routes and sequence.row >= 0:
            sequence.experts = self._experts(sequence)
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
        """Compute the next tokens; the sequences that got one, those that ended with it included."""
        chunks = self.scheduler.plan()
        if not chunks:
            return []
        hidden = self._forward(chunks)
        for chunk in chunks:
            self.scheduler.done(chunk)
        rows, grown = self._grown(chunks)
        self.steps += 1
        if not grown:
            return []
        self._draw(self._logits(hidden, rows), grown)
        return grown

    def _grown(self, chunks: list[Chunk]) -> tuple[list[int], list[Sequence]]:
        """Rows of the step whose hidden state a sequence's next token comes of, and those sequences."""
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
        if copies:
            sources, targets = torch.tensor(copies, device=self.device).unbind(1)
            for cache in (self.keys, self.values):
                cache[:, targets] = cache[:, sources]
            if self.routes is not None:
                self.routes[targets] = self.routes[sources]
        return rows, grown

    def _forward(self, chunks: list[Chunk]) -> Tensor:
        """(T, D) hidden states of the tokens of chunks after the last norm, in their order."""
        step = self._packed(chunks)
        if self.graphs is not None and step.batch.decodes == len(chunks):
            return self.graphs.run(step)
        return self._blocks(step)

    def _packed(self, chunks: list[Chunk]) -> Step:
        """The step's tokens, packed."""
        self._write_table(chunks)
        counts = [chunk.count for chunk in chunks]
        lengths = torch.tensor([chunk.start + chunk.count for chunk in chunks], dtype=torch.int32)
        decodes = sum(count == 1 for count in counts)
        table = self.table[[chunk.sequence.row for chunk in chunks]]
        if decodes == len(chunks):
            tokens = torch.tensor([chunk.sequence.ids[chunk.start] for chunk in chunks])
            positions = lengths.long() - 1
            pages = table.gather(1, (positions // self.page_size)[:, None])[:, 0]
        else:
            tokens = torch.tensor([i for c in chunks for i in c.sequence.ids[c.start : c.start + c.count]])
            owner = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(counts))
            positions = torch.cat([torch.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks])
            pages = table[owner, positions // self.page_size]
        slots = pages.long() * self.page_size + positions % self.page_size
        longest = int(lengths.max())
        table = table[:, : -(-longest // self.page_size)].contiguous()
        missing = self._padding(len(tokens))
        if missing:
            tokens, positions = F.pad(tokens, (0, missing)), F.pad(positions, (0, missing))
            slots = F.pad(slots, (0, missing), value=self.pages * self.page_size)
        tokens, positions, slots, table, lengths = (
            x.to(self.device, non_blocking=True) for x in (tokens, positions, slots, table, lengths)
        )
        batch = PagedBatch(table, lengths, counts, longest, decodes, self.page_size)
        return Step(tokens, positions, slots, batch)

    def _padding(self, tokens: int) -> int:
        """Rows of padding, so that products have a number of rows that changes nothing, and that tp divides."""
        unit = 1 if self.model.spread.whole else self.model.spread.tp.size
        if self.device.type == "cpu":
            unit *= CPU_ROWS
        return -tokens % unit

    def _write_table(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            pages = sequence.held.pages
            if sequence.tabled < len(pages):
                self.table[sequence.row, sequence.tabled : len(pages)] = torch.tensor(
                    pages[sequence.tabled :], dtype=torch.int32
                )
                sequence.tabled = len(pages)

    def _blocks(self, step: Step) -> Tensor:
        """(T, D) hidden states of a packed step after the last norm; keys and values go into the cache."""
        model, config, spread = self.model, self.config, self.model.spread
        cos, sin = rope_tables(step.positions, config.head_width, config.rope_base)
        x_TD = model.embedding(step.tokens)
        routes = Routes() if self.records_routes else None
        if routes is not None:
            routes.begin(torch.ones_like(step.tokens, dtype=torch.bool), spread)
        for layer, block in enumerate(model.blocks):
            keys, values = self.keys[layer], self.values[layer]
            qkv = block.projected(x_TD)
            q_THC = write_pages(qkv.view(qkv.shape[0], -1, config.head_width), cos, sin, keys, values, step.slots)
            out_THC = paged_attention(q_THC, keys, values, step.batch, window=config.window)
            x_TD = x_TD + spread.columns(out_THC.view(qkv.shape[0], -1), block.attention.out.weight)
            if isinstance(block.feed_forward, Mixture):
                x_TD = x_TD + block.feed_forward(block.feed_forward_norm(x_TD), routes)
            else:
                x_TD = x_TD + block.outer(block.inner(x_TD))
        if routes is not None:
            chosen = spread.gather(routes.stacked())
            self.routes.view(-1, *self.routes.shape[2:])[step.slots] = chosen.to(torch.int16)
        return spread.gather(model.norm(x_TD))

    def _logits(self, hidden_TD: Tensor, rows: list[int]) -> Tensor:
        """(B, V) fp32 logits after some rows."""
        spread = self.model.spread
        is_all = rows == list(range(hidden_TD.shape[0]))
        if not is_all:
            padded = rows + [rows[-1]] * (-len(rows) % CPU_ROWS if self.device.type == "cpu" else 0)
            hidden_TD = hidden_TD.index_select(0, torch.tensor(padded, device=self.device))
        logits_BV = self.model.logits(hidden_TD)[: len(rows)]
        if spread.tp.size > 1 and not spread.whole:
            parts, _ = gathered_rows(logits_BV[None], spread.tp)
            logits_BV = parts.transpose(0, 1).reshape(len(rows), -1)
        return logits_BV

    def _draw(self, logits: Tensor, grown: list[Sequence]) -> None:
        """Sample the next token of every sequence; end those that are done."""
        how = {(s.sampling.temperature, s.sampling.top_k, s.sampling.top_p) for s in grown}
        uniform = torch.tensor(next_uniforms(grown), dtype=torch.float32).to(self.device)
        if len(how) == 1:
            temperature, top_k, top_p = how.pop()
            options = {"temperature": float(temperature), "top_k": top_k or None, "top_p": top_p}
        else:
            options = self._options(grown)
        tokens, logprobs = sample(logits, uniform=uniform, **options)
        drawn = list(zip(tokens.tolist(), logprobs.tolist()))
        wanted = [i for i, s in enumerate(grown) if s.sampling.top_logprobs]
        tops = self._top(logits, grown, wanted, drawn) if wanted else {}
        for i, (sequence, (token, logprob)) in enumerate(zip(grown, drawn)):
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            if i in tops:
                sequence.top.append(tops[i])
            if token == sequence.sampling.eos_id:
                self.finish(sequence, "stop")
            elif sequence.steps == sequence.sampling.max_new_tokens:
                self.finish(sequence, "length")
        self.generated += len(grown)

    def _options(self, grown: list[Sequence]) -> dict:
        """Temperature and truncation of each row; where nobody truncates, nothing is sorted."""
        hows = [s.sampling for s in grown]
        options = {"temperature": torch.tensor([float(h.temperature) for h in hows]), "top_k": None, "top_p": None}
        if any(h.top_k for h in hows):
            options["top_k"] = torch.tensor([h.top_k or 0 for h in hows])
        if any(h.top_p not in (None, 1.0) for h in hows):
            options["top_p"] = torch.tensor([1.0 if h.top_p is None else float(h.top_p) for h in hows])
        return {name: None if x is None else x.to(self.device) for name, x in options.items()}

    def _top(
        self, logits: Tensor, grown: list[Sequence], wanted: list[int], drawn: list[tuple[int, float]]
    ) -> dict[int, list[tuple[int, float]]]:
        """Likeliest words of some rows, under the distribution that their tokens were drawn from."""
        found = {}
        for i in wanted:
            how, (token, logprob) = grown[i].sampling, drawn[i]
            every = (logits[i].float() / (how.temperature or 1.0)).log_softmax(-1)
            values, words = every.topk(min(how.top_logprobs, every.shape[0]))
            # A truncated distribution is the whole one over the mass of what is kept.
            values = values + (logprob - every[token])
            if how.temperature and (how.top_k or how.top_p not in (None, 1.0)):
                before = values.exp().cumsum(0) - values.exp()
                values, words = (x[before < 1 - 1e-5] for x in (values, words))
            found[i] = list(zip(words.tolist(), values.tolist()))
        return found

    def _experts(self, sequence: Sequence) -> Tensor:
        """(n, L, A) int16 experts of every token that a sequence has read."""
        pages = torch.tensor(sequence.held.pages, device=self.device)
        return self.routes[pages].flatten(0, 1)[: sequence.computed].cpu()

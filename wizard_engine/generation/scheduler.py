"""Who computes which tokens in the next step of generation: continuous batching over a pool of pages.

Each step takes one token of every sequence that is being continued, and fills up what is left of its tokens with pieces
of prompts. Sequences are served in the order in which they came. Where pages run out, the newest one gives its own back
and is computed again later, with what it has generated; so the oldest always goes on, and none waits for ever.
"""

import bisect
from collections import deque
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal, NamedTuple

import torch

from kernels.sample import row_seeds, uniforms

from .paged_cache import Held, PagePool

# Uniform numbers that a sequence gets ready at once.
READY = 128
Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How a sequence is continued.

    Its uniform number of step i is that of (seed, row, i), see `kernels.sample.row_seeds`: what it draws depends on
    nothing else.

    Attributes:
        max_new_tokens: limit, EOS counted.   temperature: 0 is greedy; otherwise logits are divided by it.
        top_k, top_p: truncation, as in `kernels.sample`; None: none.   eos_id: ends the sequence; -1: nothing does.
        top_logprobs: likeliest words to report for every token.
        frequency_penalty, presence_penalty: taken from the logits of tokens generated before, for each occurrence and
            once.   logit_bias: (id, what is added to its logit).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    row: int = 0
    eos_id: int = -1
    top_logprobs: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < inf:
            raise ValueError(f"temperature: expected >= 0 and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k: expected >= 0, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1, got {self.max_new_tokens}")
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs: expected >= 0, got {self.top_logprobs}")


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated behind it.

    Attributes:
        number: in the order of arrival.   ids: the prompt's and the new ones.   logprobs: nats, of the new ones, under
            the distribution that each was drawn from.   top: (id, nats) of the likeliest words of each step.
        reason: why it ended; None while it goes on.   error: what failed, where the reason is "error".
        cached: tokens of the prompt that were not computed again.
        computed: ids whose keys are in the cache.   row: of the table of pages; tabled: pages written there.
        followers: sequences with the same prompt that wait for this one's first hidden state.
        preempted: times that it gave its pages back.   pending: tokens that are drawn and not read yet.
        place: of the last of them among the tokens that its step drew.
    """

    number: int
    sampling: Sampling
    prompt_tokens: int
    ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: Reason | None = None
    error: str = ""
    held: Held = field(default_factory=Held)
    cached: int = 0
    computed: int = 0
    row: int = -1
    tabled: int = 0
    followers: list["Sequence"] = field(default_factory=list)
    preempted: int = 0
    uniform: list[float] = field(default_factory=list)
    experts: torch.Tensor | None = None
    pending: int = 0
    place: int = -1

    @property
    def length(self) -> int:
        """Tokens, those that are not read yet included."""
        return len(self.ids) + self.pending

    @property
    def tokens(self) -> list[int]:
        """The new ids."""
        return self.ids[self.prompt_tokens :]

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.ids) - self.prompt_tokens

    @property
    def drawn(self) -> int:
        """New tokens, those that are not read yet included."""
        return self.length - self.prompt_tokens


class Chunk(NamedTuple):
    """Tokens [start, start + count) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token comes out of it."""
        return self.start + self.count == self.sequence.length


class Scheduler:
    """Sequences that wait and that run, and the pages between them.

    Args:
        pool: of pages.   max_sequences: that run at once.   max_tokens: of one step, at least as many.
        max_length: of a sequence, prompt and new tokens.
    """

    def __init__(self, pool: PagePool, *, max_sequences: int, max_tokens: int, max_length: int) -> None:
        if not 1 <= max_sequences <= max_tokens:
            raise ValueError(
                f"max_sequences, max_tokens: expected 1 <= max_sequences <= max_tokens, got {max_sequences} and "
                f"{max_tokens}"
            )
        self.pool, self.max_sequences, self.max_tokens = pool, max_sequences, max_tokens
        self.max_length = min(max_length, pool.pages * pool.size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._rows = deque(range(max_sequences))
        self._numbers = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self.waiting or self.running)

    def add(self, prompt: Several[int], samplings: Several[Sampling]) -> list[Sequence]:
        """A sequence for each sampling of one prompt, which is computed once where there is room.

        Raises:
            ValueError: an empty prompt, or one that leaves no room for the new tokens.
        """
        self.check(prompt, samplings)
        made = []
        for sampling in samplings:
            made.append(Sequence(self._numbers, sampling, len(prompt), list(prompt)))
            self._numbers += 1
        made[0].followers = made[1:]
        self.waiting.append(made[0])
        return made

    def check(self, prompt: Several[int], samplings: Several[Sampling]) -> None:
        """ValueError unless there is a prompt, and room for it with each one's new tokens."""
        room = self.max_length - max(sampling.max_new_tokens for sampling in samplings)
        if not 1 <= len(prompt) <= room:
            raise ValueError(
                f"prompt: expected 1 to {room} tokens beside {self.max_length - room} new ones, got {len(prompt)}"
            )

    @property
    def is_short(self) -> bool:
        """Whether the next plan makes a sequence give its pages back."""
        singles = (s for s in self.running if s.length - s.computed == 1)
        return sum(max(0, self.pool.needed(s.length) - len(s.held.pages)) for s in singles) > self.pool.free

    def plan(self) -> list[Chunk]:
        """What to compute next, single tokens first; empty where nothing waits or runs."""
        chunks: list[Chunk] = []
        preempted, left = False, self.max_tokens
        for sequence in list(self.running):
            if sequence.row < 0 or sequence.length - sequence.computed != 1:
                continue
            while not self.pool.extend(sequence.held, sequence.length):
                preempted = True
                if self._preempt(self.running[-1]) is sequence:
                    break
            else:
                chunks.append(Chunk(sequence, sequence.computed, 1))
                left -= 1
        for sequence in self.running:
            missing = sequence.length - sequence.computed
            if missing > 1 and left:
                chunks.append(Chunk(sequence, sequence.computed, min(missing, left)))
                left -= chunks[-1].count
        while left and not preempted and (sequence := self._admit()):
            chunks.append(Chunk(sequence, sequence.computed, min(sequence.length - sequence.computed, left)))
            left -= chunks[-1].count
        # A piece may be a single token, too.
        return sorted(chunks, key=lambda chunk: chunk.count > 1)

    def _admit(self) -> Sequence | None:
        """Let the first that waits run, where there is room for it and a page more for each that runs already."""
        if not self.waiting or not self._rows:
            return None
        sequence, pool = self.waiting[0], self.pool
        if self.running and pool.free < pool.needed(len(sequence.ids)) + len(self.running):
            return None
        held = pool.take(sequence.ids)
        if held is None:
            return None
        self.waiting.pop(0)
        sequence.held, sequence.computed = held, held.cached
        if not sequence.preempted:
            sequence.cached = held.cached
        self._run(sequence)
        return sequence

    def _run(self, sequence: Sequence) -> None:
        sequence.row, sequence.tabled = self._rows.popleft(), 0
        bisect.insort(self.running, sequence, key=lambda s: s.number)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        self.pool.give_back(sequence.held)

    def _preempt(self, sequence: Sequence) -> Sequence:
        assert not sequence.pending, "a sequence gave its pages back before its tokens were read"
        self._stop(sequence)
        sequence.computed = 0
        sequence.preempted += 1
        self.preemptions += 1
        self._wait(sequence)
        return sequence

    def _wait(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.number)

    def done(self, chunk: Chunk) -> None:
        """A chunk is computed."""
        chunk.sequence.computed += chunk.count
        self.register(chunk.sequence)

    def register(self, sequence: Sequence) -> None:
        """Let others find the pages of a sequence whose keys are computed and whose ids are known."""
        known = min(sequence.computed, len(sequence.ids))
        if known // self.pool.size > sequence.held.known:
            self.pool.computed(sequence.held, sequence.ids[:known])

    def retire(self, sequence: Sequence) -> None:
        """A sequence has drawn its last token, which is not read yet: its row and pages are free for others."""
        self._stop(sequence)

    def fork(self, leader: Sequence) -> list[tuple[Sequence, int, int]]:
        """Followers of a sequence whose prompt is computed, that go on from it: (follower, page to copy, page to copy
        to), the pages -1 where none is; those that there is no room for wait by themselves."""
        forked, followers, leader.followers = [], leader.followers, []
        for follower in followers:
            held = self.pool.fork(leader.held, leader.computed) if self._rows else None
            if held is None:
                self._wait(follower)
                continue
            follower.held, follower.computed, follower.cached = held, leader.computed, leader.computed
            self._run(follower)
            pair = (
                (leader.held.pages[len(held.pages) - 1], held.pages[-1]) if held.cached < leader.computed else (-1, -1)
            )
            forked.append((follower, *pair))
        return forked

    def finish(self, sequence: Sequence, reason: Reason) -> None:
        """A sequence ends, wherever it is; one that has ended stays as it is."""
        if sequence.reason is not None:
            return
        sequence.reason = reason
        heirs, sequence.followers = [s for s in sequence.followers if s.reason is None], []
        if sequence.row >= 0:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            for leader in (*self.running, *self.waiting):
                if sequence in leader.followers:
                    leader.followers.remove(sequence)
        if heirs:
            heirs[0].followers = heirs[1:]
            self._wait(heirs[0])


def next_uniforms(sequences: Several[Sequence]) -> list[float]:
    """The number in (0, 1) that decides the next token of each sequence."""
    short: dict[tuple[int, int], list[Sequence]] = {}
    for sequence in sequences:
        if sequence.drawn >= len(sequence.uniform) and sequence.sampling.temperature > 0:
            short.setdefault((sequence.sampling.seed, len(sequence.uniform)), []).append(sequence)
    # Those of a seed are made at once.
    for (seed, first), group in short.items():
        seeds = row_seeds(seed, torch.tensor([s.sampling.row for s in group]), READY, first)
        for sequence, numbers in zip(group, uniforms(seeds).tolist()):
            sequence.uniform += numbers
    return [s.uniform[s.drawn] if s.sampling.temperature > 0 else 0.5 for s in sequences]


def numbered(sampling: Sampling, count: int) -> list[Sampling]:
    """`count` samplings that differ in the row alone."""
    return [replace(sampling, row=sampling.row + i) for i in range(count)]

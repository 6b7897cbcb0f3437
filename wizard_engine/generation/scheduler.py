"""Scheduler of generation: continuous batching with chunked prefill over a pool of pages.

Each step computes one token of every decoding sequence and fills its token budget with prefill chunks. Sequences are
served in the order of arrival. Where pages run out, the newest sequence is preempted: it releases its pages, and its
prompt and generated tokens are computed again later. So the oldest sequence always advances, and none starves.

What fails for one sequence ends it alone, see `failures`.
"""

import bisect
from collections import abc, deque
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal, NamedTuple

import torch

from kernels.sample import row_seeds, uniforms

from .failures import Failures
from .paged_cache import PageAllocation, PagePool

# Uniform numbers that are computed ahead for a sequence.
READY = 128
# Below this temperature the largest logit is drawn: two fp32 logits from 1 on differ by 100 times as much or more.
GREEDY_BELOW = 1e-9
# Numbers of the sampling kernel: the smallest normal and the largest fp32, and the largest int32.
SMALLEST, LARGEST, LARGEST_INT = 2.0**-126, (2 - 2.0**-23) * 2.0**127, 2**31 - 1
LARGEST_PENALTY, LARGEST_BIAS = 2.0, 100.0
Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a sequence.

    The uniform number of step i depends on (seed, row, i) alone, see `kernels.sample.row_seeds`.

    Attributes:
        max_new_tokens: limit, EOS counted.   temperature: 0, or below 1e-9, is greedy; otherwise logits are divided by
            it.   top_k, top_p: truncation, as in `kernels.sample`; None: none.   eos_ids: each of them ends
            the sequence.
        top_logprobs: likeliest tokens to report for every position.
        frequency_penalty, presence_penalty: -2 to 2, see `penalties.penalised`.   logit_bias: (id, -100 to 100) pairs.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    row: int = 0
    eos_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= LARGEST:
            raise ValueError(f"temperature: expected >= 0 and finite, got {self.temperature}")
        if self.top_k is not None and not (isinstance(self.top_k, Integral) and self.top_k >= 0):
            raise ValueError(f"top_k: expected >= 0, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1, got {self.max_new_tokens}")
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs: expected >= 0, got {self.top_logprobs}")
        if not -(2**63) <= self.row < 2**63:
            raise ValueError(f"row: expected -2^63 to 2^63 - 1, got {self.row}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not abs(getattr(self, name)) <= LARGEST_PENALTY:
                raise ValueError(f"{name}: expected -2 to 2, got {getattr(self, name)}")
        self._check_bias()
        # What fp32 and int32 cannot say becomes what it means.
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_p is not None:
            object.__setattr__(self, "top_p", max(self.top_p, SMALLEST))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", min(self.top_k, LARGEST_INT))

    def _check_bias(self) -> None:
        for token, bias in self.logit_bias:
            if not abs(bias) <= LARGEST_BIAS:
                raise ValueError(f"logit_bias: expected -100 to 100, got {bias} for id {token}")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError("logit_bias: expected each id once, got one twice")

    @property
    def is_penalised(self) -> bool:
        """Whether logits are changed before they are sampled from."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)


@dataclass(eq=False)
class Sequence:
    """A prompt and its generated tokens.

    Attributes:
        number: in the order of arrival.   ids: the prompt's and the new ones.   logprobs: nats, of the new ones, under
            the distribution that each was drawn from.   top: (id, nats) of the likeliest tokens of each step.
        reason: why it ended; None before.   error: what failed, where the reason is "error".
        cached: tokens of the prompt that were reused.
        computed: ids whose keys are in the cache, while it runs.   row: of the table of pages; tabled: pages written
            there.
        followers: sequences with the same prompt that wait for this one's first hidden state.
        preempted: number of preemptions.   pending: tokens that are sampled and not read yet.
        place: of the last of them among the sampled tokens of its step.
        counts, bias: (V,) fp32 on the device, for penalties: of the sampled tokens, and what is added to logits.
    """

    number: int
    sampling: Sampling
    prompt_tokens: int
    ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: Reason | None = None
    error: str = ""
    allocation: PageAllocation = field(default_factory=PageAllocation)
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
    counts: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens, unread ones included."""
        return len(self.ids) + self.pending

    @property
    def tokens(self) -> list[int]:
        """The new ids."""
        return self.ids[self.prompt_tokens :]

    @property
    def steps(self) -> int:
        """Number of new ids."""
        return len(self.ids) - self.prompt_tokens

    @property
    def drawn(self) -> int:
        """New tokens, unread ones included."""
        return self.length - self.prompt_tokens


class Chunk(NamedTuple):
    """Tokens [start, start + count) of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the chunk yields the sequence's next token."""
        return self.start + self.count == self.sequence.length


class Scheduler:
    """Waiting and running sequences.

    Args:
        pool: of pages.   max_sequences: that run at once.   max_tokens: of one step, at least as many.
        max_length: of a sequence, prompt and new tokens.
    Attributes:
        failures: ends sequences whose computation fails.
        penalised: number of sequences with penalties that have not ended.
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
        self.preemptions = self.penalised = 0
        self.failures = Failures(self.finish)
        self._rows = deque(range(max_sequences))
        self._next_number = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self.waiting or self.running)

    def add(self, prompt: abc.Sequence[int], samplings: abc.Sequence[Sampling]) -> list[Sequence]:
        """A sequence for each sampling of one prompt; the prompt is computed once where there is room.

        Raises:
            ValueError: an empty prompt, or one that leaves no room for the new tokens.
        """
        self.check(prompt, samplings)
        sequences = []
        for sampling in samplings:
            sequences.append(Sequence(self._next_number, sampling, len(prompt), list(prompt)))
            self._next_number += 1
        self.penalised += sum(sampling.is_penalised for sampling in samplings)
        sequences[0].followers = sequences[1:]
        self.waiting.append(sequences[0])
        return sequences

    def check(self, prompt: abc.Sequence[int], samplings: abc.Sequence[Sampling]) -> None:
        """Raise ValueError unless the prompt has a token, and room beside its new tokens."""
        if not samplings:
            raise ValueError("samplings: expected at least one, got none")
        room = self.max_length - max(sampling.max_new_tokens for sampling in samplings)
        if not 1 <= len(prompt) <= room:
            raise ValueError(
                f"prompt: expected 1 to {room} tokens beside {self.max_length - room} new ones, got {len(prompt)}"
            )

    @property
    def is_short(self) -> bool:
        """Whether the next plan preempts a sequence."""
        singles = (s for s in self.running if s.length - s.computed == 1)
        return sum(max(0, self.pool.needed(s.length) - len(s.allocation.pages)) for s in singles) > self.pool.free

    def plan(self) -> list[Chunk]:
        """Chunks of the next step, single tokens first; empty without waiting or running sequences."""
        chunks: list[Chunk] = []
        preemptions = self.preemptions
        singles = [(s, chunks) for s in self.running if s.length - s.computed == 1]
        self.failures.each(singles, self._plan_single)
        budget = self.max_tokens - len(chunks)
        for sequence in self.running:
            missing = sequence.length - sequence.computed
            if missing > 1 and budget:
                chunks.append(Chunk(sequence, sequence.computed, min(missing, budget)))
                budget -= chunks[-1].count
        while budget and self.preemptions == preemptions and self.waiting and self._rows:
            first = self.waiting[0]
            if self.failures.attempt(first, self._admit, first):
                chunks.append(Chunk(first, first.computed, min(first.length - first.computed, budget)))
                budget -= chunks[-1].count
            elif first.reason is None:
                break
        # A prefill chunk may be a single token, too.
        return sorted(chunks, key=lambda chunk: chunk.count > 1)

    def _plan_single(self, sequence: Sequence, chunks: list[Chunk]) -> None:
        """Append the next token of a decoding sequence; preempt the newest ones until there is a page for it."""
        if sequence.row < 0:
            return
        while not self.pool.extend(sequence.allocation, sequence.length):
            if self._preempt(self.running[-1]) is sequence:
                return
        chunks.append(Chunk(sequence, sequence.computed, 1))

    def _admit(self, sequence: Sequence) -> bool:
        """Start the first waiting sequence, if its pages and one more page for each running sequence are free."""
        pool = self.pool
        if self.running and pool.free < pool.needed(len(sequence.ids)) + len(self.running):
            return False
        allocation = pool.allocate(sequence.ids)
        if allocation is None:
            return False
        self.waiting.pop(0)
        sequence.allocation, sequence.computed = allocation, allocation.cached
        if not sequence.preempted:
            sequence.cached = allocation.cached
        self._run(sequence)
        return True

    def _run(self, sequence: Sequence) -> None:
        sequence.row, sequence.tabled = self._rows.popleft(), 0
        bisect.insort(self.running, sequence, key=lambda s: s.number)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        self.pool.release(sequence.allocation)

    def _preempt(self, sequence: Sequence) -> Sequence:
        assert not sequence.pending, "a sequence was preempted before its tokens were read"
        self._stop(sequence)
        sequence.preempted += 1
        self.preemptions += 1
        self._wait(sequence)
        return sequence

    def _wait(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.number)

    def done(self, sequence: Sequence, start: int, count: int) -> None:
        """Count a chunk as computed."""
        sequence.computed = start + count
        self.register(sequence)

    def register(self, sequence: Sequence) -> None:
        """Register the pages of a sequence whose keys are computed and whose ids are known."""
        known = min(sequence.computed, len(sequence.ids))
        if known // self.pool.size > sequence.allocation.registered:
            self.pool.register(sequence.allocation, sequence.ids[:known])

    def retire(self, sequence: Sequence) -> None:
        """Free row and pages of a sequence whose last token is sampled and not read yet."""
        self._stop(sequence)

    def fork(self, leader: Sequence) -> list[tuple[Sequence, int, int]]:
        """Start the followers of a sequence whose prompt is computed: (follower, page to copy, target page).

        Both pages are -1 where nothing is copied. Followers without room wait on their own.
        """
        forked, followers, leader.followers = [], leader.followers, []
        for follower in followers:
            pages = self.failures.attempt(follower, self._fork, leader, follower)
            if pages is not None:
                forked.append((follower, *pages))
        return forked

    def _fork(self, leader: Sequence, follower: Sequence) -> tuple[int, int] | None:
        """Start a follower: the page to copy and its target; None where it has to wait."""
        allocation = self.pool.fork(leader.allocation, leader.computed) if self._rows else None
        if allocation is None:
            self._wait(follower)
            return None
        follower.allocation, follower.computed, follower.cached = allocation, leader.computed, leader.computed
        self._run(follower)
        if allocation.cached == leader.computed:
            return -1, -1
        return leader.allocation.pages[len(allocation.pages) - 1], allocation.pages[-1]

    def finish(self, sequence: Sequence, reason: Reason) -> None:
        """End a sequence in any state; does nothing if it has ended."""
        if sequence.reason is not None:
            return
        sequence.reason = reason
        sequence.counts = sequence.bias = None
        self.penalised -= sequence.sampling.is_penalised
        remaining, sequence.followers = [s for s in sequence.followers if s.reason is None], []
        if sequence.row >= 0:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            # One that failed between its allocation and its start has pages.
            self.pool.release(sequence.allocation)
            for leader in (*self.running, *self.waiting):
                if sequence in leader.followers:
                    leader.followers.remove(sequence)
        if remaining:
            remaining[0].followers = remaining[1:]
            self._wait(remaining[0])


def next_uniforms(sequences: abc.Sequence[Sequence]) -> list[float]:
    """Uniform number in (0, 1) for the next token of each sequence."""
    by_seed: dict[tuple[int, int], list[Sequence]] = {}
    for sequence in sequences:
        if sequence.drawn >= len(sequence.uniform) and sequence.sampling.temperature > 0:
            by_seed.setdefault((sequence.sampling.seed, len(sequence.uniform)), []).append(sequence)
    # One call computes the numbers of a seed.
    for (seed, first), group in by_seed.items():
        seeds = row_seeds(seed, torch.tensor([s.sampling.row for s in group]), READY, first)
        for sequence, values in zip(group, uniforms(seeds).tolist()):
            sequence.uniform += values
    return [s.uniform[s.drawn] if s.sampling.temperature > 0 else 0.5 for s in sequences]


def numbered(sampling: Sampling, count: int) -> list[Sampling]:
    """`count` samplings that differ only in the row."""
    return [replace(sampling, row=sampling.row + i) for i in range(count)]

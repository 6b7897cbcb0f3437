"""Random arrivals, lengths, cancellations and cache sizes: no page leaks, nobody starves, tokens as one by one."""

import random

import pytest
import torch

from kernels.sample import row_seeds, uniforms
from wizard_engine.generation.paged_cache import PagePool
from wizard_engine.generation.scheduler import READY, Sampling, Scheduler, Sequence, next_uniforms

VOCAB, EOS = 11, 0


def next_token(ids, row):
    """What a model would draw: of all ids before it, and of the sequence's own seed."""
    value = row + 7
    for token in ids:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def one_by_one(prompt, row, limit):
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(next_token(ids, row))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


class Memory:
    """Pages that hold ids; a step writes them and reads what stands before them back."""

    def __init__(self, scheduler):
        self.scheduler, self.size = scheduler, scheduler.pool.size
        self.cells = {}

    def step(self):
        """One step; the sequences that were served."""
        chunks = self.scheduler.plan()
        assert sum(chunk.count for chunk in chunks) <= self.scheduler.max_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_sequences
        counts = [chunk.count for chunk in chunks]
        assert counts == sorted(counts, key=lambda n: n > 1) and len({c.sequence.row for c in chunks}) == len(chunks)
        for sequence, start, count in chunks:
            assert count > 0 and start == sequence.computed and start + count <= len(sequence.ids)
            for at in range(start, start + count):
                self.cells[sequence.allocation.pages[at // self.size], at % self.size] = sequence.ids[at]
        for sequence, start, count in chunks:
            read = [self.cells[sequence.allocation.pages[i // self.size], i % self.size] for i in range(start + count)]
            assert read == sequence.ids[: start + count]
        for chunk in chunks:
            self.scheduler.done(*chunk)
        grown = [chunk.sequence for chunk in chunks if chunk.is_last]
        for leader in list(grown):
            for follower, source, target in self.scheduler.fork(leader):
                if source >= 0:
                    self.cells |= {(target, i): self.cells.get((source, i)) for i in range(self.size)}
                grown.append(follower)
        for sequence in grown:
            sequence.ids.append(next_token(sequence.ids, sequence.sampling.row))
            sequence.logprobs.append(0.0)
            if sequence.ids[-1] == EOS:
                self.scheduler.finish(sequence, "stop")
            elif sequence.steps == sequence.sampling.max_new_tokens:
                self.scheduler.finish(sequence, "length")
        return [chunk.sequence for chunk in chunks]


def run(seed):
    draw = random.Random(seed)
    size = draw.choice([1, 2, 3, 4, 8])
    longest = draw.randint(2, 40)
    pool = PagePool(-(-longest // size) + draw.choice([0, 0, 1, 3, 20]), size)
    most = draw.randint(1, 8)
    scheduler = Scheduler(pool, max_sequences=most, max_tokens=draw.randint(most, most + 20), max_length=longest)
    memory, alive, everyone = Memory(scheduler), [], []
    stems = [[draw.randrange(VOCAB) for _ in range(longest)] for _ in range(3)]
    to_come, waited = draw.randint(1, 25), 0
    while to_come or scheduler.has_work:
        if to_come and draw.random() < 0.4:
            to_come -= 1
            new = draw.randint(1, longest - 1)
            length = draw.randint(1, longest - new)
            prompt = draw.choice(stems)[: draw.randint(0, length)]
            prompt = prompt + [draw.randrange(VOCAB) for _ in range(length - len(prompt))]
            rows = range(len(everyone), len(everyone) + draw.choice([1, 1, 2, 5]))
            made = scheduler.add(prompt, [Sampling(new, row=row) for row in rows])
            everyone += [(prompt, s) for s in made]
            alive += made
        if alive and draw.random() < 0.1:
            scheduler.finish(draw.choice(alive), "cancelled")
        if draw.random() < 0.02:
            pool.forget()
        oldest = min((s.number for s in scheduler.running), default=None)
        served = memory.step()
        if oldest is not None:
            assert oldest in {s.number for s in served}, "the oldest that runs did not go on"
        # Whoever is oldest is let in as soon as nothing older runs: at most one step passes without work.
        waited = 0 if served or not scheduler.has_work else waited + 1
        assert waited < 2
        alive = [s for s in alive if s.reason is None]
    for prompt, sequence in everyone:
        expected = one_by_one(prompt, sequence.sampling.row, sequence.sampling.max_new_tokens)
        if sequence.reason == "cancelled":
            assert sequence.tokens == expected[: sequence.steps]
        else:
            assert sequence.tokens == expected and sequence.reason == ("stop" if expected[-1] == EOS else "length")
    assert pool.free == pool.pages and not pool._users.count(1) and sorted(scheduler._rows) == list(range(most))
    return scheduler.preemptions


@pytest.mark.parametrize("block", range(10))
def test_random_loads_get_the_tokens_of_single_requests(block):
    preemptions = sum(run(1000 * block + seed) for seed in range(300))
    assert preemptions > 100


def test_preempted_sequences_come_back_before_later_ones():
    pool = PagePool(6, 2)
    scheduler = Scheduler(pool, max_sequences=4, max_tokens=8, max_length=12)
    memory = Memory(scheduler)
    rows = [scheduler.add([3, 4, 5], [Sampling(6, row=i)])[0] for i in range(4)]
    seen = []
    while scheduler.has_work:
        memory.step()
        seen.append([s.number for s in scheduler.running])
        assert [s.number for s in scheduler.waiting] == sorted(s.number for s in scheduler.waiting)
    assert scheduler.preemptions and all(row.reason for row in rows)
    assert all(order == sorted(order) for order in seen)


def test_uniforms_depend_on_seed_row_and_step():
    rows = [(5, 3), (5, 4), (6, 3), (-1, 0)]
    sequences = [Sequence(i, Sampling(1000, 1.0, seed=s, row=r), 1, [1]) for i, (s, r) in enumerate(rows)]
    sequences[1].ids += [2] * 3
    sequences.append(Sequence(9, Sampling(5), 1, [1]))
    for _ in range(READY + 5):
        actual = next_uniforms(sequences)
        for sequence, (seed, row), number in zip(sequences, rows, actual):
            steps = sequence.steps + 1
            assert number == float(uniforms(row_seeds(seed, torch.tensor([row]), steps))[0, -1])
        assert actual[-1] == 0.5
        for sequence in sequences:
            sequence.ids.append(1)


@pytest.mark.parametrize(("sequences", "tokens"), [(0, 4), (5, 4)])
def test_limits_without_room_are_refused(sequences, tokens):
    with pytest.raises(ValueError, match="expected 1 <= max_sequences <= max_tokens"):
        Scheduler(PagePool(4, 4), max_sequences=sequences, max_tokens=tokens, max_length=9)

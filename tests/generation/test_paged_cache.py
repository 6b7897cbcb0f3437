"""The paged cache loses no page, shares a page only between equal prefixes, and finds and evicts prefixes."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from wizard_engine.generation.paged_cache import PagePool

SIZE, PAGES = 3, 12
TEXT = st.lists(st.integers(0, 1), min_size=1, max_size=17)


def test_equal_prefixes_share_their_full_pages():
    pool, ids = PagePool(8, 4), list(range(10))
    first = pool.allocate(ids)
    assert first.cached == 0 and len(first.pages) == 3 and pool.free == 5
    # Nothing is found before it is computed, and then full pages alone.
    assert pool.allocate(ids).cached == 0
    pool.register(first, ids[:7])
    second = pool.allocate(ids)
    assert second.cached == 4 and second.pages[0] == first.pages[0] and second.pages[1] != first.pages[1]
    pool.register(first, ids)
    assert pool.free == 0 and pool.allocate(ids) is None
    pool.release(second)
    third = pool.allocate([*ids[:8], 99])
    assert third.cached == 8 and third.pages[:2] == first.pages[:2]
    assert pool.allocate([7, *ids[1:]]) is None and pool.free == 1


def test_last_token_is_always_computed():
    pool = PagePool(8, 4)
    held = pool.allocate([1, 2, 3, 4, 5, 6, 7, 8])
    pool.register(held, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.allocate([1, 2, 3, 4, 5, 6, 7, 8]).cached == 4
    assert pool.allocate([1, 2, 3, 4]).cached == 0


def test_prefixes_without_an_owner_stay_cached_until_their_pages_are_needed():
    pool = PagePool(4, 2)
    held = pool.allocate([1, 2, 3, 4, 5])
    pool.register(held, [1, 2, 3, 4, 5])
    pool.release(held)
    assert pool.free == 4
    again = pool.allocate([1, 2, 3, 4, 9])
    assert again.cached == 4
    pool.release(again)
    # The page without a name goes first, then the end of the text before its beginning.
    assert pool.allocate([7, 7, 7, 7]) is not None
    assert pool.allocate([1, 2, 9]).cached == 2


def test_weights_that_change_make_pages_useless():
    pool = PagePool(8, 2)
    held = pool.allocate([1, 2, 3])
    pool.register(held, [1, 2, 3])
    pool.forget()
    assert pool.allocate([1, 2, 3]).cached == 0
    # What a sequence of before computes later is of a chain that nobody can find.
    pool.extend(held, 4)
    pool.register(held, [1, 2, 3, 4])
    assert pool.allocate([1, 2, 3, 4, 5]).cached == 0


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0)])
def test_empty_pools_are_refused(arguments):
    with pytest.raises(ValueError, match="expected at least 1"):
        PagePool(*arguments)


class Pool(RuleBasedStateMachine):
    """Sequences that come, grow, compute, go and are forgotten, against the texts that their pages must hold."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES, SIZE)
        self.alive, self.holds, self.era = [], {}, 0

    @rule(target=sequences, ids=TEXT, room=st.integers(0, 4))
    def come(self, ids, room):
        free = self.pool.free
        held = self.pool.allocate(ids, room)
        if held is None:
            assert self.pool.free == free
            return None
        assert len(held.pages) == self.pool.needed(len(ids) + room) and held.cached < len(ids)
        # What is there already is the text of now, of these weights.
        for number in range(held.cached // SIZE):
            assert self.holds[held.pages[number]] == (self.era, tuple(ids[: (number + 1) * SIZE]))
        for page in held.pages[held.cached // SIZE :]:
            assert all(page not in other.pages for other, _, _ in self.alive)
            self.holds.pop(page, None)
        sequence = [held, list(ids), self.era]
        self.alive.append(sequence)
        return sequence

    @rule(sequence=sequences, more=TEXT)
    def grow(self, sequence, more):
        if sequence is None or sequence not in self.alive:
            return
        held, ids, _ = sequence
        free, pages = self.pool.free, len(held.pages)
        if self.pool.extend(held, len(ids) + len(more)):
            ids += more
            for page in held.pages[pages:]:
                self.holds.pop(page, None)
        else:
            assert self.pool.free == free and len(held.pages) == pages

    @rule(sequence=sequences, fraction=st.floats(0, 1))
    def compute(self, sequence, fraction):
        if sequence is None or sequence not in self.alive:
            return
        held, ids, era = sequence
        count = max(held.cached, int(fraction * len(ids)))
        for number in range(count // SIZE):
            self.holds[held.pages[number]] = era, tuple(ids[: (number + 1) * SIZE])
        self.pool.register(held, ids[:count])

    @rule(sequence=consumes(sequences))
    def go(self, sequence):
        if sequence is not None and sequence in self.alive:
            self.alive.remove(sequence)
            self.pool.release(sequence[0])

    @rule()
    def forget(self):
        self.era += 1
        self.pool.forget()

    @invariant()
    def no_page_is_lost(self):
        held = {page for sequence, _, _ in self.alive for page in sequence.pages}
        assert self.pool.free + len(held) == PAGES
        assert sum(self.pool._users) == sum(len(sequence.pages) for sequence, _, _ in self.alive)

    def teardown(self):
        for held, _, _ in self.alive:
            self.pool.release(held)
        assert self.pool.free == PAGES


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)

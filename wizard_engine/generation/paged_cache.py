"""Pages of the key/value cache: who has which, and which hold the beginnings of texts that others begin with too.

A page holds the keys and values of `size` tokens of one sequence. A full page whose tokens are computed is known by its
own ids and the page before it; a sequence whose prompt begins with the same ids takes the page instead of computing it.
Pages that nobody has keep what they hold until they are needed for something else, the longest unused first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

ROOT = 0


@dataclass
class Held:
    """What a sequence has.

    Attributes:
        pages: page i holds positions i size to (i + 1) size - 1.   cached: tokens at the beginning that were there.
        known: pages at the beginning that others can find; `last`, the name of the last of them.
        weights: those that its keys are of, by how often they have changed.
    """

    pages: list[int] = field(default_factory=list)
    cached: int = 0
    known: int = 0
    last: int = ROOT
    weights: int = 0


class PagePool:
    """Counts who has each of a number of pages.

    Names are numbers that are given once, one for each full page that can be found. What is looked up is the name of
    the page before together with the ids themselves, so that equal hashes of other ids do no harm. Once a page is
    taken for something else its name means nothing, and neither do those of the pages behind it.

    Args:
        pages: in all, at least 1.   size: tokens of a page.
    """

    def __init__(self, pages: int, size: int) -> None:
        if pages < 1 or size < 1:
            raise ValueError(f"pages, size: expected at least 1, got {pages} and {size}")
        self.pages, self.size = pages, size
        self._users = [0] * pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        self._page_of: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._names, self._weights = ROOT, 0

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages of a sequence of that many tokens."""
        return -(-tokens // self.size)

    def take(self, ids: Sequence[int], room: int = 0) -> Held | None:
        """Pages for a sequence's ids and `room` more tokens; None, and nothing taken, where there are too few.

        At least one token is left to compute, for its hidden state is what the next one is drawn from.
        """
        found, name = [], ROOT
        for start in range(0, (len(ids) - 1) // self.size * self.size, self.size):
            page, child = self._page_of.get((name, tuple(ids[start : start + self.size])), (-1, ROOT))
            if page < 0:
                break
            found.append(page)
            name = child
        fresh = self.needed(len(ids) + room) - len(found)
        # Found pages that nobody has are free ones, too.
        if fresh > self.free - sum(self._users[page] == 0 for page in found):
            return None
        for page in found:
            self._use(page)
        pages = found + [self._fresh() for _ in range(fresh)]
        return Held(pages, len(found) * self.size, len(found), name, self._weights)

    def extend(self, held: Held, tokens: int) -> bool:
        """Have pages for `tokens` tokens of a sequence; False, and nothing taken, where there are too few."""
        missing = self.needed(tokens) - len(held.pages)
        if missing > self.free:
            return False
        held.pages += [self._fresh() for _ in range(missing)]
        return True

    def fork(self, held: Held, tokens: int) -> Held | None:
        """Pages for a further sequence with the same first `tokens` tokens, all computed: full ones are shared, and a
        last one that is not full is its own, into which the caller copies; None, and nothing taken, without a page."""
        full, rest = divmod(tokens, self.size)
        if rest and not self._free:
            return None
        for page in held.pages[:full]:
            self._use(page)
        pages = held.pages[:full] + ([self._fresh()] if rest else [])
        return Held(pages, full * self.size, held.known, held.last, held.weights)

    def computed(self, held: Held, ids: Sequence[int]) -> None:
        """The keys of these ids, the sequence's first ones, are there: others may find its full pages, unless they are
        of weights that are no more."""
        if held.weights != self._weights:
            return
        while (held.known + 1) * self.size <= len(ids):
            start = held.known * self.size
            key = held.last, tuple(ids[start : start + self.size])
            if key not in self._page_of:
                self._names += 1
                page = held.pages[held.known]
                self._page_of[key], self._key_of[page] = (page, self._names), key
            # Another sequence may have computed the same beginning: its page stays the one that is found.
            held.last = self._page_of[key][1]
            held.known += 1

    def give_back(self, held: Held) -> None:
        """A sequence is done with its pages; those at its end are forgotten first."""
        for page in reversed(held.pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, f"page {page} was given back twice"
            if self._users[page] == 0:
                self._free[page] = None
                if page not in self._key_of:
                    self._free.move_to_end(page, last=False)
        held.pages, held.cached, held.known, held.last = [], 0, 0, ROOT

    def forget(self) -> None:
        """The weights have changed: what pages hold is of no use to new sequences."""
        self._page_of.clear()
        self._key_of.clear()
        self._weights += 1

    def _use(self, page: int) -> None:
        if self._users[page] == 0:
            del self._free[page]
        self._users[page] += 1

    def _fresh(self) -> int:
        """A page for something new, blank ones first."""
        page, _ = self._free.popitem(last=False)
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
        self._users[page] = 1
        return page

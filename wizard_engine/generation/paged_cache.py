"""Pages of the KV cache: their allocation, and the reuse of shared prefixes.

A page holds the keys and values of `size` tokens of one sequence. A full page whose tokens are computed is registered
under its ids and its previous page. A sequence whose prompt has the same prefix reuses the page. A free page keeps its
contents until it is allocated again, least recently used first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

ROOT = 0


@dataclass
class PageAllocation:
    """Pages of a sequence.

    Attributes:
        pages: page i holds positions i size to (i + 1) size - 1.   cached: tokens of the prefix that were reused.
        registered: leading pages that other sequences can reuse; `last`, the name of the last of them.
        weights: version of the weights that computed the keys.
    """

    pages: list[int] = field(default_factory=list)
    cached: int = 0
    registered: int = 0
    last: int = ROOT
    weights: int = 0


class PagePool:
    """Reference counts of pages, and an index of the registered ones.

    Every registered page has a unique number as its name. The index key is the name of the previous page with the ids
    themselves, so a hash collision does no harm. When a page is allocated again, its name and those of the pages after
    it become invalid.

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
        """Number of free pages."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages of a sequence of that many tokens."""
        return -(-tokens // self.size)

    def allocate(self, ids: Sequence[int], room: int = 0) -> PageAllocation | None:
        """Pages for a sequence's ids and `room` more tokens; None, without any change, where there are too few.

        At least one token is not reused, because sampling needs its hidden state.
        """
        reused, name = [], ROOT
        for start in range(0, (len(ids) - 1) // self.size * self.size, self.size):
            page, child = self._page_of.get((name, tuple(ids[start : start + self.size])), (-1, ROOT))
            if page < 0:
                break
            reused.append(page)
            name = child
        fresh = self.needed(len(ids) + room) - len(reused)
        # Reused pages without a user count as free, too.
        if fresh > self.free - sum(self._users[page] == 0 for page in reused):
            return None
        allocation = PageAllocation([], len(reused) * self.size, len(reused), name, self._weights)
        return self._filled(allocation, reused, fresh)

    def extend(self, allocation: PageAllocation, tokens: int) -> bool:
        """Extend a sequence to `tokens` tokens; False, without any change, where there are too few pages."""
        missing = self.needed(tokens) - len(allocation.pages)
        if missing > self.free:
            return False
        for _ in range(missing):
            allocation.pages.append(self._fresh())
        return True

    def fork(self, allocation: PageAllocation, tokens: int) -> PageAllocation | None:
        """Pages for another sequence with the same first `tokens` tokens, all computed.

        Full pages are shared. A partial last page is a new one, which the caller fills. None where no page is free.
        """
        full, rest = divmod(tokens, self.size)
        if rest and not self._free:
            return None
        forked = PageAllocation([], full * self.size, allocation.registered, allocation.last, allocation.weights)
        return self._filled(forked, allocation.pages[:full], 1 if rest else 0)

    def _filled(self, allocation: PageAllocation, shared: Sequence[int], fresh: int) -> PageAllocation:
        """The allocation with shared pages and then fresh ones; with none, and no page lost, after an exception."""
        try:
            for page in shared:
                self._use(page)
                allocation.pages.append(page)
            for _ in range(fresh):
                allocation.pages.append(self._fresh())
        except BaseException:
            self.release(allocation)
            raise
        return allocation

    def register(self, allocation: PageAllocation, ids: Sequence[int]) -> None:
        """Register the full pages of a sequence's first ids, whose keys are computed; not those of former weights."""
        if allocation.weights != self._weights:
            return
        while (allocation.registered + 1) * self.size <= len(ids):
            start = allocation.registered * self.size
            key = allocation.last, tuple(ids[start : start + self.size])
            if key not in self._page_of:
                self._names += 1
                page = allocation.pages[allocation.registered]
                self._page_of[key], self._key_of[page] = (page, self._names), key
            # Another sequence may have computed the same prefix: its page stays registered.
            allocation.last = self._page_of[key][1]
            allocation.registered += 1

    def release(self, allocation: PageAllocation) -> None:
        """Free a sequence's pages; its last pages are the first to be allocated again."""
        for page in reversed(allocation.pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, f"page {page} was released twice"
            if self._users[page] == 0:
                self._free[page] = None
                if page not in self._key_of:
                    self._free.move_to_end(page, last=False)
        allocation.pages, allocation.cached, allocation.registered, allocation.last = [], 0, 0, ROOT

    def forget(self) -> None:
        """Drop the index after a change of the weights."""
        self._page_of.clear()
        self._key_of.clear()
        self._weights += 1

    def _use(self, page: int) -> None:
        if self._users[page] == 0:
            del self._free[page]
        self._users[page] += 1

    def _fresh(self) -> int:
        """Allocate a free page, unregistered ones first."""
        page, _ = self._free.popitem(last=False)
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
        self._users[page] = 1
        return page

"""Training texts that repeat an evaluation text, by exact word n-grams after normalisation."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from wizard_engine.runtime.metrics import progress

from .words import words

BASE = np.uint64(0x9E3779B97F4A7C15)
BATCH = 4096


@dataclass(frozen=True)
class Match:
    """The overlap of one text with the evaluation texts; true if the text is contaminated.

    evaluation: index of the evaluation text that is repeated most (the first of equal ones), None for a clean text.
    ngram: the first n-gram in the text that both have, words joined by blanks.
    share: part of the evaluation text's distinct n-grams that the text holds, 0 to 1.
    """

    evaluation: int | None = None
    ngram: str = ""
    share: float = 0.0

    def __bool__(self) -> bool:
        return self.evaluation is not None


def contaminated(
    texts: Sequence[str], evaluation_texts: Sequence[str], *, n: int = 13, min_share: float = 0.0, desc: str = ""
) -> list[Match]:
    """For each text, whether it holds an n-gram of an evaluation text, which text, and which n-gram.

    Words are compared without case, width and punctuation; numbers count, a Chinese character counts as a word. A text
    shorter than n words is compared whole: it matches an evaluation text of exactly the same words.

    Args:
        texts: training texts.
        evaluation_texts: held-out texts.
        n: words of an n-gram; 13 and 8 are customary.
        min_share: least part of an evaluation text's distinct n-grams that a text must hold; 0: any one.
        desc: label of a progress bar; "": none.
    Returns:
        One Match per text, in order.
    Raises:
        ValueError: n is below 1, or min_share outside [0, 1].
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 word, got {n}; choose for example 13 or 8")
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share: expected 0 to 1, got {min_share}; 0 takes any shared n-gram")
    index = Index(n)
    for text in evaluation_texts:
        index.add(words(text))
    index.seal()
    matches: list[Match] = []
    with progress(desc=desc, unit="text", total=len(texts), quiet=not desc) as bar:
        for start in range(0, len(texts), BATCH):
            batch = [words(text) for text in texts[start : start + BATCH]]
            candidates = index.candidates(batch)
            matches += [
                index.match(parts, candidates[i], min_share) if i in candidates else Match()
                for i, parts in enumerate(batch)
            ]
            bar.update(len(batch))
    return matches


@dataclass
class Index:
    """The n-grams of the evaluation texts, and the texts that hold them."""

    n: int
    ids: dict[str, int] = field(default_factory=dict)
    owners: dict[tuple[str, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    sizes: list[int] = field(default_factory=list)
    whole: dict[tuple[str, ...], int] = field(default_factory=dict)
    hashes: np.ndarray | None = None

    def add(self, parts: list[str]) -> None:
        """Adds the words of the next evaluation text."""
        evaluation = len(self.sizes)
        grams = set(ngrams(parts, self.n))
        for gram in grams:
            self.owners[gram].append(evaluation)
        if len(parts) < self.n and parts:
            self.whole.setdefault(tuple(parts), evaluation)
        for part in parts:
            self.ids.setdefault(part, len(self.ids) + 1)
        self.sizes.append(len(grams))

    def seal(self) -> None:
        """Sorts the hashes of all n-grams, after the last text."""
        grams = np.array([[self.ids[part] for part in gram] for gram in self.owners], np.uint64)
        self.hashes = (
            np.unique(gram_hashes(grams.reshape(-1), self.n)[:: self.n]) if len(grams) else np.zeros(0, np.uint64)
        )

    def candidates(self, batch: list[list[str]]) -> dict[int, list[int]]:
        """Texts of a batch that may hold an n-gram of an evaluation text: text -> the word positions of those n-grams.

        Whole texts that are equal to a short evaluation text come with no positions.
        """
        positions: dict[int, list[int]] = {i: [] for i, parts in enumerate(batch) if self.is_whole(parts)}
        ids = np.fromiter((self.ids.get(part, 0) for parts in batch for part in parts), np.uint64)
        if len(ids) < self.n or not len(self.hashes):
            return positions
        hashes = gram_hashes(ids, self.n)
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[places] == hashes)
        starts = np.concatenate([[0], np.cumsum([len(parts) for parts in batch])])
        owner = np.searchsorted(starts, hits, side="right") - 1
        for text, position in zip(owner.tolist(), (hits - starts[owner]).tolist()):
            positions.setdefault(text, []).append(position)
        return positions

    def is_whole(self, parts: list[str]) -> bool:
        """Whether a text of fewer than n words is, word for word, an evaluation text."""
        return 0 < len(parts) < self.n and tuple(parts) in self.whole

    def match(self, parts: list[str], positions: list[int], min_share: float) -> Match:
        """The Match of one text, given the positions of its likely n-grams."""
        if self.is_whole(parts):
            return Match(self.whole[tuple(parts)], " ".join(parts), 1.0)
        grams = dict.fromkeys(tuple(parts[position : position + self.n]) for position in positions)
        shared: dict[int, list[tuple[str, ...]]] = defaultdict(list)
        for gram in grams:
            for evaluation in self.owners.get(gram, ()):
                shared[evaluation].append(gram)
        if not shared:
            return Match()
        best = min(shared, key=lambda evaluation: (-len(shared[evaluation]) / self.sizes[evaluation], evaluation))
        share = len(shared[best]) / self.sizes[best]
        return Match(best, " ".join(shared[best][0]), share) if share >= min_share else Match()


def ngrams(parts: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of n words."""
    return (tuple(parts[start : start + n]) for start in range(len(parts) - n + 1))


def gram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Polynomial hash, modulo 2^64, of every run of n word ids: (W,) uint64 -> (W - n + 1,) uint64."""
    total = np.zeros(len(ids) - n + 1, np.uint64)
    for offset in range(n):
        total = total * BASE + ids[offset : offset + len(total)]
    return total

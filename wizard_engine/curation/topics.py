"""Topics of rows that no lexicon covers: seeded spherical k-means over tf-idf, each cluster named by its words."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from . import lexicons
from .words import words

OTHER = "other"
ROWS_PER_CLUSTER = 60
_IGNORED = frozenset(f"{lexicons.FILLER} {' '.join(lexicons.STOP_WORDS.values())}".split())
_FILLER_CHARACTERS = frozenset(lexicons.FILLER_CHARACTERS)


def terms(text: str, limit: int = 600) -> list[str]:
    """Content words of a text, and for unspaced scripts pairs of neighbouring characters."""
    content_words, previous = [], ""
    for word in words(text[:limit]):
        if len(word) == 1 and not word.isascii():
            if previous and word not in _FILLER_CHARACTERS:
                content_words.append(previous + word)
            previous = "" if word in _FILLER_CHARACTERS else word
            continue
        previous = ""
        if len(word) > 2 and not word[0].isdigit() and word not in _IGNORED:
            content_words.append(word)
    return content_words


def clustered_topics(texts: Sequence[str], *, seed: int = 0, most: int = 8) -> list[str]:
    """Topic of each text: "a/b/c", the three heaviest words of its cluster, or "other".

    One cluster for every 60 texts, at most `most`; under 120 texts, and for a text without a word that three texts
    share, the topic is "other". The same texts and seed give the same topics.
    """
    clusters = min(most, len(texts) // ROWS_PER_CLUSTER)
    if clusters < 2:
        return [OTHER] * len(texts)
    vectors, vocabulary = tfidf(texts)
    known = np.flatnonzero(vectors.any(axis=1))
    if len(known) < 2 * ROWS_PER_CLUSTER:
        return [OTHER] * len(texts)
    assignment, centres = spherical_kmeans(vectors[known], clusters, seed=seed)
    names = ["/".join(vocabulary[index] for index in np.argsort(-centre, kind="stable")[:3]) for centre in centres]
    topics = [OTHER] * len(texts)
    for row, cluster in zip(known.tolist(), assignment.tolist()):
        topics[row] = names[cluster]
    return topics


def tfidf(texts: Sequence[str], *, features: int = 1500, least: int = 3) -> tuple[np.ndarray, list[str]]:
    """Unit tf-idf vectors (N, V) fp32 and their V terms: those of `least` texts or more and of at most a fifth of them.

    Where more than `features` terms qualify, the most frequent stay. A text without any is a zero vector.
    """
    documents = [Counter(terms(text)) for text in texts]
    frequency = Counter(term for document in documents for term in document)
    common = max(least, len(texts) // 5)
    qualifying = [(count, term) for term, count in frequency.items() if least <= count <= common]
    vocabulary = [term for _, term in sorted(qualifying, key=lambda pair: (-pair[0], pair[1]))[:features]]
    column = {term: index for index, term in enumerate(vocabulary)}
    vectors = np.zeros((len(texts), len(vocabulary)), np.float32)
    for row, document in enumerate(documents):
        for term, count in document.items():
            if term in column:
                vectors[row, column[term]] = (1 + math.log(count)) * math.log(len(texts) / frequency[term])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=vectors, where=norms > 0), vocabulary


def spherical_kmeans(
    vectors: np.ndarray, clusters: int, *, seed: int, starts: int = 4, iterations: int = 25
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of each unit vector (N,) and the unit centres (clusters, V), by cosine similarity.

    The best of `starts` runs from k-means++ choices of a generator seeded with `seed`.
    """
    generator = np.random.default_rng(seed)
    runs = [_kmeans(vectors, _first_centres(vectors, clusters, generator), iterations) for _ in range(starts)]
    return max(runs, key=lambda run: float((vectors * run[1][run[0]]).sum()))


def _first_centres(vectors: np.ndarray, clusters: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is a vector drawn with probability proportional to its cosine distance."""
    centres = vectors[[generator.integers(len(vectors))]]
    for _ in range(clusters - 1):
        distance = np.clip(1 - (vectors @ centres.T).max(axis=1), 0, None).astype(np.float64) + 1e-9
        centres = np.vstack([centres, vectors[[generator.choice(len(vectors), p=distance / distance.sum())]]])
    return centres


def _kmeans(vectors: np.ndarray, centres: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Alternates assignment and centres; an empty cluster gets the vector farthest from its centre."""
    assignment = np.full(len(vectors), -1)
    for _ in range(iterations):
        similarity = vectors @ centres.T
        new = similarity.argmax(axis=1)
        for empty in np.setdiff1d(np.arange(len(centres)), new):
            new[similarity.max(axis=1).argmin()] = empty
        if (new == assignment).all():
            break
        assignment = new
        centres = np.stack([vectors[assignment == cluster].sum(axis=0) for cluster in range(len(centres))])
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return assignment, centres

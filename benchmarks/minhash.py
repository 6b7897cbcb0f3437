"""Near-duplicates: the C++ code against datasketch with the same words, shingles, permutations, bands and threshold."""

from typing import Any

import numpy as np

from benchmarks.timing import interleave
from wizard_engine.curation.dedupe import band_rows, minhash_signatures, near_duplicates, shingle_texts
from wizard_engine.curation.words import words

PEER = "datasketch"
COUNT, PERMUTATIONS, THRESHOLD, SHINGLE = 2000, 128, 0.8, 3


def example_texts(count: int) -> list[str]:
    """Random texts of 20 to 60 words, a quarter of them copies of an earlier one with up to two words changed."""
    rng = np.random.default_rng(0)
    vocabulary = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in "aeiou" for c in "bdfglmnprst"]
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and rng.random() < 0.25:
            tokens = list(texts[rng.integers(len(texts))])
            for _ in range(rng.integers(0, 3)):
                tokens[rng.integers(len(tokens))] = vocabulary[rng.integers(len(vocabulary))]
        else:
            tokens = [vocabulary[i] for i in rng.integers(0, len(vocabulary), rng.integers(20, 61))]
        texts.append(tokens)
    return [" ".join(tokens) for tokens in texts]


def python_shingles(text: str) -> set[bytes]:
    """The shingles of a text as bytes, which is what datasketch takes."""
    tokens = words(text, operators=True)
    return {" ".join(tokens[i : i + SHINGLE]).encode() for i in range(max(1, len(tokens) - SHINGLE + 1))}


def datasketch_signatures(texts: list[str]) -> tuple[list[set[bytes]], list[Any]]:
    """Shingle sets and datasketch's MinHash of each text."""
    from datasketch import MinHash

    sets = [python_shingles(text) for text in texts]
    return sets, MinHash.bulk(sets, num_perm=PERMUTATIONS)


def datasketch_clusters(texts: list[str]) -> np.ndarray:
    """Cluster of each text by datasketch's LSH, every candidate verified by its exact Jaccard index."""
    from datasketch import MinHashLSH

    sets, signatures = datasketch_signatures(texts)
    rows = band_rows(THRESHOLD, PERMUTATIONS)
    lsh = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))
    cluster = list(range(len(texts)))

    def root(item: int) -> int:
        while cluster[item] != item:
            item = cluster[item]
        return item

    for text, signature in enumerate(signatures):
        for other in sorted(lsh.query(signature)):
            if len(sets[text] & sets[other]) >= THRESHOLD * len(sets[text] | sets[other]):
                low, high = sorted((root(text), root(other)))
                cluster[high] = low
        lsh.insert(text, signature)
    return np.array([root(text) for text in range(len(texts))])


def run(*, quick: bool = False, peer: bool = True) -> list[dict[str, Any]]:
    """Rows of the benchmark, without datasketch's where `peer` is off; AssertionError if the clusters differ."""
    count = COUNT // 4 if quick else COUNT
    texts = example_texts(count)

    def clusters() -> np.ndarray:
        return near_duplicates(
            texts, threshold=THRESHOLD, shingle=SHINGLE, permutations=PERMUTATIONS, numbers_matter=False
        )

    def signatures() -> np.ndarray:
        return minhash_signatures(shingle_texts(texts, shingle=SHINGLE), permutations=PERMUTATIONS)

    sign: dict[str, Any] = {"C++": signatures}
    group: dict[str, Any] = {"C++": clusters}
    if peer:
        assert np.array_equal(clusters(), datasketch_clusters(texts))
        sign["datasketch"] = lambda: datasketch_signatures(texts)
        group["datasketch"] = lambda: datasketch_clusters(texts)
    common = {"items": count, "unit": "texts/s", "shape": f"N={count} permutations={PERMUTATIONS}", "peer": PEER}
    return [
        *interleave("minhash", sign, repeats=3 if quick else 5, **common),
        *interleave("near-duplicates", group, repeats=3 if quick else 5, **common),
    ]

// Shingles, MinHash signatures and clusters of near-duplicate texts (MinHash with locality-sensitive hashing).
//
// 1. wizard_shingles: a text arrives as its words joined by single spaces (UTF-8). Its shingles are the hashes of every
//    run of `width` words, sorted and unique; a text of fewer words has one shingle, the whole text.
// 2. wizard_signatures: for each of several random permutations, the smallest value among a text's shingles. Two texts
//    agree in one with the probability of their Jaccard index.
// 3. wizard_clusters: texts that agree in a whole band of `rows` signature values are candidates. Their exact Jaccard
//    index decides, and union-find joins them.
//
// All hashes are fixed functions of the text and the seed: the result is the same on every machine.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE_VECTORS
#endif
#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

using std::size_t;
using Keyed = std::pair<uint64_t, int64_t>;  // a key and the text that has it

// Finaliser of SplitMix64: every bit of the value changes about half of the bits of the result.
uint64_t mix(uint64_t value) {
    value ^= value >> 30;
    value *= 0xbf58476d1ce4e5b9ULL;
    value ^= value >> 27;
    value *= 0x94d049bb133111ebULL;
    return value ^ (value >> 31);
}

// Hash of a hash and one more value, in order.
uint64_t fold(uint64_t hash, uint64_t value) { return mix((hash ^ value) + 0x9e3779b97f4a7c15ULL); }

// Eight bytes at a time, the rest padded with 0; the length is in the seed, so that padding does not collide.
uint64_t hash_word(const char* text, size_t bytes) {
    uint64_t hash = 0x9e3779b97f4a7c15ULL ^ bytes;
    for (; bytes >= 8; text += 8, bytes -= 8) {
        uint64_t word;
        std::memcpy(&word, text, 8);
        hash = mix(hash ^ word);
    }
    uint64_t word = 0;
    std::memcpy(&word, text, bytes);
    return mix(hash ^ word);
}

// Hashes of the words of a text.
void hash_words(const char* text, int64_t bytes, std::vector<uint64_t>& words) {
    words.clear();
    for (int64_t start = 0; start < bytes;) {
        const void* space = std::memchr(text + start, ' ', static_cast<size_t>(bytes - start));
        const int64_t end = space ? static_cast<const char*>(space) - text : bytes;
        words.push_back(hash_word(text + start, static_cast<size_t>(end - start)));
        start = end + 1;
    }
}

// Sorted unique shingle hashes of one text's words, appended to `out`; returns how many.
int64_t append_shingles(const std::vector<uint64_t>& words, int64_t width, uint64_t* out) {
    if (words.empty()) return 0;
    const int64_t run = std::min<int64_t>(width, static_cast<int64_t>(words.size()));
    const int64_t count = static_cast<int64_t>(words.size()) - run + 1;
    for (int64_t i = 0; i < count; ++i) {
        uint64_t hash = static_cast<uint64_t>(run);
        for (int64_t j = 0; j < run; ++j) hash = mix(hash + 0x9e3779b97f4a7c15ULL) ^ words[i + j];
        out[i] = mix(hash);
    }
    std::sort(out, out + count);
    return std::unique(out, out + count) - out;
}

// signature[p] = min over shingles of the upper half of a_p * shingle + b_p (64 bits: multiply-shift hashing).
WIDE_VECTORS
void update_signature(const uint64_t* shingles, int64_t count, const uint32_t* low, const uint32_t* high,
                      const uint64_t* shift, int64_t permutations, uint32_t* signature) {
    for (int64_t i = 0; i < count; ++i) {
        // The upper half of a 64 x 64 bit product (modulo 2^64) from 32-bit halves, which vector units multiply faster.
        const uint64_t value = shingles[i] & 0xffffffffULL;
        const uint32_t upper = static_cast<uint32_t>(shingles[i] >> 32);
        for (int64_t p = 0; p < permutations; ++p) {
            const uint64_t sum = value * low[p] + shift[p];
            const uint32_t crossed = static_cast<uint32_t>(value) * high[p] + upper * low[p];
            const uint32_t hash = static_cast<uint32_t>(sum >> 32) + crossed;
            signature[p] = hash < signature[p] ? hash : signature[p];
        }
    }
}

void write_signatures(const uint64_t* shingles, const int64_t* offsets, int64_t count, int64_t permutations,
                      uint64_t seed, uint32_t* signatures) {
    std::vector<uint32_t> low(static_cast<size_t>(permutations)), high(low.size());
    std::vector<uint64_t> shift(low.size());
    for (size_t p = 0; p < low.size(); ++p) {
        // An odd factor is invertible modulo 2^64: different shingles have different products.
        const uint64_t factor = fold(seed, 2 * p) | 1;
        low[p] = static_cast<uint32_t>(factor);
        high[p] = static_cast<uint32_t>(factor >> 32);
        shift[p] = fold(seed, 2 * p + 1);
    }
    std::memset(signatures, 0xff, static_cast<size_t>(count * permutations) * sizeof(uint32_t));
    for (int64_t i = 0; i < count; ++i) {
        update_signature(shingles + offsets[i], offsets[i + 1] - offsets[i], low.data(), high.data(), shift.data(),
                         permutations, signatures + i * permutations);
    }
}

struct Corpus {
    const uint64_t* shingles;
    const int64_t* offsets;  // text i has shingles [offsets[i], offsets[i + 1])
    const uint64_t* groups;  // only texts of one group may be duplicates
    const uint32_t* signatures;
    int64_t count;
    int64_t permutations;

    int64_t size(int64_t text) const { return offsets[text + 1] - offsets[text]; }
};

// Whether the Jaccard index of two texts' shingles is at least the threshold, by a merge of the sorted lists.
bool is_similar(const Corpus& corpus, int64_t first, int64_t second, double threshold) {
    const int64_t sizes[2] = {corpus.size(first), corpus.size(second)};
    const auto [small, large] = std::minmax(sizes[0], sizes[1]);
    // The index is at most small / large.
    if (static_cast<double>(small) < threshold * static_cast<double>(large)) return false;
    const uint64_t* a = corpus.shingles + corpus.offsets[first];
    const uint64_t* b = corpus.shingles + corpus.offsets[second];
    const uint64_t *a_end = a + sizes[0], *b_end = b + sizes[1];
    int64_t common = 0;
    while (a < a_end && b < b_end) {
        const uint64_t x = *a, y = *b;
        // Without branches: which list advances is not predictable.
        common += x == y;
        a += x <= y;
        b += y <= x;
    }
    return static_cast<double>(common) >= threshold * static_cast<double>(sizes[0] + sizes[1] - common);
}

// Union-find whose root is the smallest member.
class Clusters {
   public:
    explicit Clusters(int64_t count) : parent_(static_cast<size_t>(count)) {
        std::iota(parent_.begin(), parent_.end(), int64_t{0});
    }
    int64_t root(int64_t item) {
        // Path halving: every node on the way then points to its grandparent.
        while (parent_[item] != item) item = parent_[item] = parent_[parent_[item]];
        return item;
    }
    void join(int64_t first, int64_t second) {
        first = root(first);
        second = root(second);
        parent_[std::max(first, second)] = std::min(first, second);
    }

   private:
    std::vector<int64_t> parent_;
};

// Compares all pairs of a bucket that are in different clusters so far and may be duplicates.
void join_bucket(const Corpus& corpus, const Keyed* begin, const Keyed* end, double threshold, Clusters& clusters) {
    for (const Keyed* a = begin; a != end; ++a) {
        for (const Keyed* b = begin; b != a; ++b) {
            // Pairs of one cluster need no comparison: in a large bucket of duplicates that leaves one for each text.
            const int64_t first = b->second, second = a->second;
            if (clusters.root(first) == clusters.root(second)) continue;
            if (corpus.groups[first] != corpus.groups[second]) continue;
            if (is_similar(corpus, first, second, threshold)) clusters.join(first, second);
        }
    }
}

// Sorts texts by key, then joins the duplicates among the texts of each key.
void join_by_key(const Corpus& corpus, std::vector<Keyed>& keyed, double threshold, Clusters& clusters) {
    std::sort(keyed.begin(), keyed.end());
    for (size_t start = 0, end; start < keyed.size(); start = end) {
        for (end = start + 1; end < keyed.size() && keyed[end].first == keyed[start].first;) ++end;
        join_bucket(corpus, keyed.data() + start, keyed.data() + end, threshold, clusters);
    }
}

// Joins texts with the same shingles; returns the first text of each such cluster, without texts that have no shingle.
std::vector<int64_t> join_equal(const Corpus& corpus, Clusters& clusters) {
    std::vector<Keyed> keyed(static_cast<size_t>(corpus.count));
    for (int64_t text = 0; text < corpus.count; ++text) {
        uint64_t hash = corpus.groups[text];
        for (int64_t i = corpus.offsets[text]; i < corpus.offsets[text + 1]; ++i) hash = fold(hash, corpus.shingles[i]);
        keyed[text] = {hash, text};
    }
    join_by_key(corpus, keyed, 1.0, clusters);
    std::vector<int64_t> first;
    for (int64_t text = 0; text < corpus.count; ++text) {
        if (clusters.root(text) == text && corpus.size(text) > 0) first.push_back(text);
    }
    return first;
}

// Joins the duplicates among texts that agree in signature values [band, band + rows).
void join_band(const Corpus& corpus, const std::vector<int64_t>& texts, int64_t band, int64_t rows, double threshold,
               Clusters& clusters) {
    std::vector<Keyed> keyed;
    keyed.reserve(texts.size());
    for (const int64_t text : texts) {
        uint64_t hash = corpus.groups[text];
        const uint32_t* values = corpus.signatures + text * corpus.permutations + band;
        for (int64_t row = 0; row < rows; ++row) hash = fold(hash, values[row]);
        keyed.emplace_back(hash, text);
    }
    join_by_key(corpus, keyed, threshold, clusters);
}

int64_t find_clusters(const Corpus& corpus, int64_t rows, double threshold, int64_t* cluster) {
    // Exact duplicates first, so that the bands see one text of each.
    Clusters clusters(corpus.count);
    const auto first = join_equal(corpus, clusters);
    for (int64_t band = 0; band + rows <= corpus.permutations; band += rows) {
        join_band(corpus, first, band, rows, threshold, clusters);
    }
    int64_t total = 0;
    for (int64_t text = 0; text < corpus.count; ++text) {
        cluster[text] = clusters.root(text);
        total += cluster[text] == text;
    }
    return total;
}

}  // namespace

// Writes each text's shingles (room for one per word) and offsets (count + 1); returns the total, -1 without memory.
EXPORTED int64_t wizard_shingles(const char* text, const int64_t* ends, int64_t count, int64_t width,
                                 uint64_t* shingles, int64_t* offsets) {
    try {
        std::vector<uint64_t> words;
        int64_t start = 0;
        offsets[0] = 0;
        for (int64_t i = 0; i < count; ++i) {
            hash_words(text + start, ends[i] - start, words);
            offsets[i + 1] = offsets[i] + append_shingles(words, width, shingles + offsets[i]);
            start = ends[i];
        }
        return offsets[count];
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// Writes the (count, permutations) MinHash values of texts given by their shingles; a text without any has all ones.
// Returns 0, or -1 when memory ran out.
EXPORTED int64_t wizard_signatures(const uint64_t* shingles, const int64_t* offsets, int64_t count,
                                   int64_t permutations, uint64_t seed, uint32_t* signatures) {
    try {
        write_signatures(shingles, offsets, count, permutations, seed, signatures);
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// Writes for each text the smallest text of its cluster; returns the number of clusters, or -1 when memory ran out.
// Two texts of a group are joined when they share a band of `rows` signature values and the Jaccard index of their
// shingles is at least the threshold.
EXPORTED int64_t wizard_clusters(const uint64_t* shingles, const int64_t* offsets, const uint64_t* groups,
                                 const uint32_t* signatures, int64_t count, int64_t permutations, int64_t rows,
                                 double threshold, int64_t* cluster) {
    try {
        return find_clusters({shingles, offsets, groups, signatures, count, permutations}, rows, threshold, cluster);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

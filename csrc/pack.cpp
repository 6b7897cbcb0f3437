// Best-fit decreasing packing of sequences into bins of one capacity.
//
// 1. Sort sequences by falling length (counting sort; equal lengths keep their order).
// 2. Put each into the bin with the least space that still fits it, or open a new bin.
//
// The set of the spaces that occur answers "least space >= length" in time log_64(capacity). The bins of each space are
// a stack: a linked list through `below`, with its top in `top`. So a run costs O(sequences * log_64(capacity)).

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace {

using std::size_t;

// A set of integers in [0, size) with "smallest member >= x" in a few instructions: a tree of 64-bit words. Bit b of a
// word of level l + 1 says whether word b of level l is not 0.
class IntegerSet {
   public:
    explicit IntegerSet(int64_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(static_cast<size_t>(size), 0);
        } while (size > 1);
    }

    void insert(int64_t value) {
        for (auto& words : levels_) {
            words[value >> 6] |= uint64_t{1} << (value & 63);
            value >>= 6;
        }
    }

    void erase(int64_t value) {
        // A parent's bit is cleared only when its whole word became 0.
        for (auto& words : levels_) {
            words[value >> 6] &= ~(uint64_t{1} << (value & 63));
            if (words[value >> 6] != 0) return;
            value >>= 6;
        }
    }

    // Smallest member that is at least value, or -1.
    int64_t successor(int64_t value) const {
        // Up until a word has a member at or after the position, then down along the lowest bits.
        for (size_t level = 0; level < levels_.size(); ++level) {
            const auto& words = levels_[level];
            if ((value >> 6) >= static_cast<int64_t>(words.size())) return -1;
            const uint64_t rest = words[value >> 6] >> (value & 63);
            if (rest != 0) return descend(level, value + __builtin_ctzll(rest));
            value = (value >> 6) + 1;
        }
        return -1;
    }

   private:
    int64_t descend(size_t level, int64_t value) const {
        while (level-- > 0) value = (value << 6) + __builtin_ctzll(levels_[level][value]);
        return value;
    }

    std::vector<std::vector<uint64_t>> levels_;
};

// Indices in order of falling length, equal lengths in input order (counting sort).
std::vector<int64_t> falling_order(const int64_t* lengths, int64_t count, int64_t longest) {
    // first[r]: where sequences of length longest - r start in the order.
    std::vector<int64_t> first(static_cast<size_t>(longest) + 2, 0);
    for (int64_t i = 0; i < count; ++i) ++first[longest - lengths[i] + 1];
    for (int64_t i = 1; i <= longest + 1; ++i) first[i] += first[i - 1];
    std::vector<int64_t> order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) order[first[longest - lengths[i]]++] = i;
    return order;
}

int64_t pack(const int64_t* lengths, int64_t count, int64_t capacity, int32_t* bins) {
    int64_t longest = 0;
    for (int64_t i = 0; i < count; ++i) longest = lengths[i] > longest ? lengths[i] : longest;
    const auto order = falling_order(lengths, count, longest);
    std::vector<int32_t> top(static_cast<size_t>(capacity) + 1, -1);  // newest bin of each remaining space
    std::vector<int32_t> below;                                       // the bin under it, per bin
    IntegerSet spaces(capacity + 1);
    for (const int64_t index : order) {
        const int64_t length = lengths[index];
        // Take the newest bin of the least space that fits, or open one.
        int64_t space = spaces.successor(length);
        int32_t bin;
        if (space < 0) {
            bin = static_cast<int32_t>(below.size());
            below.push_back(-1);
            space = capacity;
        } else {
            bin = top[space];
            top[space] = below[bin];
            if (top[space] < 0) spaces.erase(space);
        }
        // Push it onto the stack of its remaining space; a full bin is never looked at again.
        bins[index] = bin;
        space -= length;
        if (space == 0) continue;
        if (top[space] < 0) spaces.insert(space);
        below[bin] = top[space];
        top[space] = bin;
    }
    return static_cast<int64_t>(below.size());
}

}  // namespace

// Writes the bin of each sequence; returns the number of bins, or -1 when memory ran out.
// Every length is in [1, capacity]. Ties between bins of equal space: the one that got that space last.
extern "C" __attribute__((visibility("default"))) int64_t wizard_pack(const int64_t* lengths, int64_t count,
                                                                      int64_t capacity, int32_t* bins) {
    try {
        return pack(lengths, count, capacity, bins);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

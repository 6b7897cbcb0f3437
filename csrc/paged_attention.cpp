// Attention of generation on CPU: queries of tokens over keys and values in pages, and writes of new keys and values.
//
// wizard_paged_attention: threads take tokens from a counter; one token is computed by one thread (`attend`):
//   1. Queries widened and scaled.
//   2. Scores of all heads, one block of keys at a time, page by page (`score`).
//   3. Softmax of each head: maximum, exponentials, their sum (`weigh`). Scores are all in memory, so none is rescaled.
//   4. Sums of weighted values, again page by page; then the division by the sum of the weights.
// wizard_write_pages: rotates q and k of each token (`rotate`) and copies k and v to the token's slot.
//
// Sums are fp32 (fp64 for fp64 input) over the keys of a token in order: its numbers do not depend on other tokens.
// The loops are compiled for plain x86-64, AVX2 and AVX-512; the widest that the processor has is chosen at run time.
// Dot products always use kLanes partial sums that are added in halves, in each version: all give the same bits.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "processor.h"

namespace {

struct Half {
    uint16_t bits;
};

INLINE float widened(Half x) { return ::widened(x.bits); }
INLINE float widened(float x) { return x; }
INLINE double widened(double x) { return x; }

INLINE void narrow(float value, Half& out) { out.bits = ::rounded(value); }
INLINE void narrow(float value, float& out) { out = value; }
INLINE void narrow(double value, double& out) { out = value; }

// The value rounded to the type of the cache, as PyTorch rounds after each operation.
template <typename Cell>
INLINE auto as_cell(decltype(widened(Cell())) value) {
    Cell cell;
    narrow(value, cell);
    return widened(cell);
}

// e^x of x <= 0 to two units in the last place; below -87 it is 0. Cody and Waite's reduction, a polynomial of
// degree 6.
INLINE float exponential(float x) {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low mantissa bits of `shifted`.
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.98756915e-4f;
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345190e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n, built from its exponent bits.
    int32_t exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    const uint32_t power = static_cast<uint32_t>(exponent - 0x4b400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, sizeof scale);
    return x < -87.0f ? 0.0f : p * scale;
}
INLINE double exponential(double x) { return std::exp(x); }

// Partial sums of a dot product: lane i adds terms i, i + kLanes, ...; `folded` adds the lanes in halves. A block has
// kLanes keys, too.
template <typename Real>
constexpr int64_t kLanes = 64 / sizeof(Real);
template <typename Real>
struct Lanes {
    typedef Real Vector __attribute__((vector_size(64)));
    typedef typename std::conditional<sizeof(Real) == 4, int32_t, int64_t>::type Index;
    typedef Index Order __attribute__((vector_size(64)));
};
template <typename Real>
using Vector = typename Lanes<Real>::Vector;

INLINE void load(const float* from, Vector<float>& to) { std::memcpy(&to, from, sizeof to); }
INLINE void load(const double* from, Vector<double>& to) { std::memcpy(&to, from, sizeof to); }
INLINE void load(const Half* from, Vector<float>& to) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Narrow bits;
    std::memcpy(&bits, from, sizeof bits);
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    std::memcpy(&to, &wide, sizeof to);
}

// The first `count` elements of a vector, then zeros.
template <typename Cell, typename Real>
INLINE void load_some(const Cell* from, int64_t count, Vector<Real>& to) {
    if (count >= kLanes<Real>) return load(from, to);
    Cell padded[kLanes<Real>] = {};
    std::memcpy(padded, from, count * sizeof(Cell));
    load(padded, to);
}

// The sum of the lanes: halves are added until one number is left.
template <typename Real>
INLINE Real folded(Real* lanes) {
    for (int64_t width = kLanes<Real> / 2; width; width /= 2)
        for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

template <typename Real, typename Cell>
INLINE Real dot(const Real* query, const Cell* key, int64_t count) {
    constexpr int64_t lanes = kLanes<Real>;
    Real sums[lanes] = {};
    int64_t c = 0;
    for (; c + lanes <= count; c += lanes)
        for (int64_t i = 0; i < lanes; ++i) sums[i] += query[c + i] * widened(key[c + i]);
    for (int64_t i = 0; c + i < count; ++i) sums[i] += query[c + i] * widened(key[c + i]);
    return folded(sums);
}

// Two vectors become one: the sums of lanes kApart apart, those of x in lanes whose bit kApart is 0, those of y in the
// others.
template <int kApart, typename Real>
INLINE void halve(Vector<Real>& x, const Vector<Real>& y) {
    typename Lanes<Real>::Order low, high;
    for (int i = 0; i < kLanes<Real>; ++i) {
        const int side = i & kApart ? kLanes<Real> : 0, place = i & ~kApart;
        low[i] = side + place;
        high[i] = side + place + kApart;
    }
    x = __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
}

// The sum of the lanes of each of kLanes vectors, by a tree of `halve`: the additions, and so the bits, of `folded`.
template <typename Real>
INLINE void transposed_sums(Vector<Real>* v, Real* sums) {
    if (kLanes<Real> == 16)
        for (int i = 0; i < 8; ++i) halve<8 % kLanes<Real>, Real>(v[i], v[i + 8]);
    for (int i = 0; i < 4; ++i) halve<4, Real>(v[i], v[i + 4]);
    for (int i = 0; i < 2; ++i) halve<2, Real>(v[i], v[i + 2]);
    halve<1, Real>(v[0], v[1]);
    std::memcpy(sums, v, sizeof *v);
}

struct Attention {
    const void *q, *keys, *values;
    const int32_t *table, *owners, *lengths;
    void* out;
    int64_t tokens, heads, kv_heads, width, page, columns, window;
    double scale;
};

// Scores of a block of keys for the queries of `group` heads. kShuffle (AVX-512): a vector of partial sums per key,
// then the sums of all keys at once; else dot product by dot product. kEven: the width is a multiple of a vector.
template <bool kShuffle, bool kEven, typename Cell, typename Real>
INLINE void score(const Real* query, const Cell* keys, int64_t stride, int64_t width, int64_t group, Real* scores,
                  int64_t apart) {
    Vector<Real> q, k;
    for (int64_t g = 0; g < group; ++g) {
        const Real* head_query = query + g * width;
        Vector<Real> sums[kLanes<Real>] = {};
        for (int64_t c = 0; kShuffle && c < width; c += kLanes<Real>) {
            const int64_t some = kEven ? kLanes<Real> : width - c;
            load_some<Real, Real>(head_query + c, some, q);
            for (int64_t j = 0; j < kLanes<Real>; ++j) {
                load_some<Cell, Real>(keys + j * stride + c, some, k);
                sums[j] += q * k;
            }
        }
        if (kShuffle) transposed_sums<Real>(sums, scores + g * apart);
        for (int64_t j = 0; !kShuffle && j < kLanes<Real>; ++j)
            scores[g * apart + j] = dot(head_query, keys + j * stride, width);
    }
}

// Turns `count` scores into exp(score - maximum) and returns their sum; scores after them are not touched.
template <typename Real>
INLINE Real weigh(Real* scores, int64_t count) {
    constexpr int64_t lanes = kLanes<Real>;
    Real row_max = scores[0], sums[lanes] = {};
    for (int64_t j = 1; j < count; ++j) row_max = scores[j] > row_max ? scores[j] : row_max;
    int64_t j = 0;
    for (; j + lanes <= count; j += lanes)
        for (int64_t i = 0; i < lanes; ++i) {
            scores[j + i] = exponential(scores[j + i] - row_max);
            sums[i] += scores[j + i];
        }
    for (int64_t i = 0; j + i < count; ++i) {
        scores[j + i] = exponential(scores[j + i] - row_max);
        sums[i] += scores[j + i];
    }
    return folded(sums);
}

// Adds weighted rows of values to sums, kVectors vectors of channels at once, so that the sums stay in registers.
template <int kVectors, typename Cell, typename Real>
INLINE void add_values(const Real* weights, const Cell* values, int64_t count, int64_t stride, int64_t width,
                       Real* sums) {
    Vector<Real> acc[kVectors], v;
    const int64_t last = width - (kVectors - 1) * kLanes<Real>;
    for (int i = 0; i < kVectors; ++i)
        load_some<Real, Real>(sums + i * kLanes<Real>, i + 1 < kVectors ? kLanes<Real> : last, acc[i]);
    for (int64_t j = 0; j < count; ++j)
        for (int i = 0; i < kVectors; ++i) {
            load_some<Cell, Real>(values + j * stride + i * kLanes<Real>, i + 1 < kVectors ? kLanes<Real> : last, v);
            acc[i] += weights[j] * v;
        }
    for (int i = 0; i < kVectors; ++i)
        std::memcpy(sums + i * kLanes<Real>, &acc[i],
                    (i + 1 < kVectors ? kLanes<Real> : std::min(last, kLanes<Real>)) * sizeof(Real));
}

// Prefetches the next block: heads read it with strides that the processor's own prefetcher does not follow.
INLINE void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// All heads of one token, page by page in the order of memory. `room`: the scores of each head, then queries and sums.
template <bool kShuffle, typename Cell, typename Real>
INLINE void attend(const Attention& a, int64_t token, Real* room) {
    const int64_t group = a.heads / a.kv_heads, width = a.width;
    const int64_t last = a.lengths[token], first = a.window && last > a.window ? last - a.window : 0;
    const int64_t at = token * a.heads * width;
    Cell* out = static_cast<Cell*>(a.out) + at;
    if (last <= first) {
        for (int64_t i = 0; i < a.heads * width; ++i) narrow(Real(0), out[i]);
        return;
    }
    // 1. Scores begin with the block of the first visible key, and end with a whole block. `apart`: scores per head.
    constexpr int64_t lanes = kLanes<Real>;
    const int64_t start = first / lanes * lanes, apart = (last - start + lanes - 1) / lanes * lanes;
    Real *scores = room, *query = room + a.heads * apart, *sums = query + a.heads * width;
    const Cell* q = static_cast<const Cell*>(a.q) + at;
    for (int64_t i = 0; i < a.heads * width; ++i) {
        query[i] = widened(q[i]) * static_cast<Real>(a.scale);
        sums[i] = 0;
    }
    const int32_t* pages = a.table + (a.owners ? a.owners[token] : token) * a.columns;
    const int64_t stride = a.kv_heads * width, page_stride = a.page * stride;
    const auto place = [&](const void* cache, int64_t key) {
        return static_cast<const Cell*>(cache) + pages[key / a.page] * page_stride + (key % a.page) * stride;
    };
    // 2. Scores. A page is a multiple of 16 keys, so a block is inside one page; scores of keys outside the window or
    // after the end are computed, but not used.
    const int64_t bytes = lanes * stride * sizeof(Cell);
    for (int64_t key = start; key < last; key += lanes) {
        const Cell* keys = place(a.keys, key);
        if (key + lanes < last)
            fetch(place(a.keys, key + lanes), bytes);
        else
            fetch(place(a.values, start), bytes);
        for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head) {
            const Cell* k = keys + kv_head * width;
            const Real* group_query = query + kv_head * group * width;
            Real* group_scores = scores + kv_head * group * apart + key - start;
            if (width % lanes == 0)
                score<kShuffle, true, Cell, Real>(group_query, k, stride, width, group, group_scores, apart);
            else
                score<kShuffle, false, Cell, Real>(group_query, k, stride, width, group, group_scores, apart);
        }
    }
    // 3. Softmax. The sum of a head's weights overwrites the first element of its query, which is no longer needed.
    for (int64_t h = 0; h < a.heads; ++h)
        query[h * width] = weigh<Real>(scores + h * apart + first - start, last - first);
    // 4. Weighted values, by blocks that start at multiples of kLanes: additions have the same order in every batch.
    for (int64_t key = first; key < last;) {
        const int64_t stop = std::min(last, (key / lanes + 1) * lanes);
        const Cell* values = place(a.values, key);
        if (stop < last) fetch(place(a.values, stop), bytes);
        for (int64_t h = 0; h < a.heads; ++h) {
            const Cell* v = values + h / group * width;
            const Real* weights = scores + h * apart + key - start;
            Real* head_sums = sums + h * width;
            if (!kShuffle) {
                for (int64_t j = 0; j < stop - key; ++j)
                    for (int64_t c = 0; c < width; ++c) head_sums[c] += weights[j] * widened(v[j * stride + c]);
                continue;
            }
            int64_t c = 0;
            for (; width - c >= 4 * lanes; c += 4 * lanes)
                add_values<4, Cell, Real>(weights, v + c, stop - key, stride, 4 * lanes, head_sums + c);
            for (; width - c >= 2 * lanes; c += 2 * lanes)
                add_values<2, Cell, Real>(weights, v + c, stop - key, stride, 2 * lanes, head_sums + c);
            for (; c < width; c += lanes)
                add_values<1, Cell, Real>(weights, v + c, stop - key, stride, width - c, head_sums + c);
        }
        key = stop;
    }
    for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t c = 0; c < width; ++c) narrow(sums[h * width + c] / query[h * width], out[h * width + c]);
}

template <bool kShuffle, typename Cell, typename Real>
INLINE void attend_all(const Attention& a, std::atomic<int64_t>& next, Real* room) {
    for (int64_t token; (token = next.fetch_add(1)) < a.tokens;) attend<kShuffle, Cell, Real>(a, token, room);
}

// Arguments of the writes: q and k are rotated by their token's angles; q goes to its output, k and v to their slots.
struct Write {
    const void* qkv;
    const float *cos, *sin;
    const int64_t* slots;
    void *q, *keys, *values;
    int64_t tokens, row_stride, heads, kv_heads, width;
};

template <typename Cell>
INLINE void rotate(const Cell* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin,
                   Cell* __restrict__ out, int64_t half) {
    using Real = decltype(widened(Cell()));
    for (int64_t c = 0; c < half; ++c) {
        const Real first = widened(x[c]), second = widened(x[c + half]);
        const Real cosine = as_cell<Cell>(static_cast<Real>(cos[c])), sine = as_cell<Cell>(static_cast<Real>(sin[c]));
        narrow(as_cell<Cell>(first * cosine) - as_cell<Cell>(second * sine), out[c]);
        narrow(as_cell<Cell>(second * cosine) + as_cell<Cell>(first * sine), out[c + half]);
    }
}

template <typename Cell>
INLINE void write_all(const Write& w) {
    const int64_t half = w.width / 2, kv_width = w.kv_heads * w.width;
    for (int64_t t = 0; t < w.tokens; ++t) {
        const Cell* row = static_cast<const Cell*>(w.qkv) + t * w.row_stride;
        const float *cos = w.cos + t * half, *sin = w.sin + t * half;
        Cell* q = static_cast<Cell*>(w.q) + t * w.heads * w.width;
        for (int64_t h = 0; h < w.heads; ++h) rotate(row + h * w.width, cos, sin, q + h * w.width, half);
        Cell* key = static_cast<Cell*>(w.keys) + w.slots[t] * kv_width;
        Cell* value = static_cast<Cell*>(w.values) + w.slots[t] * kv_width;
        row += w.heads * w.width;
        for (int64_t h = 0; h < w.kv_heads; ++h) rotate(row + h * w.width, cos, sin, key + h * w.width, half);
        std::memcpy(value, row + kv_width, kv_width * sizeof(Cell));
    }
}

enum Type : int32_t { kFloat = 0, kHalf = 1, kDouble = 2 };

template <bool kShuffle>
INLINE void attend_typed(const Attention& a, int32_t type, std::atomic<int64_t>& next, void* room) {
    if (type == kFloat)
        attend_all<kShuffle, float, float>(a, next, static_cast<float*>(room));
    else if (type == kHalf)
        attend_all<kShuffle, Half, float>(a, next, static_cast<float*>(room));
    else
        attend_all<kShuffle, double, double>(a, next, static_cast<double*>(room));
}

INLINE void write_typed(const Write& w, int32_t type) {
    if (type == kFloat)
        write_all<float>(w);
    else if (type == kHalf)
        write_all<Half>(w);
    else
        write_all<double>(w);
}

using Attend = void (*)(const Attention&, int32_t, std::atomic<int64_t>&, void*);
using Writes = void (*)(const Write&, int32_t);

void attend_plain(const Attention& a, int32_t type, std::atomic<int64_t>& next, void* room) {
    attend_typed<false>(a, type, next, room);
}
void write_plain(const Write& w, int32_t type) { write_typed(w, type); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void attend_avx2(const Attention& a, int32_t type, std::atomic<int64_t>& next,
                                                 void* room) {
    attend_typed<false>(a, type, next, room);
}
__attribute__((target(AVX512))) void attend_avx512(const Attention& a, int32_t type, std::atomic<int64_t>& next,
                                                   void* room) {
    attend_typed<true>(a, type, next, room);
}
__attribute__((target("avx2"))) void write_avx2(const Write& w, int32_t type) { write_typed(w, type); }
__attribute__((target(AVX512))) void write_avx512(const Write& w, int32_t type) { write_typed(w, type); }
#endif

Attend attend_of(int32_t level) {
#if defined(__x86_64__)
    if (level == 2) return attend_avx512;
    if (level == 1) return attend_avx2;
#endif
    return attend_plain;
}

Writes write_of(int32_t level) {
#if defined(__x86_64__)
    if (level == 2) return write_avx512;
    if (level == 1) return write_avx2;
#endif
    return write_plain;
}

// Least products of queries and keys per thread: below, starting a thread costs more than it saves.
constexpr double kLeast = 2e6;

}  // namespace

// Attention of `tokens` queries (tokens, heads, width) over keys and values (pages, page, kv_heads, width).
//
// Token t sees `lengths[t]` keys of the sequence whose pages are row `owners[t]` (t itself without owners) of `table`,
// `columns` wide; at most the last `window`, where that is not 0. level: 0 plain, 1 AVX2, 2 AVX-512; -1 the widest.
// type: 0 fp32, 1 bf16, 2 fp64. Returns the level that ran; -1 when memory runs out; -2 when the processor lacks it;
// -3 when a row of the table, a length or a page is out of range, before anything is read.
EXPORT int64_t wizard_paged_attention(int32_t type, const void* q, const void* keys, const void* values,
                                      const int32_t* table, const int32_t* owners, const int32_t* lengths, void* out,
                                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, int64_t page,
                                      int64_t columns, int64_t window, double scale, int64_t pages, int64_t sequences,
                                      int32_t level, int32_t threads) {
    if (level > widest()) return -2;
    if (level < 0) level = widest();
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t owner = owners ? owners[t] : t;
        if (lengths[t] <= 0) continue;
        if (owner < 0 || owner >= sequences || lengths[t] > columns * page) return -3;
        const int64_t first = window && lengths[t] > window ? lengths[t] - window : 0;
        for (int64_t i = first / page; i * page < lengths[t]; ++i) {
            const int32_t entry = table[owner * columns + i];
            if (entry < 0 || entry >= pages) return -3;
        }
    }
    const Attention a{q,     keys,     values, table, owners,  lengths, out,  tokens,
                      heads, kv_heads, width,  page,  columns, window,  scale};
    int64_t longest = 0;
    double products = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t seen = window && lengths[t] > window ? window : lengths[t];
        longest = std::max(longest, seen);
        products += static_cast<double>(seen) * heads * width;
    }
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>({threads, tokens, int64_t(products / kLeast)}));
    const int64_t size = heads * (longest + 32 + 2 * width) * (type == kDouble ? 8 : 4);
    std::atomic<int64_t> next{0};
    const Attend run = attend_of(level);
    try {
        std::vector<std::vector<char>> rooms;
        for (int64_t i = 0; i < workers; ++i) rooms.emplace_back(size + 8);
        std::vector<std::thread> others;
        others.reserve(workers);
        for (int64_t i = 1; i < workers; ++i) {
            try {
                others.emplace_back(run, std::cref(a), type, std::ref(next), rooms[i].data());
            } catch (const std::system_error&) {
                break;  // the threads that exist take all tokens
            }
        }
        run(a, type, next, rooms[0].data());
        for (std::thread& other : others) other.join();
    } catch (const std::bad_alloc&) {
        return -1;
    }
    return level;
}

// Rotates q and k of `qkv` (tokens, heads + 2 kv_heads, width; rows `row_stride` apart) by cos and sin (tokens, half
// the width): q goes to `q`, k and v to slot `slots[t]` of keys and values (slots, kv_heads, width). Returns as above.
EXPORT int64_t wizard_write_pages(int32_t type, const void* qkv, int64_t row_stride, const float* cos, const float* sin,
                                  const int64_t* slots, void* q, void* keys, void* values, int64_t tokens,
                                  int64_t heads, int64_t kv_heads, int64_t width, int64_t places, int32_t level) {
    if (level > widest()) return -2;
    if (level < 0) level = widest();
    for (int64_t t = 0; t < tokens; ++t)
        if (slots[t] < 0 || slots[t] >= places) return -3;
    write_of(level)(Write{qkv, cos, sin, slots, q, keys, values, tokens, row_stride, heads, kv_heads, width}, type);
    return level;
}

// AdamW on CPU in one pass: add the last micro-batch's gradient to the accumulated one, update, round the weights.
//
//   g = scale (gradient + accumulated)    m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g^2
//   w = w (1 - lr weight_decay) - lr / (1 - b1^step) m / (sqrt(v) / sqrt(1 - b2^step) + epsilon)
//
// The buffers are split over threads, and each thread's part into blocks that fit the first cache (`update`).
// `dispatch` picks one of eight instances: gradient fp32 or bf16, with or without accumulated gradient and copy.
// The loop is compiled for plain x86-64, AVX2 and AVX-512; the widest that the processor has is chosen at run time.
// Elements do not depend on each other and multiply-adds are never fused (-ffp-contract=off): all three, and any number
// of threads, give the same bits.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "processor.h"

namespace {

constexpr int64_t kBlock = 2048;

// Coefficients of a step, computed in fp64 and rounded once. rest = 1 - beta, decay = 1 - lr weight_decay,
// rate = lr / (1 - beta^step), root = 1 / sqrt(1 - beta_sq^step).
struct Numbers {
    float scale, beta, beta_sq, rest, rest_sq, decay, rate, root, epsilon;
};

struct Buffers {
    float *master, *exp_avg, *exp_avg_sq, *accumulated;
    const void* gradient;
    uint16_t* copy;
};

template <bool kHalf, bool kAccumulated, bool kCopy>
INLINE void update(const Buffers& b, const Numbers& n, int64_t first, int64_t last) {
    float* __restrict__ master = b.master;
    float* __restrict__ exp_avg = b.exp_avg;
    float* __restrict__ exp_avg_sq = b.exp_avg_sq;
    float* __restrict__ accumulated = b.accumulated;
    uint16_t* __restrict__ copy = b.copy;
    const float* __restrict__ full = static_cast<const float*>(b.gradient);
    const uint16_t* __restrict__ half = static_cast<const uint16_t*>(b.gradient);
    // Three short loops over a block that stays in the first cache: each reads and writes two to four streams, where a
    // single loop would have ten, more than the processor prefetches well.
    float grads[kBlock];
    for (int64_t start = first; start < last; start += kBlock) {
        const int64_t count = last - start < kBlock ? last - start : kBlock;
        // 1. The gradient in fp32. The accumulated one is cleared for the next step.
        for (int64_t j = 0; j < count; ++j) {
            float grad = kHalf ? widened(half[start + j]) : full[start + j];
            if (kAccumulated) {
                grad += accumulated[start + j];
                accumulated[start + j] = 0.0f;
            }
            grads[j] = grad * n.scale;
        }
        // 2. Moments and weights.
        for (int64_t j = 0; j < count; ++j) {
            const int64_t i = start + j;
            const float mean = n.beta * exp_avg[i] + n.rest * grads[j];
            const float square = n.beta_sq * exp_avg_sq[i] + n.rest_sq * (grads[j] * grads[j]);
            master[i] = master[i] * n.decay - n.rate * mean / (std::sqrt(square) * n.root + n.epsilon);
            exp_avg[i] = mean;
            exp_avg_sq[i] = square;
        }
        // 3. The bf16 weights.
        if (kCopy)
            for (int64_t j = 0; j < count; ++j) copy[start + j] = rounded(master[start + j]);
    }
}

template <bool kHalf, bool kAccumulated>
INLINE void with_copy(const Buffers& b, const Numbers& n, int64_t first, int64_t last) {
    if (b.copy)
        update<kHalf, kAccumulated, true>(b, n, first, last);
    else
        update<kHalf, kAccumulated, false>(b, n, first, last);
}

INLINE void dispatch(const Buffers& b, const Numbers& n, int32_t half, int64_t first, int64_t last) {
    if (half)
        b.accumulated ? with_copy<true, true>(b, n, first, last) : with_copy<true, false>(b, n, first, last);
    else
        b.accumulated ? with_copy<false, true>(b, n, first, last) : with_copy<false, false>(b, n, first, last);
}

using Kernel = void (*)(const Buffers&, const Numbers&, int32_t, int64_t, int64_t);

void plain(const Buffers& b, const Numbers& n, int32_t half, int64_t first, int64_t last) {
    dispatch(b, n, half, first, last);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void avx2(const Buffers& b, const Numbers& n, int32_t half, int64_t first,
                                          int64_t last) {
    dispatch(b, n, half, first, last);
}

__attribute__((target(AVX512))) void avx512(const Buffers& b, const Numbers& n, int32_t half, int64_t first,
                                            int64_t last) {
    dispatch(b, n, half, first, last);
}
#endif

Kernel kernel_of(int32_t level) {
#if defined(__x86_64__)
    if (level == 2) return avx512;
    if (level == 1) return avx2;
#endif
    return plain;
}

// Least elements per thread: below, starting a thread costs more than it saves. Parts are multiples of kStep elements.
constexpr int64_t kLeast = 1 << 18;
constexpr int64_t kStep = 1 << 10;

}  // namespace

// The widest level of this processor.
EXPORT int64_t wizard_adamw_level() { return widest(); }

// One update of n elements, in place; returns the level that ran, or -1 where the processor lacks it.
//   gradient: fp32, or bf16 where half.   accumulated: fp32, added to the gradient and cleared, or null.
//   copy: bf16, or null.   level: 0, 1, 2, or -1 for the widest.   threads: at most so many.
EXPORT int64_t wizard_adamw(float* master, float* exp_avg, float* exp_avg_sq, float* accumulated, const void* gradient,
                            int32_t half, uint16_t* copy, int64_t n, double lr, double beta, double beta_sq,
                            double epsilon, double weight_decay, int64_t step, double scale, int32_t level,
                            int32_t threads) {
    if (level < 0) level = widest();
    if (level > widest()) return -1;
    const double correction = 1.0 - std::pow(beta, static_cast<double>(step));
    const double correction_sq = 1.0 - std::pow(beta_sq, static_cast<double>(step));
    const Numbers numbers{static_cast<float>(scale),           static_cast<float>(beta),
                          static_cast<float>(beta_sq),         static_cast<float>(1.0 - beta),
                          static_cast<float>(1.0 - beta_sq),   static_cast<float>(1.0 - lr * weight_decay),
                          static_cast<float>(lr / correction), static_cast<float>(1.0 / std::sqrt(correction_sq)),
                          static_cast<float>(epsilon)};
    const Buffers buffers{master, exp_avg, exp_avg_sq, accumulated, gradient, copy};
    const Kernel kernel = kernel_of(level);
    int64_t parts = (n + kLeast - 1) / kLeast;
    if (parts > threads) parts = threads;
    if (parts < 1) parts = 1;
    const int64_t part = ((n + parts - 1) / parts + kStep - 1) / kStep * kStep;
    std::vector<std::thread> workers;
    int64_t first = part;
    try {
        for (; first < n; first += part)
            workers.emplace_back(kernel, std::cref(buffers), std::cref(numbers), half, first,
                                 first + part < n ? first + part : n);
    } catch (const std::system_error&) {
        // No further thread: this one does the rest.
        kernel(buffers, numbers, half, first, n);
    }
    kernel(buffers, numbers, half, 0, part < n ? part : n);
    for (std::thread& worker : workers) worker.join();
    return level;
}

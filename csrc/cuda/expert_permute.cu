// Expert permutation: rows of tokens copied to where their experts read them, 16 bytes at a time.
//
// Plain C interface, no torch headers: pointers, sizes and the raw stream. Built by nvcc alone (csrc/__init__.py).

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
// Vectors that a thread reads before it writes the first, so that as many reads are under way.
constexpr int kUnroll = 4;
constexpr int kMaxBlocks = 1 << 20;

// Each block copies whole rows: out[r] = x[index[r] / choices], rows of `vectors` 16-byte vectors.
__global__ void __launch_bounds__(kThreads)
    permute_rows(const uint4* __restrict__ x, const int32_t* __restrict__ index, uint4* __restrict__ out, int64_t rows,
                 int64_t vectors, int64_t stride, int32_t choices) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const uint4* from = x + static_cast<int64_t>(index[row] / choices) * stride;
        uint4* to = out + row * vectors;
        for (int64_t first = threadIdx.x; first < vectors; first += kThreads * kUnroll) {
            uint4 value[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; ++i)
                if (first + i * kThreads < vectors) value[i] = __ldg(from + first + i * kThreads);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i)
                if (first + i * kThreads < vectors) to[first + i * kThreads] = value[i];
        }
    }
}

}  // namespace

// Copies rows on `stream`; returns a cudaError_t, 0 for success.
//   x: rows of `stride` vectors, 16-byte aligned.   index: (rows,) token * choices + choice, on the device.
//   out: (rows, vectors), contiguous.   vectors: 16-byte vectors of a row.
extern "C" __attribute__((visibility("default"))) int wizard_permute_rows(const void* x, const int32_t* index,
                                                                          void* out, int64_t rows, int64_t vectors,
                                                                          int64_t stride, int32_t choices,
                                                                          void* stream) {
    if (rows == 0 || vectors == 0) return 0;
    const int blocks = static_cast<int>(rows < kMaxBlocks ? rows : kMaxBlocks);
    permute_rows<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const uint4*>(x), index, static_cast<uint4*>(out), rows, vectors, stride, choices);
    return static_cast<int>(cudaGetLastError());
}

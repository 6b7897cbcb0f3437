// Writes buffers to a file with a checksum of each, in one call that does not return to Python in between.

#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Bytes that are summed and then written while they are still in the second cache.
constexpr int64_t kChunk = 1 << 18;
constexpr uint32_t kPolynomial = 0xedb88320u;

using Tables = std::array<std::array<uint32_t, 256>, 16>;

// Tables of CRC-32 (zlib's) for sixteen bytes at a time.
const Tables& tables() {
    static const Tables made = [] {
        Tables t{};
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
            t[0][i] = value;
        }
        for (int k = 1; k < 16; ++k)
            for (uint32_t i = 0; i < 256; ++i) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 0xff];
        return t;
    }();
    return made;
}

// CRC-32 of n more bytes, sixteen per step: one table look-up for each byte, and none waits for another.
uint32_t summed(uint32_t crc, const unsigned char* data, int64_t n) {
    const Tables& t = tables();
    crc = ~crc;
    for (; n >= 16; data += 16, n -= 16) {
        uint32_t words[4];
        std::memcpy(words, data, sizeof words);
        words[0] ^= crc;
        crc = 0;
        for (int w = 0; w < 4; ++w)
            for (int b = 0; b < 4; ++b) crc ^= t[15 - 4 * w - b][(words[w] >> (8 * b)) & 0xff];
    }
    for (; n > 0; ++data, --n) crc = (crc >> 8) ^ t[0][(crc ^ *data) & 0xff];
    return ~crc;
}

}  // namespace

// Writes `count` buffers one behind the other to a descriptor; sums: CRC-32 of each. Returns 0, or the system's error.
EXPORT int64_t wizard_write(int32_t descriptor, const void* const* buffers, const int64_t* sizes, int64_t count,
                            uint32_t* sums) {
    for (int64_t i = 0; i < count; ++i) {
        const auto* data = static_cast<const unsigned char*>(buffers[i]);
        uint32_t sum = 0;
        for (int64_t at = 0; at < sizes[i]; at += kChunk) {
            const int64_t size = sizes[i] - at < kChunk ? sizes[i] - at : kChunk;
            sum = summed(sum, data + at, size);
            for (int64_t done = 0; done < size;) {
                const ssize_t written = write(descriptor, data + at + done, static_cast<size_t>(size - done));
                if (written < 0) {
                    if (errno == EINTR) continue;
                    return errno;
                }
                done += written;
            }
        }
        sums[i] = sum;
    }
    return 0;
}

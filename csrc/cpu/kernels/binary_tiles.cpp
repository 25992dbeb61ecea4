// Tiles from the bits of a checkpoint; their layout is in binary_linear.h.
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include <cstring>

#include "cpu/kernels/binary_linear.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

inline int64_t row_bytes(int64_t inputs) { return (inputs + 7) / 8; }

}  // namespace

#if defined(__AVX512BW__)

// A 32 x 32 transpose of 16-bit words by five perfect shuffles.
void binary_tiles(const uint8_t* bits, int64_t outputs, int64_t inputs, uint16_t* tiles, int64_t begin,
                  int64_t end) {
  const int64_t words = tile_words(inputs), bytes = row_bytes(inputs);
  alignas(64) uint16_t index[2][32];
  for (int i = 0; i < 32; ++i) {
    index[0][i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
    index[1][i] = static_cast<uint16_t>(16 + i / 2 + 32 * (i % 2));
  }
  const __m512i low = _mm512_load_si512(index[0]), high = _mm512_load_si512(index[1]);
  const int64_t spare = 8 * bytes - inputs;  // bits of the last byte that are not weights
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t word = 0; word < words; word += 32) {
      __m512i rows[2][32];
      const int64_t at = 2 * word;  // first byte
      const int64_t left = bytes - at < 0 ? 0 : least(64, bytes - at);
      const __mmask64 mask = left == 64 ? ~0ull : (1ull << left) - 1;
      alignas(64) uint8_t keep[64];
      std::memset(keep, 0xFF, sizeof keep);
      if (left > 0 && at + left == bytes) keep[left - 1] = static_cast<uint8_t>(0xFF >> spare);
      const __m512i kept = _mm512_load_si512(keep);
      for (int64_t r = 0; r < 32; ++r) {
        const int64_t n = tile * kTileRows + r;
        rows[0][r] = n < outputs && left > 0
                         ? _mm512_and_si512(kept, _mm512_maskz_loadu_epi8(mask, bits + n * bytes + at))
                         : _mm512_setzero_si512();
      }
      for (int stage = 0; stage < 5; ++stage) {
        const __m512i* from = rows[stage % 2];
        __m512i* to = rows[(stage + 1) % 2];
        for (int i = 0; i < 16; ++i) {
          to[2 * i] = _mm512_permutex2var_epi16(from[i], low, from[i + 16]);
          to[2 * i + 1] = _mm512_permutex2var_epi16(from[i], high, from[i + 16]);
        }
      }
      for (int64_t i = 0; i < least(32, words - word); ++i) {
        const int64_t first =
            16 * (word + i) / kChunkWidth * kChunkWidth;  // weight at which the chunk begins
        const int64_t in_chunk = word + i - first / 16;
        _mm512_storeu_si512(tiles + tile_offset(outputs, inputs, 0, first, tile) + in_chunk * kTileRows,
                            rows[1][i]);
      }
    }
  }
}

#else

void binary_tiles(const uint8_t* bits, int64_t outputs, int64_t inputs, uint16_t* tiles, int64_t begin,
                  int64_t end) {
  const int64_t words = tile_words(inputs), bytes = row_bytes(inputs);
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t n = tile * kTileRows + i;
      for (int64_t word = 0; word < words; ++word) {
        uint32_t value = 0;
        for (int64_t j = 0; j < 2 && n < outputs && 2 * word + j < bytes; ++j) {
          value |= static_cast<uint32_t>(bits[n * bytes + 2 * word + j]) << (8 * j);
        }
        const int64_t rest = inputs - 16 * word;  // later bits are not weights
        if (rest < 16) value &= (1u << rest) - 1;
        const int64_t first = word / kChunkWords * kChunkWidth;
        tiles[tile_offset(outputs, inputs, 0, first, tile) + word % kChunkWords * kTileRows + i] =
            static_cast<uint16_t>(value);
      }
    }
  }
}

#endif

}  // namespace quantopt::QUANTOPT_ISA

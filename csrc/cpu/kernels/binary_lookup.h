// Sums of products with +-1 weights by lookups in vector registers, for binary_linear.cpp and
// binary_conv.cpp.
//
// A sum of g activations with all 2^g sign patterns is tabulated once per row of x, and one lookup inside
// registers replaces g multiply-adds:
//     table[e] = sum_j (2 e_j - 1) x[g i + j]        y[n] += table[g bits of row n]
// A lookup and an addition take about as long as one fused multiply-add, so this passes the arithmetic peak
// of dense kernels. The fp32 tables hold signed sums, so that infinities and NaN propagate as in a dot
// product. The tables and the lookups of each instruction set are in binary_lookup_<isa>.h.
//
// The weights are read chunk by chunk (256 of each row): the tables of four rows of x and one chunk fit the
// first-level cache, and the sums of kBlockTiles tiles the second.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels/binary_linear.h"

// Unrolls loops over registers.
#define QUANTOPT_UNROLL _Pragma("GCC unroll 16")

namespace quantopt::QUANTOPT_ISA {
namespace {

constexpr int64_t kRowsTogether = 4;
constexpr int64_t kBlockTiles = 128;
static_assert(kChunkWidth * 127 < 32768, "sums of 16 bits");

// A run of words of tiles and the tables that they index: those of one chunk, or of a few kernel positions of
// a convolution.
template <class Entry, int MR>
struct Segment {
  const uint16_t* w;        // words of the first tile
  const Entry* tables[MR];  // of each row of x
};

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

#if defined(__AVX512BW__)
#define QUANTOPT_LOOKUPS
#include "cpu/kernels/binary_lookup_avx512.h"
#elif defined(__AVX2__)
#define QUANTOPT_LOOKUPS
#include "cpu/kernels/binary_lookup_avx2.h"
#endif

#if defined(QUANTOPT_LOOKUPS)

namespace quantopt::QUANTOPT_ISA {
namespace {

// One chunk of `count` tiles from the beginning of a band, and their sums. The segments are moved on.
template <int MR>
inline void span_tiles(Segment<int16_t, MR>* segment, int64_t segments, int64_t words, int64_t count,
                       int32_t weight, IntegerPair* total) {
  for (; count >= kBandTiles; count -= kBandTiles, total += kBandTiles * MR) {
    integer_span<MR, 4>(segment, segments, words, weight, total);
    for (int64_t s = 0; s < segments; ++s) segment[s].w += kBandTiles * words * kTileRows;
  }
  switch (count) {
    case 0: break;
    case 1: return integer_span<MR, 1>(segment, segments, words, weight, total);
    case 2: return integer_span<MR, 2>(segment, segments, words, weight, total);
    default: integer_span<MR, 3>(segment, segments, words, weight, total);
  }
}
static_assert(kBandTiles == 4);

template <int MR>
inline void span_tiles(Segment<float, MR>* segment, int64_t segments, int64_t words, int64_t count,
                       int32_t weight, Pair* total) {
  constexpr int NR = kFloatTiles<MR>;
  float weights[kTileRows];
  for (float& w : weights) w = static_cast<float>(weight);
  Pair factor[NR];
  for (Pair& f : factor) f = load_tile(weights);
  for (; count > 0; count -= kBandTiles) {
    const int64_t width = count < kBandTiles ? count : kBandTiles;
    int64_t r = 0;
    for (; r + NR <= width; r += NR, total += NR * MR) {
      float_span<MR, NR>(segment, segments, width, words, factor, total);
      for (int64_t s = 0; s < segments; ++s) segment[s].w += NR * kTileRows;
    }
    for (; r < width; ++r, total += MR) {
      float_span<MR, 1>(segment, segments, width, words, factor, total);
      for (int64_t s = 0; s < segments; ++s) segment[s].w += kTileRows;
    }
    for (int64_t s = 0; s < segments; ++s) segment[s].w += width * (words - 1) * kTileRows;
  }
}

// Writes the sums of tile `tile` into a row of y.
inline void store_tile(const Pair& value, int64_t tile, int64_t outputs, float* y) {
  const int64_t first = tile * kTileRows;
  if (outputs - first >= kTileRows) return store_tile(value, y + first);
  float last[kTileRows];
  store_tile(value, last);
  std::memcpy(y + first, last, sizeof(float) * static_cast<size_t>(outputs - first));
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

#endif

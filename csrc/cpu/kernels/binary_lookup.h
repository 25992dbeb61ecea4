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

// clang-format off: the vectors come first
#include "cpu/kernels/binary_epilogue.h"
// clang-format on

// Unrolls loops over registers.
#define QUANTOPT_UNROLL _Pragma("GCC unroll 16")

namespace quantopt::QUANTOPT_ISA {
namespace {

constexpr int64_t kRowsTogether = 4;
constexpr int64_t kBlockTiles = 128;
static_assert(kChunkWidth * 127 < 32768);  // sums of a chunk fit 16 bits

// A run of words of a tile and the tables that they index: those of one chunk, or of a few kernel positions
// of a convolution. The same words of the next tile are `pitch` words, of a chunk, on.
template <class Entry, int MR>
struct Segment {
  const uint16_t* w;        // words of the first tile
  const Entry* tables[MR];  // of each row of x
};

// Of some whole numbers q and the lookups in their tables: 2 lookups - all = sum_k +-q_k, |lookups| <= most.
struct WholeSums {
  int32_t all, most;
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

// Sums of `count` tiles over some words of all segments: in place of those in `sums`, or added to them. The
// segments are moved on.
template <int MR>
inline void span_tiles(Segment<int16_t, MR>* segment, int64_t segments, int64_t pitch, int64_t words,
                       int64_t count, bool add, ShortSums* sums) {
  for (; count >= kBandTiles; count -= kBandTiles, sums += kBandTiles * MR) {
    integer_span<MR, 4>(segment, segments, pitch, words, add, sums);
    for (int64_t s = 0; s < segments; ++s) segment[s].w += kBandTiles * pitch * kTileRows;
  }
  switch (count) {
    case 0: break;
    case 1: return integer_span<MR, 1>(segment, segments, pitch, words, add, sums);
    case 2: return integer_span<MR, 2>(segment, segments, pitch, words, add, sums);
    default: integer_span<MR, 3>(segment, segments, pitch, words, add, sums);
  }
}
static_assert(kBandTiles == 4);

// The same for a whole chunk, times `weight`, added to totals of 32 bits.
template <int MR>
inline void span_tiles(Segment<int16_t, MR>* segment, int64_t segments, int64_t words, int64_t count,
                       int32_t weight, IntegerPair* total) {
  for (; count > 0; count -= kBandTiles, total += kBandTiles * MR) {
    ShortSums sums[kBandTiles * MR];
    const int64_t width = count < kBandTiles ? count : kBandTiles;
    span_tiles<MR>(segment, segments, words, words, width, false, sums);
    for (int64_t i = 0; i < width * MR; ++i) add_sums(sums[i], weight, total[i]);
  }
}

// One chunk of `count` tiles, times `weight`, added to their totals. The segments are moved on.
template <int MR>
inline void span_tiles(Segment<float, MR>* segment, int64_t segments, int64_t words, int64_t count,
                       int32_t weight, Pair* total) {
  constexpr int NR = kFloatTiles<MR>;
  float weights[kTileRows];
  for (float& w : weights) w = static_cast<float>(weight);
  Pair factor[NR];
  for (Pair& f : factor) f = load_tile(weights);
  for (; count >= NR; count -= NR, total += NR * MR) {
    float_span<MR, NR>(segment, segments, words, words, factor, total);
    for (int64_t s = 0; s < segments; ++s) segment[s].w += NR * words * kTileRows;
  }
  for (; count > 0; --count, total += MR) {
    float_span<MR, 1>(segment, segments, words, words, factor, total);
    for (int64_t s = 0; s < segments; ++s) segment[s].w += words * kTileRows;
  }
}

// Outputs of a row of y from the sums of its tiles [begin, end), every `step`th of `sums`; whole numbers are
// times * sums - sum.
template <class Sums>
__attribute__((noinline)) void epilogue_tiles(const Sums* sums, int64_t step, int32_t sum, int64_t begin,
                                              int64_t end, int64_t outputs, const Epilogue& epilogue,
                                              float* y, int32_t times = 2) {
  for (int64_t tile = begin; tile < end; ++tile, sums += step) {
    Vec values[kTileRows / kWidth];
    tile_values(*sums, times, sum, values);
    for (int64_t h = 0; h < kTileRows / kWidth; ++h) {
      const int64_t n = tile * kTileRows + h * kWidth;
      if (outputs - n >= kWidth) {
        store(y + n, epilogue(values[h], n));
      } else if (outputs > n) {
        const int count = static_cast<int>(outputs - n);
        store_part(y + n, epilogue(values[h], n, count), count);
      }
    }
  }
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

#endif

// Sums of products with +-1 weights by lookups in AVX-512 registers, for binary_linear.cpp and
// binary_conv.cpp.
//
// A sum of g = 4 (fp32) or 6 (whole) activations with all 2^g sign patterns is tabulated once per row of x,
// and one lookup inside registers (vpermps, vpermt2w) replaces g multiply-adds:
//     table[e] = sum_j (2 e_j - 1) x[g i + j]        y[n] += table[g bits of row n]
// A lookup and an addition take about as long as one fused multiply-add, so this passes the arithmetic peak
// of dense kernels (Zen 4: 3 times that of fp32 FMA, 2 times that of dpbusd). The fp32 tables hold signed
// sums, so that infinities and NaN propagate as in a dot product.
//
// A word vector of a tile holds 16 weights of each of 32 rows. Lookups of 32-bit values take the rows 2i from
// the low and the rows 2i + 1 from the high halves; sums are therefore kept as "even" and "odd" vectors of 16
// rows. The weights are read chunk by chunk (240 of each row): the tables of four rows of x and one chunk fit
// the first-level cache, and the sums of kBlockTiles tiles the second.
#pragma once

// clang-format off: the vectors come before the functions that are written in them
#include "cpu/kernels/vec.h"
#include "core/activation.h"
// clang-format on

#include <cstdint>
#include <cstring>

#include "cpu/kernels/binary_linear.h"

#if defined(__AVX512BW__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms of gcc 12 from its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace quantopt::QUANTOPT_ISA {
namespace {

constexpr int64_t kRowsTogether = 4;
constexpr int64_t kBlockTiles = 128;
constexpr int64_t kUnitWords = 3;     // hold 8 groups of 6 weights; a word alone holds groups of 6, 6 and 4
constexpr int64_t kFloatTables = 64;  // entries of the fp32 tables of a word: 4 tables of 16

// Entries of the whole-number tables of some words: tables of 64.
constexpr int64_t integer_entries(int64_t words) {
  return 64 * (words / kUnitWords * 8 + words % kUnitWords * 3);
}
static_assert(integer_entries(kChunkWords) / 64 * 6 * 127 < 32768, "sums of 16 bits");

struct Pair {
  __m512 even, odd;
};
struct IntegerPair {
  __m512i even, odd;
};

// Unrolls loops over registers, and keeps a value in its register and the order of the sums: gcc would move
// all lookups before the additions, or make a tree of them, run out of registers and halve the speed.
#define QUANTOPT_UNROLL _Pragma("GCC unroll 16")
#define QUANTOPT_KEEP(register) asm volatile("" : "+v"(register))

// Tables of x[0, width), padded with zeros to whole words; width >= 1.
inline void make_tables(const float* x, int64_t width, float* tables) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512 sign[4];
  QUANTOPT_UNROLL for (int j = 0; j < 4; ++j) {
    const __mmask16 plus = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(1 << j));
    sign[j] = _mm512_mask_blend_ps(plus, _mm512_set1_ps(-1.0f), _mm512_set1_ps(1.0f));
  }
  for (int64_t i = 0; 4 * i < (width + 15) / 16 * 16; ++i) {
    float padded[4] = {};
    const float* v = x + 4 * i;
    const int64_t rest = width - 4 * i;
    if (rest < 4) {
      for (int64_t j = 0; j < rest; ++j) padded[j] = v[j];
      v = padded;
    }
    __m512 t = _mm512_mul_ps(_mm512_set1_ps(v[0]), sign[0]);
    QUANTOPT_UNROLL for (int j = 1; j < 4; ++j) t = _mm512_fmadd_ps(_mm512_set1_ps(v[j]), sign[j], t);
    _mm512_store_ps(tables + 16 * i, t);
  }
}

// What the whole-number tables are made of: e_j of entries 0-31 as bytes, and the bytes of a pair in all
// lanes.
struct Patterns {
  alignas(64) uint8_t entry[4][64];  // e0 e1, e2 e3, e4 0, e4 1
  alignas(16) int8_t lanes[8][16];   // the bytes 2 i, 2 i + 1
};
constexpr Patterns make_patterns() {
  Patterns patterns{};
  for (int e = 0; e < 32; ++e) {
    for (int j = 0; j < 5; ++j) patterns.entry[j / 2][2 * e + j % 2] = static_cast<uint8_t>((e >> j) & 1);
    patterns.entry[3][2 * e] = patterns.entry[2][2 * e];
    patterns.entry[3][2 * e + 1] = 1;
  }
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 16; ++j) patterns.lanes[i][j] = static_cast<int8_t>(2 * i + j % 2);
  }
  return patterns;
}
constexpr Patterns kPatterns = make_patterns();

// The same for whole numbers of at most 127: table[e] = sum_j e_j x_j, so that y = 2 * lookups - sum_k x_k.
// Adds x to `sum`, lane by lane. The groups of a unit are the bits 0-5 and 6-11 of each of its three words a
// (groups 2 a, 2 a + 1); group 6 is bits 12-15 of word 0 and 12-13 of word 1, group 7 bits 12-15 of word 2
// and 14-15 of word 1. Those of a word alone are the bits 0-5, 6-11 and 12-15.
inline void make_tables(const float* x, int64_t width, int16_t* tables, __m512i& sum) {
  __m512i entry[4], lanes[8];
  QUANTOPT_UNROLL for (int j = 0; j < 4; ++j) entry[j] = _mm512_load_si512(kPatterns.entry[j]);
  QUANTOPT_UNROLL for (int j = 0; j < 8; ++j) {
    lanes[j] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kPatterns.lanes[j])));
  }
  const auto put = [&](__m512i x01, __m512i x23, __m512i x45, int64_t i) {
    const __m512i four =
        _mm512_add_epi16(_mm512_maddubs_epi16(entry[0], x01), _mm512_maddubs_epi16(entry[1], x23));
    _mm512_store_si512(tables + 64 * i, _mm512_add_epi16(four, _mm512_maddubs_epi16(entry[2], x45)));
    _mm512_store_si512(tables + 64 * i + 32, _mm512_add_epi16(four, _mm512_maddubs_epi16(entry[3], x45)));
  };
  // The bytes of word `word`, in all four quarters of a vector.
  const auto bytes_of = [&](int64_t word) {
    const int64_t rest = width - 16 * word;
    const __mmask16 mask = static_cast<__mmask16>(rest >= 16 ? 0xFFFF : (1 << rest) - 1);
    const __m512i q = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(mask, x + 16 * word));
    sum = _mm512_add_epi32(sum, q);
    return _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(q));
  };
  const int64_t words = (width + 15) / 16;
  int64_t word = 0;
  for (; word + kUnitWords <= words; word += kUnitWords, tables += 8 * 64) {
    __m512i pair[kUnitWords][8];  // the two bytes of each pair of a word in all lanes
    QUANTOPT_UNROLL for (int a = 0; a < kUnitWords; ++a) {
      const __m512i bytes = bytes_of(word + a);
      QUANTOPT_UNROLL for (int j = 0; j < 8; ++j) pair[a][j] = _mm512_shuffle_epi8(bytes, lanes[j]);
      put(pair[a][0], pair[a][1], pair[a][2], 2 * a);
      put(pair[a][3], pair[a][4], pair[a][5], 2 * a + 1);
    }
    put(pair[0][6], pair[0][7], pair[1][6], 6);
    put(pair[2][6], pair[2][7], pair[1][7], 7);
  }
  for (; word < words; ++word, tables += 3 * 64) {
    __m512i pair[8];
    const __m512i bytes = bytes_of(word);
    QUANTOPT_UNROLL for (int j = 0; j < 8; ++j) pair[j] = _mm512_shuffle_epi8(bytes, lanes[j]);
    put(pair[0], pair[1], pair[2], 0);
    put(pair[3], pair[4], pair[5], 1);
    put(pair[6], pair[7], _mm512_setzero_si512(), 2);
  }
}

// Brings the word of the tile `tiles` further on into the second-level cache. Weights that come from memory
// arrive three times as fast (M = 1, Zen 4), others are not slowed; into the first-level cache it helps
// little.
inline __attribute__((always_inline)) void prefetch(const uint16_t* w, int64_t stride, int64_t tiles) {
  _mm_prefetch(reinterpret_cast<const char*>(w + stride * tiles), _MM_HINT_T1);
}
constexpr int64_t kSpansAhead = 2;

// total[r MR + i] += factor[r] * (lookups of words [0, words) of tile r in the tables of row i). `stride` is
// the distance of two tiles. The totals are in memory: all registers go to the sums of one call.
template <int MR, int NR>
__attribute__((noinline)) void float_span(const uint16_t* w, int64_t stride, int64_t words,
                                          const float* const* tables, const Pair* factor, Pair* total) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const float* at[MR];
  __m512 even[MR][NR], odd[MR][NR];
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    at[i] = tables[i];
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) even[i][r] = odd[i][r] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < words; ++k, w += kTileRows) {
    __m512i v[NR];
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
      v[r] = _mm512_loadu_si512(w + r * stride);
      prefetch(w, stride, r + kSpansAhead * NR);
    }
    QUANTOPT_UNROLL for (unsigned j = 0; j < 4; ++j) {
      __m512i low[NR], high[NR];
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
        low[r] = _mm512_srli_epi32(v[r], 4 * j);
        high[r] = _mm512_srli_epi32(v[r], 16 + 4 * j);
      }
      QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
        const __m512 table = _mm512_load_ps(at[i] + kFloatTables * k + 16 * j);
        QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
          even[i][r] = _mm512_add_ps(even[i][r], _mm512_permutexvar_ps(low[r], table));
          QUANTOPT_KEEP(even[i][r]);
          // 1 * lookup + odd: the same sum on other execution units, 8 to 17 % faster than additions alone.
          odd[i][r] = _mm512_fmadd_ps(_mm512_permutexvar_ps(high[r], table), one, odd[i][r]);
          QUANTOPT_KEEP(odd[i][r]);
        }
      }
    }
  }
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
      Pair& t = total[r * MR + i];
      t.even = _mm512_fmadd_ps(even[i][r], factor[r].even, t.even);
      t.odd = _mm512_fmadd_ps(odd[i][r], factor[r].odd, t.odd);
    }
  }
}

// acc[i][r] += table i, at `offset`, at index[r]
template <int MR, int NR>
inline __attribute__((always_inline)) void lookup(const __m512i* index, const int16_t* const* tables,
                                                  int64_t offset, __m512i (*acc)[NR]) {
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    const int16_t* table = tables[i] + offset;
    const __m512i low = _mm512_load_si512(table), high = _mm512_load_si512(table + 32);
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
      acc[i][r] = _mm512_add_epi16(acc[i][r], _mm512_permutex2var_epi16(low, index[r], high));
      QUANTOPT_KEEP(acc[i][r]);
    }
  }
}

// 32-bit sum += a.low * b.low + a.high * b.high of the 16-bit halves
inline __attribute__((always_inline)) __m512i add_products(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

// total[r MR + i] += weight * (lookups of words [0, words) of tile r in the tables of row i), words <=
// kChunkWords
template <int MR, int NR>
__attribute__((noinline)) void integer_span(const uint16_t* w, int64_t stride, int64_t words,
                                            const int16_t* const* tables, int32_t weight,
                                            IntegerPair* total) {
  const __m512i bits45 = _mm512_set1_epi16(0x30);
  const int16_t* at[MR];
  __m512i acc[MR][NR];
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    at[i] = tables[i];
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) acc[i][r] = _mm512_setzero_si512();
  }
  int64_t offset = 0;
  for (; words >= kUnitWords; words -= kUnitWords, w += kUnitWords * kTileRows, offset += 8 * 64) {
    __m512i sixth[NR], seventh[NR];
    QUANTOPT_UNROLL for (int a = 0; a < kUnitWords; ++a) {
      __m512i v[NR], index[NR];
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
        v[r] = _mm512_loadu_si512(w + r * stride + a * kTileRows);
        QUANTOPT_KEEP(v[r]);  // one load, not one for each use
        prefetch(w + a * kTileRows, stride, r + kSpansAhead * NR);
      }
      lookup<MR, NR>(v, at, offset + 2 * a * 64, acc);
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) index[r] = _mm512_srli_epi16(v[r], 6);
      lookup<MR, NR>(index, at, offset + (2 * a + 1) * 64, acc);
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
        // Ternary logic 0xF8: a | (b & c).
        if (a == 0) sixth[r] = _mm512_srli_epi16(v[r], 12);
        if (a == 1) {
          sixth[r] = _mm512_ternarylogic_epi32(sixth[r], _mm512_srli_epi16(v[r], 8), bits45, 0xF8);
          seventh[r] = _mm512_srli_epi16(v[r], 10);
        }
        if (a == 2) {
          seventh[r] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v[r], 12), seventh[r], bits45, 0xF8);
        }
      }
    }
    lookup<MR, NR>(sixth, at, offset + 6 * 64, acc);
    lookup<MR, NR>(seventh, at, offset + 7 * 64, acc);
  }
  for (; words > 0; --words, w += kTileRows, offset += 3 * 64) {
    __m512i v[NR], index[NR];
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) v[r] = _mm512_loadu_si512(w + r * stride);
    lookup<MR, NR>(v, at, offset, acc);
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) index[r] = _mm512_srli_epi16(v[r], 6);
    lookup<MR, NR>(index, at, offset + 64, acc);
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) index[r] = _mm512_srli_epi16(v[r], 12);
    lookup<MR, NR>(index, at, offset + 128, acc);
  }
  const __m512i low = _mm512_set1_epi32(weight), high = _mm512_set1_epi32(weight << 16);
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
      IntegerPair& t = total[r * MR + i];
      t.even = add_products(t.even, acc[i][r], low);
      t.odd = add_products(t.odd, acc[i][r], high);
    }
  }
}

// One chunk of `count` tiles at w, and their sums: as many tiles at a time as there are registers for.
template <int MR, int NR = 4>
inline void span_tiles(const uint16_t* w, int64_t words, int64_t count, const int16_t* const* tables,
                       int32_t weight, IntegerPair* total) {
  const int64_t stride = words * kTileRows;
  for (; count >= NR; count -= NR, w += NR * stride, total += NR * MR) {
    integer_span<MR, NR>(w, stride, words, tables, weight, total);
  }
  if constexpr (NR > 1) span_tiles<MR, NR / 2>(w, words, count, tables, weight, total);
}

template <int MR, int NR = (MR <= 2 ? 4 : 2)>
inline void span_tiles(const uint16_t* w, int64_t words, int64_t count, const float* const* tables,
                       int32_t weight, Pair* total) {
  const int64_t stride = words * kTileRows;
  Pair factor[NR];
  for (Pair& f : factor) f.even = f.odd = _mm512_set1_ps(static_cast<float>(weight));
  for (; count >= NR; count -= NR, w += NR * stride, total += NR * MR) {
    float_span<MR, NR>(w, stride, words, tables, factor, total);
  }
  if constexpr (NR > 1) span_tiles<MR, NR / 2>(w, words, count, tables, weight, total);
}

// 2 total - sum, the sums of products of whole numbers, as floats.
inline Pair signed_sums(const IntegerPair& total, int32_t sum) {
  const __m512i all = _mm512_set1_epi32(sum);
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_slli_epi32(total.even, 1), all)),
          _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_slli_epi32(total.odd, 1), all))};
}

// y[n] = activation(value * (scale[n] * x_scale) + bias[n]) for the outputs n of a tile; a null scale is 1,
// its stride 0 or 1.
inline void finish_tile(Pair value, int64_t tile, int64_t outputs, const float* scale, int64_t scale_stride,
                        float x_scale, const float* bias, Activation activation, float* y) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  const __m512 half[2] = {_mm512_permutex2var_ps(value.even, low, value.odd),
                          _mm512_permutex2var_ps(value.even, high, value.odd)};
  for (int i = 0; i < 2; ++i) {
    const int64_t n = tile * kTileRows + 16 * i;
    if (n >= outputs) return;
    const __mmask16 mask = static_cast<__mmask16>(outputs - n >= 16 ? 0xFFFF : (1 << (outputs - n)) - 1);
    __m512 factor = _mm512_set1_ps(x_scale);
    if (scale != nullptr) {
      const __m512 s = scale_stride == 0 ? _mm512_set1_ps(*scale) : _mm512_maskz_loadu_ps(mask, scale + n);
      factor = _mm512_mul_ps(s, factor);
    }
    __m512 result = _mm512_mul_ps(half[i], factor);
    if (bias != nullptr) result = _mm512_add_ps(result, _mm512_maskz_loadu_ps(mask, bias + n));
    result = (__m512)activate(activation, (Vec)result);
    _mm512_mask_storeu_ps(y + n, mask, result);
  }
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

#endif

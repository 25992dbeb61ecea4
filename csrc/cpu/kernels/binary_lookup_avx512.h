// Lookups in AVX-512 registers, for binary_lookup.h: vpermps finds 16 sums of 4 products, vpermt2w 32 sums
// of 6. On Zen 4 one vpermt2w and one vpaddw start per cycle: 192 multiply-adds, against 64 of vpdpbusd;
// 1.17 cycles are reached from the first-level cache, of which 0.17 go to shifting indices, 1.4 with all else
// (4096 x 4096, 128 rows, integer_span and binary_linear alone). One vpermps and one addition take 1.03
// cycles: 64, against 16 of a fused multiply-add; about 1.45 are reached. A dot product by vgf2p8affineqb and
// vpdpbusd on bit planes would take 2 cycles for 64, as both run on the same units.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms of gcc 12 from its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/binary_linear.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

constexpr int64_t kUnitWords = 3;     // hold 8 groups of 6 weights; a word alone holds groups of 6, 6 and 4
constexpr int64_t kFloatTables = 64;  // entries of the fp32 tables of a word: 4 tables of 16
template <int MR>
constexpr int kFloatTiles = MR <= 2 ? 4 : 2;  // tiles of fp32 sums that there are registers for

// Entries of the whole-number tables of some words: tables of 64.
constexpr int64_t integer_entries(int64_t words) {
  return 64 * (words / kUnitWords * 8 + words % kUnitWords * 3);
}

// Sums of the 32 rows of a tile: lookups of 32-bit values take the rows 2i from the low and the rows 2i + 1
// from the high halves of words.
struct Pair {
  __m512 even, odd;
};
struct IntegerPair {
  __m512i even, odd;
};
// Sums of 16 bits, rows in order.
struct ShortSums {
  __m512i rows;
};
inline void clear(Pair& total) { total.even = total.odd = _mm512_setzero_ps(); }
inline void clear(IntegerPair& total) { total.even = total.odd = _mm512_setzero_si512(); }

// KEEP holds a value in its register at this point of the program: without it
// gcc loads a table again for each lookup, moves all lookups before the additions, or makes a tree of them
// and runs out of registers. Two lookups followed by their two additions leave all four vector units busy
// (Zen 4); alternating them costs a fifth, as the additions are then given to the units that lookups need.
#define QUANTOPT_KEEP(register) asm volatile("" : "+v"(register))
#define QUANTOPT_KEEP_BOTH(a, b) asm volatile("" : "+v"(a), "+v"(b))

// Where the words of NR tiles begin, each in a register: gcc would compute one from another beside each load.
template <int NR>
inline __attribute__((always_inline)) void tile_pointers(const uint16_t* w, int64_t pitch,
                                                         const uint16_t* (&tiles)[NR]) {
  QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
    tiles[r] = w + r * pitch * kTileRows;
    asm volatile("" : "+r"(tiles[r]));
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

// Patterns from which the whole-number tables are built. Quarter t of a vector holds the table of 8 entries
// of the numbers 3 t, 3 t + 1 and 3 t + 2; two such tables are combined to one of 64 entries.
struct Patterns {
  alignas(64) uint8_t entry[2][64];  // bits 0 and 1, bit 2 of entries 0-7
  alignas(64) uint8_t bytes[2][64];  // numbers 3 t and 3 t + 1, 3 t + 2 and none
  alignas(64) uint16_t low[2][32];   // entry e of groups 0 and 1: its bits 0-2 in quarters 0 and 2
  alignas(64) uint16_t high[2][64];  // bits 3-5 in quarters 1 and 3
};
constexpr Patterns make_patterns() {
  Patterns patterns{};
  for (int i = 0; i < 32; ++i) {
    const int t = i / 8, e = i % 8;
    patterns.entry[0][2 * i] = static_cast<uint8_t>(e & 1);
    patterns.entry[0][2 * i + 1] = static_cast<uint8_t>((e >> 1) & 1);
    patterns.entry[1][2 * i] = static_cast<uint8_t>(e >> 2);
    patterns.bytes[0][2 * i] = static_cast<uint8_t>(3 * t);
    patterns.bytes[0][2 * i + 1] = static_cast<uint8_t>(3 * t + 1);
    patterns.bytes[1][2 * i] = static_cast<uint8_t>(3 * t + 2);
    patterns.bytes[1][2 * i + 1] = 0x80;  // zero
  }
  for (int group = 0; group < 2; ++group) {
    for (int e = 0; e < 64; ++e) {
      patterns.low[group][e % 32] = static_cast<uint16_t>(16 * group + e % 8);
      patterns.high[group][e] = static_cast<uint16_t>(16 * group + 8 + e / 8);
    }
  }
  return patterns;
}
constexpr Patterns kPatterns = make_patterns();

// The same for whole numbers of at most 127: table[e] = sum_j e_j q_j, in the first table less half the sum
// of all q, so that the lookups of a row add up to at most half the sum of all |q|. With `whole`, twice that:
// the lookups add up to sum_k +-q_k. Group i of a unit is its bits 6 i to 6 i + 5; those of a word alone are
// its bits 0-5, 6-11 and 12-15.
template <bool whole = false>
inline WholeSums make_tables(const int8_t* q, int64_t width, int16_t* tables) {
  int16_t* const all_tables = tables;
  const auto load = [](const auto* p) { return _mm512_load_si512(p); };
  __m512i entry[2] = {load(kPatterns.entry[0]), load(kPatterns.entry[1])};
  if constexpr (whole) {
    for (__m512i& e : entry) e = _mm512_add_epi8(e, e);
  }
  const __m512i bytes[2] = {load(kPatterns.bytes[0]), load(kPatterns.bytes[1])};
  const __m512i low[2] = {load(kPatterns.low[0]), load(kPatterns.low[1])};
  const __m512i high[4] = {load(kPatterns.high[0]), load(kPatterns.high[0] + 32), load(kPatterns.high[1]),
                           load(kPatterns.high[1] + 32)};
  // Tables of the `groups` times 6 numbers at p; 16 are read.
  const auto put = [&](const int8_t* p, int groups) __attribute__((always_inline)) {
    const __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i eights = _mm512_add_epi16(_mm512_maddubs_epi16(entry[0], _mm512_shuffle_epi8(v, bytes[0])),
                                            _mm512_maddubs_epi16(entry[1], _mm512_shuffle_epi8(v, bytes[1])));
    QUANTOPT_UNROLL for (int g = 0; g < groups; ++g, tables += 64) {
      const __m512i first = _mm512_permutexvar_epi16(low[g], eights);
      QUANTOPT_UNROLL for (int h = 0; h < 2; ++h) {
        const __m512i rest = _mm512_permutexvar_epi16(high[2 * g + h], eights);
        _mm512_store_si512(tables + 32 * h, _mm512_add_epi16(first, rest));
      }
    }
  };
  const auto unit = [&](const int8_t* p) __attribute__((always_inline)) {
    QUANTOPT_UNROLL for (int t = 0; t < 4; ++t) put(p + 12 * t, 2);
  };
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums = _mm512_setzero_si512(), sizes = sums;
  for (int64_t k = 0; k < width; k += 64) {
    const __mmask64 mask = width - k >= 64 ? ~__mmask64{0} : (__mmask64{1} << (width - k)) - 1;
    const __m512i v = _mm512_maskz_loadu_epi8(mask, q + k);
    sums = add_products(sums, _mm512_maddubs_epi16(ones, v), _mm512_set1_epi16(1));
    sizes = add_products(sizes, _mm512_maddubs_epi16(_mm512_abs_epi8(v), ones), _mm512_set1_epi16(1));
  }
  int64_t k = 0;
  for (; k + 64 <= width; k += 16 * kUnitWords) unit(q + k);
  if (k < width) {  // the rest, with zeros behind it
    alignas(64) int8_t end[128];
    _mm512_store_si512(end, _mm512_maskz_loadu_epi8((__mmask64{1} << (width - k)) - 1, q + k));
    _mm512_store_si512(end + 64, _mm512_setzero_si512());
    const int8_t* p = end;
    int64_t words = (width - k + 15) / 16;
    for (; words >= kUnitWords; words -= kUnitWords, p += 16 * kUnitWords) unit(p);
    for (; words > 0; --words, p += 16) {
      put(p, 2);
      put(p + 12, 1);
    }
  }
  const int32_t sum = _mm512_reduce_add_epi32(sums), half = whole ? sum : sum >> 1, all = sum - 2 * half;
  for (int h = 0; h < 2; ++h) {
    const __m512i table = _mm512_load_si512(all_tables + 32 * h);
    _mm512_store_si512(all_tables + 32 * h,
                       _mm512_sub_epi16(table, _mm512_set1_epi16(static_cast<int16_t>(half))));
  }
  return {all, (_mm512_reduce_add_epi32(sizes) + all) / 2};
}

// Brings weights that are read soon into the first-level cache: a line for each of NR tiles, 8 KB on. Whole
// chunks (`line`: where the next lines are counted from) go in the order of memory, which the processor
// foresees better than tiles side by side (AMD Zen 5); else `line` is null.
template <int NR>
inline __attribute__((always_inline)) void prefetch(const uint16_t* const (&w)[NR], const uint16_t* line,
                                                    int64_t word) {
  constexpr int64_t kAhead = 128 * kTileRows;
  const auto fetch = [](const uint16_t* p) __attribute__((always_inline)) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0);
  };
  if (line != nullptr) {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) fetch(line + (word * NR + r) * kTileRows);
  } else {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) fetch(w[r] + word * kTileRows);
  }
}

// total[r MR + i] += factor[r] * (lookups of `words` words of tile r in the tables of row i, all segments).
// The totals are in memory: all registers go to the sums of one call.
template <int MR, int NR>
__attribute__((noinline)) void float_span(const Segment<float, MR>* segment, int64_t segments, int64_t pitch,
                                          int64_t words, const Pair* factor, Pair* total) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 even[MR][NR], odd[MR][NR];
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) even[i][r] = odd[i][r] = _mm512_setzero_ps();
  }
  for (const auto* last = segment + segments; segment < last; ++segment) {
    const uint16_t* w[NR];
    tile_pointers<NR>(segment->w, pitch, w);
    const float* at[MR];
    QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) at[i] = segment->tables[i];
    for (int64_t k = 0; k < words; ++k) {
      __m512i v[NR];
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
        v[r] = _mm512_loadu_si512(w[r] + k * kTileRows);
        QUANTOPT_KEEP(v[r]);
      }
      prefetch(w, words == pitch ? segment->w : nullptr, k);
      QUANTOPT_UNROLL for (unsigned j = 0; j < 4; ++j) {
        __m512i low[NR], high[NR];
        QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
          low[r] = _mm512_srli_epi32(v[r], 4 * j);
          high[r] = _mm512_srli_epi32(v[r], 16 + 4 * j);
        }
        QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
          __m512 table = _mm512_load_ps(at[i] + kFloatTables * k + 16 * j);
          QUANTOPT_KEEP(table);
          QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
            __m512 a = _mm512_permutexvar_ps(low[r], table), b = _mm512_permutexvar_ps(high[r], table);
            QUANTOPT_KEEP_BOTH(a, b);
            // 1 * lookup + odd: the same sum on other units than additions run on.
            even[i][r] = _mm512_add_ps(even[i][r], a);
            odd[i][r] = _mm512_fmadd_ps(b, one, odd[i][r]);
            QUANTOPT_KEEP_BOTH(even[i][r], odd[i][r]);
          }
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
    __m512i low = _mm512_load_si512(table), high = _mm512_load_si512(table + 32);
    if constexpr (NR > 1) QUANTOPT_KEEP_BOTH(low, high);
    QUANTOPT_UNROLL for (int r = 0; r + 1 < NR; r += 2) {
      __m512i a = _mm512_permutex2var_epi16(low, index[r], high);
      __m512i b = _mm512_permutex2var_epi16(low, index[r + 1], high);
      QUANTOPT_KEEP_BOTH(a, b);
      acc[i][r] = _mm512_add_epi16(acc[i][r], a);
      acc[i][r + 1] = _mm512_add_epi16(acc[i][r + 1], b);
      QUANTOPT_KEEP_BOTH(acc[i][r], acc[i][r + 1]);
    }
    if constexpr (NR % 2 == 1) {
      constexpr int r = NR - 1;
      acc[i][r] = _mm512_add_epi16(acc[i][r], _mm512_permutex2var_epi16(low, index[r], high));
      QUANTOPT_KEEP(acc[i][r]);
    }
  }
}

// Words shifted right by `count` bits, the free bits filled from the words that follow.
template <unsigned count>
inline __attribute__((always_inline)) __m512i shift_in(__m512i word, __m512i next) {
#if defined(__AVX512VBMI2__)
  return _mm512_shrdi_epi16(word, next, count);
#else
  return _mm512_or_si512(_mm512_srli_epi16(word, count), _mm512_slli_epi16(next, 16 - count));
#endif
}

// sums[r MR + i] (+)= lookups of `words` words of tile r in the tables of row i, all segments, for NR
// tiles; such that what is added up stays within 16 bits.
template <int MR, int NR>
__attribute__((noinline)) void integer_span(const Segment<int16_t, MR>* segment, int64_t segments,
                                            int64_t pitch, int64_t words, bool add, ShortSums* sums) {
  __m512i acc[MR][NR];
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
      acc[i][r] = add ? sums[r * MR + i].rows : _mm512_setzero_si512();
    }
  }
  for (const auto* last = segment + segments; segment < last; ++segment) {
    const uint16_t* w[NR];
    tile_pointers<NR>(segment->w, pitch, w);
    const int16_t* at[MR];
    QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) at[i] = segment->tables[i];
    int64_t offset = 0, left = words;
    const uint16_t* line = words == pitch ? segment->w : nullptr;
    __m512i v[NR], next[NR], index[NR];
    const auto load = [&](int64_t word, __m512i* to) __attribute__((always_inline)) {
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
        to[r] = _mm512_loadu_si512(w[r] + word * kTileRows);
        QUANTOPT_KEEP(to[r]);
      }
      prefetch(w, line, word);
    };
    const auto group = [&](int i, auto make) __attribute__((always_inline)) {
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) index[r] = make(r);
      lookup<MR, NR>(index, at, offset + 64 * i, acc);
    };
    const auto advance = [&](int64_t unit, int64_t entries) __attribute__((always_inline)) {
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) w[r] += unit * kTileRows;
      if (line != nullptr) line += unit * NR * kTileRows;
      left -= unit;
      offset += entries;
    };
    for (; left >= kUnitWords; advance(kUnitWords, integer_entries(kUnitWords))) {
      load(0, v);
      lookup<MR, NR>(v, at, offset, acc);
      group(1, [&](int r) { return _mm512_srli_epi16(v[r], 6); });
      load(1, next);
      group(2, [&](int r) { return shift_in<12>(v[r], next[r]); });
      group(3, [&](int r) { return _mm512_srli_epi16(next[r], 2); });
      group(4, [&](int r) { return _mm512_srli_epi16(next[r], 8); });
      load(2, v);
      group(5, [&](int r) { return shift_in<14>(next[r], v[r]); });
      group(6, [&](int r) { return _mm512_srli_epi16(v[r], 4); });
      group(7, [&](int r) { return _mm512_srli_epi16(v[r], 10); });
    }
    for (; left > 0; advance(1, integer_entries(1))) {
      load(0, v);
      lookup<MR, NR>(v, at, offset, acc);
      group(1, [&](int r) { return _mm512_srli_epi16(v[r], 6); });
      group(2, [&](int r) { return _mm512_srli_epi16(v[r], 12); });
    }
  }
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) sums[r * MR + i].rows = acc[i][r];
  }
}

// total += weight * sums
inline void add_sums(const ShortSums& sums, int32_t weight, IntegerPair& total) {
  total.even = add_products(total.even, sums.rows, _mm512_set1_epi32(weight));
  total.odd = add_products(total.odd, sums.rows, _mm512_set1_epi32(weight << 16));
}

// Levels of the rows of a tile: of even rows in the low, of odd rows in the high halves of 32 bits.
struct RowLevels {
  __m512i even, odd;
};
inline RowLevels load_levels(const int8_t* levels) {
  const __m512i rows = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels)));
  return {_mm512_maskz_mov_epi16(0x55555555, rows), _mm512_maskz_mov_epi16(0xAAAAAAAA, rows)};
}
// total += levels * sums
inline void add_sums(const ShortSums& sums, const RowLevels& levels, IntegerPair& total) {
  total.even = add_products(total.even, sums.rows, levels.even);
  total.odd = add_products(total.odd, sums.rows, levels.odd);
}

// The sums of a tile in the order of its rows, and back; of whole numbers times * total - sum.
inline void tile_values(const Pair& total, int32_t, int32_t, Vec* values) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  values[0] = (Vec)_mm512_permutex2var_ps(total.even, low, total.odd);
  values[1] = (Vec)_mm512_permutex2var_ps(total.even, high, total.odd);
}
inline __m512 whole_sum(__m512i total, int32_t times, int32_t sum) {
  const __m512i product = _mm512_mullo_epi32(total, _mm512_set1_epi32(times));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(product, _mm512_set1_epi32(sum)));
}
inline void tile_values(const IntegerPair& total, int32_t times, int32_t sum, Vec* values) {
  tile_values(Pair{whole_sum(total.even, times, sum), whole_sum(total.odd, times, sum)}, 1, 0, values);
}
inline void tile_values(const ShortSums& sums, int32_t times, int32_t sum, Vec* values) {
  const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(sums.rows));
  const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(sums.rows, 1));
  values[0] = (Vec)whole_sum(low, times, sum);
  values[1] = (Vec)whole_sum(high, times, sum);
}
// total += factor * (2 sums - all)
inline void add_scaled(const ShortSums& sums, int32_t all, const Pair& factor, Pair& total) {
  const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(sums.rows, 16), 16);
  const __m512i odd = _mm512_srai_epi32(sums.rows, 16);
  total.even = _mm512_fmadd_ps(whole_sum(even, 2, all), factor.even, total.even);
  total.odd = _mm512_fmadd_ps(whole_sum(odd, 2, all), factor.odd, total.odd);
}

inline Pair load_tile(const float* y) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 low = _mm512_loadu_ps(y), high = _mm512_loadu_ps(y + 16);
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

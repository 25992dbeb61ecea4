// Lookups in AVX2 registers, for binary_lookup.h: vpermps finds 8 sums of 3 products, two vpshufb the low and
// the high bytes of 32 sums of 4.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/binary_linear.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

constexpr int64_t kFloatTables = 48;  // entries of the fp32 tables of a word: 5 tables of 3 weights, one of 1
template <int MR>
constexpr int kFloatTiles = 1;

// Entries of the whole-number tables of some words: 4 of 16 entries each.
constexpr int64_t integer_entries(int64_t words) { return 64 * words; }

// Sums of the 32 rows of a tile: lookups of 32-bit values take the rows 2i from the low and the rows 2i + 1
// from the high halves of the words of 16 rows.
struct Pair {
  __m256 even[2], odd[2];
};
struct IntegerPair {
  __m256i even[2], odd[2];
};
// Sums of 16 bits, rows in order.
struct ShortSums {
  __m256i rows[2];
};
inline void clear(Pair& total) {
  for (int h = 0; h < 2; ++h) total.even[h] = total.odd[h] = _mm256_setzero_ps();
}
inline void clear(IntegerPair& total) {
  for (int h = 0; h < 2; ++h) total.even[h] = total.odd[h] = _mm256_setzero_si256();
}

// Tables of x[0, width), padded with zeros to whole words; width >= 1.
inline void make_tables(const float* x, int64_t width, float* tables) {
  const __m256 ones = _mm256_set1_ps(1.0f), minus = _mm256_set1_ps(-1.0f);
  const __m256 sign[3] = {_mm256_blend_ps(minus, ones, 0xAA), _mm256_blend_ps(minus, ones, 0xCC),
                          _mm256_blend_ps(minus, ones, 0xF0)};
  for (int64_t word = 0; 16 * word < width; ++word, tables += kFloatTables) {
    float padded[18] = {};
    const int64_t rest = width - 16 * word;
    for (int64_t j = 0; j < (rest < 16 ? rest : 16); ++j) padded[j] = x[16 * word + j];
    for (int i = 0; i < 6; ++i) {
      __m256 t = _mm256_mul_ps(_mm256_set1_ps(padded[3 * i]), sign[0]);
      t = _mm256_fmadd_ps(_mm256_set1_ps(padded[3 * i + 1]), sign[1], t);
      _mm256_storeu_ps(tables + 8 * i, _mm256_fmadd_ps(_mm256_set1_ps(padded[3 * i + 2]), sign[2], t));
    }
  }
}

// The same for whole numbers of at most 127: table[e] = sum_j e_j q_j, less half the sum of its q, so that
// the lookups of a row add up to at most half the sum of all |q| and one for each table. With `whole`, twice
// that: the lookups add up to sum_k +-q_k. A table is 16 low bytes and 16 high bytes.
template <bool whole = false>
inline WholeSums make_tables(const int8_t* q, int64_t width, int16_t* tables) {
  alignas(32) static constexpr uint8_t kEntry[2][32] = {
      {0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1},
      {0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1}};
  const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEntry[0]));
  const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEntry[1]));
  const __m256i bytes_apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4,
                                               6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  int32_t sum = 0, sizes = 0;
  for (int64_t k = 0; k < (width + 15) / 16 * 16; k += 4, tables += 16) {
    int8_t four[4] = {};
    int32_t all = 0;
    for (int64_t j = 0; j < 4 && k + j < width; ++j) {
      four[j] = q[k + j];
      all += four[j];
      sizes += four[j] < 0 ? -four[j] : four[j];
    }
    const int32_t half = whole ? all : all >> 1;
    sum += all - 2 * half;
    int16_t pair[2];
    std::memcpy(pair, four, sizeof pair);
    __m256i from_zero = _mm256_add_epi16(_mm256_maddubs_epi16(first, _mm256_set1_epi16(pair[0])),
                                         _mm256_maddubs_epi16(second, _mm256_set1_epi16(pair[1])));
    if constexpr (whole) from_zero = _mm256_add_epi16(from_zero, from_zero);
    const __m256i t = _mm256_sub_epi16(from_zero, _mm256_set1_epi16(static_cast<int16_t>(half)));
    const __m256i apart = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(t, bytes_apart), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables), apart);
  }
  return {sum, (sizes + sum) / 2};
}

inline __m256i load_words(const uint16_t* w) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
}

// total[r MR + i] += factor[r] * (lookups of `words` words of tile r in the tables of row i, all segments).
template <int MR, int NR>
__attribute__((noinline)) void float_span(const Segment<float, MR>* segments, int64_t segment_count, int64_t,
                                          int64_t words, const Pair* factor, Pair* total) {
  static_assert(NR == 1);
  for (int half = 0; half < 2; ++half) {
    __m256 even[MR], odd[MR];
    for (int i = 0; i < MR; ++i) even[i] = odd[i] = _mm256_setzero_ps();
    for (int64_t s = 0; s < segment_count; ++s) {
      const uint16_t* w = segments[s].w + 16 * half;
      for (int64_t k = 0; k < words; ++k, w += kTileRows) {
        const __m256i v = load_words(w);
        QUANTOPT_UNROLL for (int j = 0; j < 6; ++j) {
          const __m256i low = _mm256_srli_epi32(v, 3 * j), high = _mm256_srli_epi32(v, 16 + 3 * j);
          QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
            const __m256 table = _mm256_loadu_ps(segments[s].tables[i] + kFloatTables * k + 8 * j);
            even[i] = _mm256_add_ps(even[i], _mm256_permutevar8x32_ps(table, low));
            odd[i] = _mm256_add_ps(odd[i], _mm256_permutevar8x32_ps(table, high));
          }
        }
      }
    }
    for (int i = 0; i < MR; ++i) {
      total[i].even[half] = _mm256_fmadd_ps(even[i], factor->even[half], total[i].even[half]);
      total[i].odd[half] = _mm256_fmadd_ps(odd[i], factor->odd[half], total[i].odd[half]);
    }
  }
}

// sums[r MR + i] (+)= lookups of `words` words of tile r in the tables of row i, all segments, for NR
// tiles; such that what is added up stays within 16 bits.
template <int MR, int NR>
__attribute__((noinline)) void integer_span(const Segment<int16_t, MR>* segments, int64_t segment_count,
                                            int64_t pitch, int64_t words, bool add, ShortSums* sums) {
  const __m256i nibble = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
  for (int r = 0; r < NR; ++r, sums += MR) {
    __m256i acc[MR][2];
    for (int i = 0; i < MR; ++i) {
      for (int h = 0; h < 2; ++h) acc[i][h] = add ? sums[i].rows[h] : _mm256_setzero_si256();
    }
    for (int64_t s = 0; s < segment_count; ++s) {
      const uint16_t* w = segments[s].w + r * pitch * kTileRows;
      for (int64_t k = 0; k < words; ++k, w += kTileRows) {
        const __m256i a = load_words(w), b = load_words(w + 16);
        const __m256i bytes[2] = {_mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte)),
                                  _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8))};
        QUANTOPT_UNROLL for (int j = 0; j < 4; ++j) {
          const __m256i shifted = j % 2 == 0 ? bytes[j / 2] : _mm256_srli_epi16(bytes[j / 2], 4);
          const __m256i index = _mm256_and_si256(shifted, nibble);
          QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
            const auto* table = reinterpret_cast<const __m128i*>(segments[s].tables[i] + 64 * k + 16 * j);
            const __m256i low =
                _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table)), index);
            const __m256i high =
                _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table + 1)), index);
            acc[i][0] = _mm256_add_epi16(acc[i][0], _mm256_unpacklo_epi8(low, high));
            acc[i][1] = _mm256_add_epi16(acc[i][1], _mm256_unpackhi_epi8(low, high));
          }
        }
      }
    }
    for (int i = 0; i < MR; ++i) {
      for (int h = 0; h < 2; ++h) sums[i].rows[h] = acc[i][h];  // packing left the rows in order
    }
  }
}

// 32-bit sum += a.low * b.low + a.high * b.high of the 16-bit halves
inline __m256i add_products(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// total += weight * sums
inline void add_sums(const ShortSums& sums, int32_t weight, IntegerPair& total) {
  for (int h = 0; h < 2; ++h) {
    total.even[h] = add_products(total.even[h], sums.rows[h], _mm256_set1_epi32(weight));
    total.odd[h] = add_products(total.odd[h], sums.rows[h], _mm256_set1_epi32(weight << 16));
  }
}

// Levels of the rows of a tile: of even rows in the low, of odd rows in the high halves of 32 bits.
struct RowLevels {
  __m256i even[2], odd[2];
};
inline RowLevels load_levels(const int8_t* levels) {
  RowLevels of;
  for (int h = 0; h < 2; ++h) {
    const __m256i rows =
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + 16 * h)));
    of.even[h] = _mm256_blend_epi16(rows, _mm256_setzero_si256(), 0xAA);
    of.odd[h] = _mm256_blend_epi16(rows, _mm256_setzero_si256(), 0x55);
  }
  return of;
}
// total += levels * sums
inline void add_sums(const ShortSums& sums, const RowLevels& levels, IntegerPair& total) {
  for (int h = 0; h < 2; ++h) {
    total.even[h] = add_products(total.even[h], sums.rows[h], levels.even[h]);
    total.odd[h] = add_products(total.odd[h], sums.rows[h], levels.odd[h]);
  }
}

// The sums of a tile in the order of its rows, and back; of whole numbers times * total - sum.
inline void tile_values(const Pair& total, int32_t, int32_t, Vec* values) {
  for (int h = 0; h < 2; ++h) {
    const __m256 low = _mm256_unpacklo_ps(total.even[h], total.odd[h]);
    const __m256 high = _mm256_unpackhi_ps(total.even[h], total.odd[h]);
    values[2 * h] = (Vec)_mm256_permute2f128_ps(low, high, 0x20);
    values[2 * h + 1] = (Vec)_mm256_permute2f128_ps(low, high, 0x31);
  }
}
inline __m256 whole_sum(__m256i total, int32_t times, int32_t sum) {
  const __m256i product = _mm256_mullo_epi32(total, _mm256_set1_epi32(times));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(product, _mm256_set1_epi32(sum)));
}
inline void tile_values(const IntegerPair& total, int32_t times, int32_t sum, Vec* values) {
  Pair whole;
  for (int h = 0; h < 2; ++h) {
    whole.even[h] = whole_sum(total.even[h], times, sum);
    whole.odd[h] = whole_sum(total.odd[h], times, sum);
  }
  tile_values(whole, 1, 0, values);
}
inline void tile_values(const ShortSums& sums, int32_t times, int32_t sum, Vec* values) {
  for (int h = 0; h < 4; ++h) {
    const __m256i half = sums.rows[h / 2];
    const __m128i eight = h % 2 == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
    values[h] = (Vec)whole_sum(_mm256_cvtepi16_epi32(eight), times, sum);
  }
}
// total += factor * (2 sums - all)
inline void add_scaled(const ShortSums& sums, int32_t all, const Pair& factor, Pair& total) {
  for (int h = 0; h < 2; ++h) {
    const __m256i even = _mm256_srai_epi32(_mm256_slli_epi32(sums.rows[h], 16), 16);
    const __m256i odd = _mm256_srai_epi32(sums.rows[h], 16);
    total.even[h] = _mm256_fmadd_ps(whole_sum(even, 2, all), factor.even[h], total.even[h]);
    total.odd[h] = _mm256_fmadd_ps(whole_sum(odd, 2, all), factor.odd[h], total.odd[h]);
  }
}

inline Pair load_tile(const float* y) {
  Pair value;
  for (int h = 0; h < 2; ++h) {
    const __m256 a = _mm256_loadu_ps(y + 16 * h), b = _mm256_loadu_ps(y + 16 * h + 8);
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    value.even[h] = _mm256_shuffle_ps(low, high, 0x88);
    value.odd[h] = _mm256_shuffle_ps(low, high, 0xDD);
  }
  return value;
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

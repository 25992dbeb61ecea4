// Products with +-1 weights.
//
// With AVX-512 a sum of g = 4 (fp32) or 6 (whole) activations with all 2^g sign patterns is tabulated once
// per row of x, and one lookup inside registers (vpermps, vpermt2w) replaces g multiply-adds:
//     table[e] = sum_j (2 e_j - 1) x[g i + j]        y[n] += table[g bits of row n]
// A lookup and an addition take about as long as one fused multiply-add, so this passes the arithmetic peak
// of dense kernels (Zen 4: 3 times that of fp32 FMA, 2 times that of dpbusd). The tables hold signed sums, so
// that infinities and NaN propagate as in a dot product. Elsewhere, and for groups of scales that are no
// multiple of 16, rows of W are expanded to floats in a panel. Each output is summed in an order that depends
// on K alone: any split over threads or rows gives the same bits.
#include "cpu/kernels/binary_linear.h"

#include <cmath>
#include <cstring>

#if defined(__AVX512BW__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms of gcc 12 from its own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace quantopt::QUANTOPT_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t row_bytes(int64_t inputs) { return (inputs + 7) / 8; }
inline const float* scale_of(const BinaryLinear& p, int64_t n) { return p.scale + n * p.scale_stride; }

// ---- panels
// ----------------------------------------------------------------------------------------------------

typedef float Vector __attribute__((vector_size(32)));

constexpr int64_t kPanelWidth = 256;  // a multiple of 8
constexpr int64_t kPanelRows = 8;
constexpr int64_t kLanes = 8;

struct SignTable {
  alignas(32) float value[256][8];
};
constexpr SignTable make_signs() {
  SignTable table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int j = 0; j < 8; ++j) table.value[byte][j] = (byte >> j) & 1 ? 1.0f : -1.0f;
  }
  return table;
}
constexpr SignTable kSigns = make_signs();

inline void load(const float* p, Vector& v) { std::memcpy(&v, p, sizeof v); }
inline float sum(const Vector& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Weights [first, first + width) of one row, without its scale unless grouped; zero up to the next multiple
// of 8.
void expand(const BinaryLinear& p, int64_t n, int64_t first, int64_t width, float* out) {
  const int64_t bytes = (width + 7) / 8;
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    const uint8_t* bits = p.bits + (plane * p.outputs + n) * row_bytes(p.inputs) + first / 8;
    const float weight = static_cast<float>(p.plane_weights[plane]);
    for (int64_t i = 0; i < bytes; ++i) {
      const float* signs = kSigns.value[bits[i]];
      for (int j = 0; j < 8; ++j) {
        const float w = signs[j] * weight;
        out[8 * i + j] = plane == 0 ? w : out[8 * i + j] + w;
      }
    }
  }
  for (int64_t k = width; k < 8 * bytes; ++k) out[k] = 0.0f;
  if (p.group == 0) return;
  const float* scale = scale_of(p, n);
  for (int64_t k = 0; k < width; ++k) out[k] *= scale[(first + k) / p.group];
}

// total[m][r] += x[m] . panel[r] over one panel. Whole numbers stay exact: a panel's sum is below 2^24.
template <int Rows>
void multiply_panel(const float* const* x, const float* panel, int64_t width, int64_t outputs,
                    double (*total)[kPanelRows]) {
  for (int64_t r = 0; r < outputs; ++r) {
    Vector acc[Rows] = {};
    for (int64_t k = 0; k < width; k += kLanes) {
      Vector w, v;
      load(panel + r * kPanelWidth + k, w);
      for (int m = 0; m < Rows; ++m) {
        load(x[m] + k, v);
        acc[m] += v * w;
      }
    }
    for (int m = 0; m < Rows; ++m) total[m][r] += static_cast<double>(sum(acc[m]));
  }
}

void linear_by_panels(const BinaryLinear& p, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  constexpr int64_t kMost = 64;  // rows of x that share an expanded panel
  alignas(32) float panel[kPanelRows * kPanelWidth];
  alignas(32) float tail[kRows][kPanelWidth];  // x of the last panel, padded with zeros to a multiple of 8
  double total[kMost][kPanelRows];
  for (int64_t first = row_begin; first < row_end; first += kMost) {
    const int64_t rows = least(kMost, row_end - first);
    for (int64_t n = begin; n < end; n += kPanelRows) {
      const int64_t outputs = least(kPanelRows, end - n);
      std::memset(total, 0, sizeof total);
      for (int64_t k = 0; k < p.inputs; k += kPanelWidth) {
        const int64_t width = least(kPanelWidth, p.inputs - k);
        for (int64_t r = 0; r < outputs; ++r) expand(p, n + r, k, width, panel + r * kPanelWidth);
        const int64_t padded = (width + 7) / 8 * 8;
        for (int64_t m = 0; m < rows; m += kRows) {
          const int count = static_cast<int>(least(kRows, rows - m));
          const float* x[kRows];
          for (int i = 0; i < count; ++i) {
            x[i] = p.x + (first + m + i) * p.inputs + k;
            if (padded == width) continue;
            std::memcpy(tail[i], x[i], sizeof(float) * static_cast<size_t>(width));
            for (int64_t j = width; j < padded; ++j) tail[i][j] = 0.0f;
            x[i] = tail[i];
          }
          switch (count) {
            case 1: multiply_panel<1>(x, panel, padded, outputs, total + m); break;
            case 2: multiply_panel<2>(x, panel, padded, outputs, total + m); break;
            case 3: multiply_panel<3>(x, panel, padded, outputs, total + m); break;
            default: multiply_panel<4>(x, panel, padded, outputs, total + m);
          }
        }
      }
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t r = 0; r < outputs; ++r) {
          float y = static_cast<float>(total[m][r]);
          float factor = p.group == 0 ? *scale_of(p, n + r) : 1.0f;
          if (p.x_scale != nullptr) factor *= p.x_scale[first + m];
          y *= factor;
          if (p.bias != nullptr) y += p.bias[n + r];
          p.y[(first + m) * p.outputs + n + r] = y;
        }
      }
    }
  }
}

#if defined(__AVX512BW__)

// ---- lookups
// ---------------------------------------------------------------------------------------------------
//
// A word vector of a tile holds 16 weights of each of 32 rows. Lookups of 32-bit values take the rows 2i from
// the low and the rows 2i + 1 from the high halves; sums are therefore kept as "even" and "odd" vectors of 16
// rows. The weights are read chunk by chunk (240 of each row): the tables of four rows of x and one chunk fit
// the first-level cache, and the sums of kBlockTiles tiles the second.

constexpr int kRowsTogether = 4;
constexpr int64_t kBlockTiles = 128;
constexpr int64_t kUnitWords = 3;                         // hold 8 groups of 6 weights
constexpr int64_t kMostUnits = kChunkWords / kUnitWords;  // of a chunk
constexpr int kIntegerGroup = 6;                          // activations per table of 64 int16
constexpr int64_t kMostIntegerTables = kMostUnits * 8;    // 40 lookups of at most 6 * 127 stay below 2^15
constexpr int kFloatGroup = 4;                            // activations per table of 16 fp32
constexpr int64_t kMostFloatTables = kChunkWords * 16 / kFloatGroup;

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

// Whether the sums may be kept as whole numbers of 16 and 32 bits.
inline bool whole_numbers(const BinaryLinear& p) { return p.x_scale != nullptr && p.group == 0; }

// x of one chunk, `width` of them, padded with zeros; table i of row r of `rows` interleaved ones is at
// tables + 16 (rows i + r).
void make_float_tables(const float* x, int64_t width, int64_t rows, float* tables) {
  __m512 sign[kFloatGroup];
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int j = 0; j < kFloatGroup; ++j) {
    const __mmask16 plus = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(1 << j));
    sign[j] = _mm512_mask_blend_ps(plus, _mm512_set1_ps(-1.0f), _mm512_set1_ps(1.0f));
  }
  const int64_t count = (width + 15) / 16 * (16 / kFloatGroup);
  for (int64_t i = 0; i < count; ++i) {
    float padded[kFloatGroup] = {};
    const float* v = x + kFloatGroup * i;
    const int64_t rest = width - kFloatGroup * i;
    if (rest < kFloatGroup) {
      for (int64_t j = 0; j < rest; ++j) padded[j] = v[j];
      v = padded;
    }
    __m512 t = _mm512_mul_ps(_mm512_set1_ps(v[0]), sign[0]);
    for (int j = 1; j < kFloatGroup; ++j) t = _mm512_fmadd_ps(_mm512_set1_ps(v[j]), sign[j], t);
    _mm512_store_ps(tables + 16 * rows * i, t);
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

// The same for whole numbers: table[e] = sum_j e_j x_j, so that y = 2 * lookups - sum_k x_k (returned: that
// sum), with 64 entries at tables + 64 (rows i + r). The groups of a unit are the bits 0-5 and 6-11 of each
// of its three words a (groups 2 a, 2 a + 1); group 6 is bits 12-15 of word 0 and 12-13 of word 1, group 7
// bits 12-15 of word 2 and 14-15 of word 1.
int32_t make_integer_tables(const float* x, int64_t width, int64_t rows, int16_t* tables) {
  __m512i entry[4], lanes[8];
  for (int j = 0; j < 4; ++j) entry[j] = _mm512_load_si512(kPatterns.entry[j]);
  for (int j = 0; j < 8; ++j) {
    lanes[j] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kPatterns.lanes[j])));
  }
  __m512i total = _mm512_setzero_si512();
  const auto put = [&](__m512i x01, __m512i x23, __m512i x45, int64_t i) {
    const __m512i sum =
        _mm512_add_epi16(_mm512_maddubs_epi16(entry[0], x01), _mm512_maddubs_epi16(entry[1], x23));
    int16_t* out = tables + 64 * rows * i;
    _mm512_store_si512(out, _mm512_add_epi16(sum, _mm512_maddubs_epi16(entry[2], x45)));
    _mm512_store_si512(out + 32, _mm512_add_epi16(sum, _mm512_maddubs_epi16(entry[3], x45)));
  };
  for (int64_t unit = 0; 16 * kUnitWords * unit < width; ++unit) {
    __m512i pair[kUnitWords][8];  // the two bytes of each pair of a word in all lanes
    QUANTOPT_UNROLL for (int a = 0; a < kUnitWords; ++a) {
      const int64_t at = 16 * (kUnitWords * unit + a), rest = width - at;
      const __mmask16 mask = static_cast<__mmask16>(rest >= 16 ? 0xFFFF : (rest <= 0 ? 0 : (1 << rest) - 1));
      const __m512i q = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(mask, x + (rest <= 0 ? 0 : at)));
      total = _mm512_add_epi32(total, q);
      const __m512i bytes = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(q));
      QUANTOPT_UNROLL for (int j = 0; j < 8; ++j) pair[a][j] = _mm512_shuffle_epi8(bytes, lanes[j]);
      put(pair[a][0], pair[a][1], pair[a][2], 8 * unit + 2 * a);
      put(pair[a][3], pair[a][4], pair[a][5], 8 * unit + 2 * a + 1);
    }
    put(pair[0][6], pair[0][7], pair[1][6], 8 * unit + 6);
    put(pair[2][6], pair[2][7], pair[1][7], 8 * unit + 7);
  }
  return _mm512_reduce_add_epi32(total);
}

// total[r MR + i] += factor[r] * (lookups of words [0, words) of tile r in the tables of row i).
// `stride` is the distance of two tiles. The totals are in memory: all registers go to the sums of one call.
template <int MR, int NR>
__attribute__((noinline)) void float_span(const uint16_t* w, int64_t stride, int64_t words,
                                          const float* tables, const Pair* factor, Pair* total) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 even[MR][NR], odd[MR][NR];
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) even[i][r] = odd[i][r] = _mm512_setzero_ps();
  }
  for (; words > 0; --words, w += kTileRows, tables += 4 * 16 * MR) {
    __m512i v[NR];
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) v[r] = _mm512_loadu_si512(w + r * stride);
    QUANTOPT_UNROLL for (unsigned j = 0; j < 4; ++j) {
      __m512i low[NR], high[NR];
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
        low[r] = _mm512_srli_epi32(v[r], 4 * j);
        high[r] = _mm512_srli_epi32(v[r], 16 + 4 * j);
      }
      QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
        const __m512 table = _mm512_load_ps(tables + (j * MR + static_cast<unsigned>(i)) * 16);
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

// acc[i][r] += table of row i at index[r]
template <int MR, int NR>
inline __attribute__((always_inline)) void integer_lookup(const __m512i* index, const int16_t* tables,
                                                          __m512i (*acc)[NR]) {
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    const __m512i low = _mm512_load_si512(tables + 64 * i), high = _mm512_load_si512(tables + 64 * i + 32);
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

// total[r MR + i] += weight * (lookups of units [0, units) of tile r in the tables of row i), units of one
// chunk
template <int MR, int NR>
__attribute__((noinline)) void integer_span(const uint16_t* w, int64_t stride, int64_t units,
                                            const int16_t* tables, int32_t weight, IntegerPair* total) {
  const __m512i bits45 = _mm512_set1_epi16(0x30);
  __m512i acc[MR][NR];
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) acc[i][r] = _mm512_setzero_si512();
  }
  for (; units > 0; --units, w += kUnitWords * kTileRows, tables += 8 * 64 * MR) {
    __m512i sixth[NR], seventh[NR];
    QUANTOPT_UNROLL for (int a = 0; a < kUnitWords; ++a) {
      __m512i v[NR], index[NR];
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
        v[r] = _mm512_loadu_si512(w + r * stride + a * kTileRows);
        QUANTOPT_KEEP(v[r]);  // one load, not one for each use
      }
      integer_lookup<MR, NR>(v, tables + 2 * a * 64 * MR, acc);
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) index[r] = _mm512_srli_epi16(v[r], 6);
      integer_lookup<MR, NR>(index, tables + (2 * a + 1) * 64 * MR, acc);
      QUANTOPT_UNROLL for (int r = 0; r < NR; ++r) {
        // Ternary logic 0xF8: a | (b & c).
        if (a == 0) sixth[r] = _mm512_srli_epi16(v[r], 12);
        if (a == 1) {
          sixth[r] = _mm512_ternarylogic_epi32(sixth[r], _mm512_srli_epi16(v[r], 8), bits45, 0xF8);
          seventh[r] = _mm512_srli_epi16(v[r], 10);
        }
        if (a == 2)
          seventh[r] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v[r], 12), seventh[r], bits45, 0xF8);
      }
    }
    integer_lookup<MR, NR>(sixth, tables + 6 * 64 * MR, acc);
    integer_lookup<MR, NR>(seventh, tables + 7 * 64 * MR, acc);
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

// Scale, bias and store of one tile for one row of x.
inline void finish_tile(const BinaryLinear& p, int64_t m, int64_t tile, Pair value) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  const __m512 half[2] = {_mm512_permutex2var_ps(value.even, low, value.odd),
                          _mm512_permutex2var_ps(value.even, high, value.odd)};
  const __m512 x_scale = _mm512_set1_ps(p.x_scale != nullptr ? p.x_scale[m] : 1.0f);
  for (int i = 0; i < 2; ++i) {
    const int64_t n = tile * kTileRows + 16 * i;
    if (n >= p.outputs) return;
    const __mmask16 mask = static_cast<__mmask16>(p.outputs - n >= 16 ? 0xFFFF : (1 << (p.outputs - n)) - 1);
    __m512 factor = x_scale;
    if (p.group == 0) {
      const __m512 scale =
          p.scale_stride == 0 ? _mm512_set1_ps(*p.scale) : _mm512_maskz_loadu_ps(mask, p.scale + n);
      factor = _mm512_mul_ps(scale, factor);
    }
    __m512 y = _mm512_mul_ps(half[i], factor);
    if (p.bias != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.bias + n));
    _mm512_mask_storeu_ps(p.y + m * p.outputs + n, mask, y);
  }
}

// Scales of group g, times the plane's weight, for the 32 rows of a tile.
inline Pair group_scales(const BinaryLinear& p, int64_t tile, int64_t g, float weight) {
  alignas(64) float even[16], odd[16];
  for (int i = 0; i < 16; ++i) {
    const int64_t n = tile * kTileRows + 2 * i;
    even[i] = n < p.outputs ? scale_of(p, n)[g] * weight : 0.0f;
    odd[i] = n + 1 < p.outputs ? scale_of(p, n + 1)[g] * weight : 0.0f;
  }
  return {_mm512_load_ps(even), _mm512_load_ps(odd)};
}

// One chunk of one plane: the tiles at w and their sums, NR tiles at a time.
template <int MR, int NR>
void integer_tiles(const BinaryLinear& p, const uint16_t* w, int64_t words, int64_t count,
                   const int16_t* tables, int64_t plane, IntegerPair* total) {
  const int64_t stride = words * kTileRows;
  for (; count >= NR; count -= NR, w += NR * stride, total += NR * MR) {
    integer_span<MR, NR>(w, stride, words / kUnitWords, tables, p.plane_weights[plane], total);
  }
  if constexpr (NR > 1) integer_tiles<MR, NR / 2>(p, w, words, count, tables, plane, total);
}

template <int MR, int NR>
void float_tiles(const BinaryLinear& p, const uint16_t* w, int64_t words, int64_t count, const float* tables,
                 int64_t plane, Pair* total, int64_t tile, int64_t first) {
  const int64_t stride = words * kTileRows;
  const float weight = static_cast<float>(p.plane_weights[plane]);
  Pair factor[NR];
  for (Pair& f : factor) f = {_mm512_set1_ps(weight), _mm512_set1_ps(weight)};
  for (; count >= NR; count -= NR, w += NR * stride, total += NR * MR, tile += NR) {
    if (p.group == 0) {
      float_span<MR, NR>(w, stride, words, tables, factor, total);
      continue;
    }
    const int64_t last = least(words, (p.inputs - first + 15) / 16);  // words that hold weights
    for (int64_t k = 0; k < last;) {  // the part of each group of scales that lies in this chunk
      const int64_t g = (first + 16 * k) / p.group, end = least(last, ((g + 1) * p.group - first) / 16);
      for (int r = 0; r < NR; ++r) factor[r] = group_scales(p, tile + r, g, weight);
      float_span<MR, NR>(w + k * kTileRows, stride, end - k, tables + k * 4 * 16 * MR, factor, total);
      k = end;
    }
  }
  if constexpr (NR > 1) float_tiles<MR, NR / 2>(p, w, words, count, tables, plane, total, tile, first);
}

// MR rows of x from m times the tiles [begin, end), at most kBlockTiles.
template <int MR>
void integer_block(const BinaryLinear& p, int64_t m, int64_t begin, int64_t end) {
  alignas(64) int16_t tables[kMostIntegerTables * MR * 64];
  IntegerPair total[kBlockTiles * MR];
  for (int64_t i = 0; i < (end - begin) * MR; ++i)
    total[i] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  int32_t sum[MR] = {};
  for (int64_t first = 0; first < p.inputs; first += kChunkWidth) {
    const int64_t width = least(kChunkWidth, p.inputs - first), words = chunk_words(p.inputs, first);
    for (int64_t i = 0; i < MR; ++i) {
      sum[i] += make_integer_tables(p.x + (m + i) * p.inputs + first, width, MR, tables + 64 * i);
    }
    for (int64_t plane = 0; plane < p.planes; ++plane) {
      const uint16_t* w = p.tiles + tile_offset(p.outputs, p.inputs, plane, first, begin);
      integer_tiles<MR, 4>(p, w, words, end - begin, tables, plane, total);
    }
  }
  int32_t weight = 0;
  for (int64_t plane = 0; plane < p.planes; ++plane) weight += p.plane_weights[plane];
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int i = 0; i < MR; ++i) {
      const IntegerPair& t = total[(tile - begin) * MR + i];
      const __m512i all = _mm512_set1_epi32(weight * sum[i]);
      finish_tile(p, m + i, tile,
                  {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_slli_epi32(t.even, 1), all)),
                   _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_slli_epi32(t.odd, 1), all))});
    }
  }
}

template <int MR>
void float_block(const BinaryLinear& p, int64_t m, int64_t begin, int64_t end) {
  alignas(64) float tables[kMostFloatTables * MR * 16];
  Pair total[kBlockTiles * MR];
  for (int64_t i = 0; i < (end - begin) * MR; ++i) total[i] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  std::memset(tables, 0, sizeof tables);  // those of words without weights
  for (int64_t first = 0; first < p.inputs; first += kChunkWidth) {
    const int64_t width = least(kChunkWidth, p.inputs - first), words = chunk_words(p.inputs, first);
    if (width < kChunkWidth) std::memset(tables, 0, sizeof tables);
    for (int64_t i = 0; i < MR; ++i)
      make_float_tables(p.x + (m + i) * p.inputs + first, width, MR, tables + 16 * i);
    for (int64_t plane = 0; plane < p.planes; ++plane) {
      const uint16_t* w = p.tiles + tile_offset(p.outputs, p.inputs, plane, first, begin);
      float_tiles<MR, MR <= 2 ? 4 : 2>(p, w, words, end - begin, tables, plane, total, begin, first);
    }
  }
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int i = 0; i < MR; ++i) finish_tile(p, m + i, tile, total[(tile - begin) * MR + i]);
  }
}

template <int MR>
inline void block(const BinaryLinear& p, int64_t m, int64_t begin, int64_t end) {
  if (whole_numbers(p)) {
    integer_block<MR>(p, m, begin, end);
  } else {
    float_block<MR>(p, m, begin, end);
  }
}

void linear_by_lookups(const BinaryLinear& p, int64_t row_begin, int64_t row_end, int64_t begin,
                       int64_t end) {
  for (int64_t tile = begin / kTileRows; tile < tile_count(end); tile += kBlockTiles) {
    const int64_t last = least(tile + kBlockTiles, tile_count(end));
    for (int64_t m = row_begin; m < row_end; m += kRowsTogether) {
      switch (least(kRowsTogether, row_end - m)) {
        case 1: block<1>(p, m, tile, last); break;
        case 2: block<2>(p, m, tile, last); break;
        case 3: block<3>(p, m, tile, last); break;
        default: block<4>(p, m, tile, last);
      }
    }
  }
}

#endif

}  // namespace

bool binary_uses_tiles([[maybe_unused]] const BinaryLinear& p) {
#if defined(__AVX512BW__)
  return p.group % 16 == 0;
#else
  return false;
#endif
}

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

void binary_tiles(const uint8_t*, int64_t, int64_t, uint16_t*, int64_t, int64_t) {}

#endif

void binary_linear(const BinaryLinear& p, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
#if defined(__AVX512BW__)
  if (binary_uses_tiles(p)) return linear_by_lookups(p, row_begin, row_end, begin, end);
#endif
  linear_by_panels(p, row_begin, row_end, begin, end);
}

float quantize_row(const float* x, int64_t inputs, float* q) {
  // As integers, magnitudes order like floats, and infinities and NaN come last.
  uint32_t most = 0;
  for (int64_t k = 0; k < inputs; ++k) {
    uint32_t size;
    std::memcpy(&size, x + k, sizeof size);
    size &= 0x7FFFFFFFu;
    most = size > most ? size : most;
  }
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  const float scale = most < 0x7F800000u ? largest / 127.0f : 0.0f;
  if (scale == 0.0f) {
    for (int64_t k = 0; k < inputs; ++k) q[k] = 0.0f;
    return most < 0x7F800000u ? 0.0f : NAN;
  }
  for (int64_t k = 0; k < inputs; ++k) {
    const float v = __builtin_rintf(x[k] / scale);
    q[k] = v > 127.0f ? 127.0f : (v < -127.0f ? -127.0f : v);
  }
  return scale;
}

}  // namespace quantopt::QUANTOPT_ISA

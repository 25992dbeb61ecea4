// Products of bytes: weights are expanded to +-1 or +-level, and vpdpbusd multiplies them with q + 128, which
// is unsigned; 128 times the sum of the weights is taken off at the end. A panel of 32 rows of W and 256
// weights of each is expanded once for up to kByteRows rows of x. With AVX-512 and VNNI, or AVX-VNNI.
//
// Within 32 weights (a unit: two words of each row) the order of k is that in which they are expanded: step t
// of 8 takes bit t of the four bytes of a row's two words, so weight 8 j + t is byte j of step t. The numbers
// of x are put in that order too.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/binary_epilogue.h"
#include "cpu/kernels/binary_linear.h"
#include "cpu/kernels/binary_lookup.h"
#include "cpu/kernels/thresholds.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

// Memory of a call. (Functions of the library's templates, compiled for this instruction set, might be linked
// in the place of others.)
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) : data_(new T[static_cast<size_t>(count)]) {}
  ~Memory() { delete[] data_; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

constexpr int64_t kByteRows = 128;                // of x that share a panel
constexpr int64_t kUnit = 32;                     // weights
constexpr int64_t kStepBytes = 4 * kTileRows;     // a step of a panel: [row][4 weights]
constexpr int64_t kPanelSteps = kChunkWidth / 4;  // of a chunk

#if defined(__AVX512VNNI__)

typedef __m512i Bytes;  // steps of 16 rows
constexpr int kByteLanes = 16;
constexpr int kSums = 24;  // registers of 32, for sums
inline Bytes all_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
inline Bytes four_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}
inline Bytes dot(Bytes sum, Bytes x, Bytes w) { return _mm512_dpbusd_epi32(sum, x, w); }

// The words a and b of 32 rows, side by side.
inline void pair_words(const uint16_t* a, const uint16_t* b, Bytes* pair) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low =
      _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
  const __m512i v = load_bytes(a), w = b != nullptr ? load_bytes(b) : _mm512_setzero_si512();
  pair[0] = _mm512_permutex2var_epi16(v, low, w);
  pair[1] = _mm512_permutex2var_epi16(v, _mm512_add_epi16(low, _mm512_set1_epi16(16)), w);
}
// The levels of 16 rows in each of their four bytes: of group a in the first two, b in the others.
inline Bytes spread_levels(const int8_t* a, const int8_t* b) {
  const auto four = [](const int8_t* p) {
    const __m512i each = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_mullo_epi32(each, _mm512_set1_epi32(0x01010101));
  };
  return a == b ? four(a) : _mm512_mask_blend_epi16(0xAAAAAAAA, four(a), four(b));
}
// +u where step t of a pair of words has a bit, else -u.
inline Bytes signed_bytes(Bytes pair, int t, Bytes u, Bytes minus_u) {
  return _mm512_mask_blend_epi8(_mm512_test_epi8_mask(pair, all_bytes(1 << t)), minus_u, u);
}
// +u where both have a bit, -u where none has, else 0.
inline Bytes ternary_bytes(Bytes pair, Bytes other, int t, Bytes u, Bytes minus_u) {
  const __mmask64 same = _mm512_testn_epi8_mask(_mm512_xor_si512(pair, other), all_bytes(1 << t));
  return _mm512_maskz_mov_epi8(same, signed_bytes(pair, t, u, minus_u));
}
inline Bytes minus(Bytes u) { return _mm512_sub_epi8(_mm512_setzero_si512(), u); }
inline Bytes sum_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }

// q + 128 of `count` weights of one row, at most 64, in the order of units.
inline void order_bytes(const int8_t* q, int64_t count, uint8_t* x) {
  alignas(64) static constexpr auto kOrder = [] {
    struct {
      uint8_t from[64];
    } order{};
    for (int i = 0; i < 64; ++i) order.from[i] = static_cast<uint8_t>(i / 32 * 32 + i % 4 * 8 + i % 32 / 4);
    return order;
  }();
  const __mmask64 mask = count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
  const __m512i v = _mm512_maskz_loadu_epi8(mask, q);
  store_bytes(x, _mm512_xor_si512(_mm512_permutexvar_epi8(load_bytes(kOrder.from), v), all_bytes(0x80)));
}

#else

typedef __m256i Bytes;  // steps of 8 rows
constexpr int kByteLanes = 8;
constexpr int kSums = 12;  // registers of 16, for sums
inline Bytes all_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Bytes four_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}
inline Bytes dot(Bytes sum, Bytes x, Bytes w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }

inline void pair_words(const uint16_t* a, const uint16_t* b, Bytes* pair) {
  for (int h = 0; h < 2; ++h) {
    const __m256i v = load_bytes(a + 16 * h),
                  w = b != nullptr ? load_bytes(b + 16 * h) : _mm256_setzero_si256();
    const __m256i low = _mm256_unpacklo_epi16(v, w), high = _mm256_unpackhi_epi16(v, w);
    pair[2 * h] = _mm256_permute2x128_si256(low, high, 0x20);
    pair[2 * h + 1] = _mm256_permute2x128_si256(low, high, 0x31);
  }
}
inline Bytes spread_levels(const int8_t* a, const int8_t* b) {
  const auto four = [](const int8_t* p) {
    const __m256i each = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_mullo_epi32(each, _mm256_set1_epi32(0x01010101));
  };
  return a == b ? four(a) : _mm256_blend_epi16(four(a), four(b), 0xAA);
}
// Bits of each byte by a matrix: 0xFF less those where step t has a bit, of those that `rows` names.
inline Bytes select_bits(Bytes pair, int t, uint64_t rows) {
  return _mm256_gf2p8affine_epi64_epi8(pair, _mm256_set1_epi64x(static_cast<int64_t>(rows << t)), 0xFF);
}
inline Bytes signed_bytes(Bytes pair, int t, Bytes u, Bytes) {
  return _mm256_sign_epi8(u, select_bits(pair, t, 0x0001010101010101));  // 1 or -1
}
inline Bytes ternary_bytes(Bytes pair, Bytes other, int t, Bytes u, Bytes) {
  constexpr uint64_t kAll = 0x0101010101010101;  // 0 or -1
  const __m256i both = _mm256_add_epi8(select_bits(pair, t, kAll), select_bits(other, t, kAll));
  return _mm256_sign_epi8(u, _mm256_add_epi8(both, all_bytes(1)));
}
inline Bytes minus(Bytes u) { return _mm256_sub_epi8(_mm256_setzero_si256(), u); }
inline Bytes sum_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }

inline void order_bytes(const int8_t* q, int64_t count, uint8_t* x) {
  alignas(32) int8_t part[64] = {};
  if (count < 64) {
    std::memcpy(part, q, static_cast<size_t>(count));
    q = part;
  }
  const __m256i fours = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i bytes =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t k = 0; k < 64; k += kUnit) {
    const __m256i v = _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(load_bytes(q + k), fours), bytes);
    store_bytes(x + k, _mm256_xor_si256(v, all_bytes(0x80)));
  }
}

#endif

constexpr int kTileVectors = kTileRows / kByteLanes;

// How weights become bytes: +-1 or +-level, times what comes after the sum; or the weights of planes.
enum class Expansion { binary, ternary, planes };
struct ByteWeights {
  Expansion expansion = Expansion::planes;
  int32_t times = 1;
  bool fit;  // whether they are bytes

  explicit ByteWeights(const LinearProblem& p) {
    const int32_t most = largest_level(p.plane_weights, p.planes);
    if (p.planes == 1 || (p.planes == 2 && p.plane_weights[0] == p.plane_weights[1])) {
      expansion = p.planes == 1 ? Expansion::binary : Expansion::ternary;
      times = most;
    }
    fit = expansion != Expansion::planes || most <= 127;
  }
};

inline const int8_t* levels_of(const LinearProblem& p, int64_t tile, int64_t group) {
  return p.levels + group_index(tile * kTileRows, group, group_count(p));
}

// Weights of a chunk of the 32 rows of a tile, and the sums of 128 times the weights of each row.
template <Expansion expansion>
void expand_chunk(const LinearProblem& p, int64_t tile, int64_t first, int8_t* panel, int32_t* sums) {
  const int64_t words = chunk_words(p.inputs, first);
  const uint16_t* w[2];
  for (int64_t plane = 0; plane < (expansion == Expansion::ternary ? 2 : 1); ++plane) {
    w[plane] = p.tiles + tile_offset(p.outputs, p.inputs, plane, first, tile);
  }
  const Bytes x = all_bytes(128);
  Bytes u[kTileVectors], minus_u[kTileVectors], sum[kTileVectors];
  QUANTOPT_UNROLL for (int v = 0; v < kTileVectors; ++v) {
    u[v] = all_bytes(1);
    minus_u[v] = all_bytes(-1);
    sum[v] = load_bytes(sums + kByteLanes * v);
  }
  int64_t last_a = -1, last_b = -1;
  for (int64_t word = 0; word < words; word += 2, panel += 8 * kStepBytes) {
    if (p.levels != nullptr) {
      const int64_t a = (first + 16 * word) / p.group;
      const int64_t b = word + 1 < words ? (first + 16 * word + 16) / p.group : a;
      if (a != last_a || b != last_b) {
        const int8_t *const of_a = levels_of(p, tile, a), *const of_b = levels_of(p, tile, b);
        QUANTOPT_UNROLL for (int v = 0; v < kTileVectors; ++v) {
          u[v] = spread_levels(of_a + kByteLanes * v, of_b + kByteLanes * v);
          minus_u[v] = minus(u[v]);
        }
        last_a = a;
        last_b = b;
      }
    }
    const auto load = [&](const uint16_t* words_of, Bytes* pair) {
      const uint16_t* const at = words_of + word * kTileRows;
      pair_words(at, word + 1 < words ? at + kTileRows : nullptr, pair);
    };
    Bytes pair[kTileVectors], other[kTileVectors];
    if constexpr (expansion != Expansion::planes) load(w[0], pair);
    if constexpr (expansion == Expansion::ternary) load(w[1], other);
    QUANTOPT_UNROLL for (int v = 0; v < kTileVectors; ++v) {
      if constexpr (expansion == Expansion::planes) {
        for (int t = 0; t < 8; ++t) store_bytes(panel + kStepBytes * t + 4 * kByteLanes * v, all_bytes(0));
        continue;
      }
      QUANTOPT_UNROLL for (int t = 0; t < 8; ++t) {
        Bytes value;
        if constexpr (expansion == Expansion::ternary) {
          value = ternary_bytes(pair[v], other[v], t, u[v], minus_u[v]);
        } else {
          value = signed_bytes(pair[v], t, u[v], minus_u[v]);
        }
        store_bytes(panel + kStepBytes * t + 4 * kByteLanes * v, value);
        sum[v] = dot(sum[v], x, value);
      }
    }
    if constexpr (expansion == Expansion::planes) {
      for (int64_t plane = 0; plane < p.planes; ++plane) {
        load(p.tiles + tile_offset(p.outputs, p.inputs, plane, first, tile), pair);
        const Bytes plus = all_bytes(p.plane_weights[plane]), less = minus(plus);
        for (int v = 0; v < kTileVectors; ++v) {
          for (int t = 0; t < 8; ++t) {
            int8_t* const at = panel + kStepBytes * t + 4 * kByteLanes * v;
            const Bytes value = signed_bytes(pair[v], t, plus, less);
            store_bytes(at, sum_bytes(load_bytes(at), value));
            sum[v] = dot(sum[v], x, value);
          }
        }
      }
    }
  }
  for (int v = 0; v < kTileVectors; ++v) store_bytes(sums + kByteLanes * v, sum[v]);
}

// Brings the words of a tile in a chunk closer: those of its next chunk are far away.
inline void prefetch_words(const LinearProblem& p, int64_t first, int64_t tile) {
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    const uint16_t* w = p.tiles + tile_offset(p.outputs, p.inputs, plane, first, tile);
    const uint16_t* const end = w + chunk_words(p.inputs, first) * kTileRows;
    for (; w < end; w += kTileRows) __builtin_prefetch(w);
  }
}

// sums[i] += `steps` of a panel times row i of x, for NV vectors of outputs.
template <int MR, int NV>
__attribute__((noinline)) void multiply_bytes(const uint8_t* x, const int8_t* panel, int64_t steps,
                                              int32_t (*sums)[kTileRows]) {
  Bytes acc[MR][NV];
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = load_bytes(sums[i] + kByteLanes * v);
  }
  for (int64_t step = 0; step < steps; ++step, panel += kStepBytes, x += 4) {
    // What there are fewer of stays in registers: the vectors of weights or the rows of x.
    if constexpr (NV <= MR) {
      Bytes w[NV];
      QUANTOPT_UNROLL for (int v = 0; v < NV; ++v) w[v] = load_bytes(panel + 4 * kByteLanes * v);
      QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
        const Bytes four = four_bytes(x + i * kChunkWidth);
        QUANTOPT_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = dot(acc[i][v], four, w[v]);
      }
    } else {
      Bytes four[MR];
      QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) four[i] = four_bytes(x + i * kChunkWidth);
      QUANTOPT_UNROLL for (int v = 0; v < NV; ++v) {
        const Bytes w = load_bytes(panel + 4 * kByteLanes * v);
        QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) acc[i][v] = dot(acc[i][v], four[i], w);
      }
    }
  }
  QUANTOPT_UNROLL for (int i = 0; i < MR; ++i) {
    QUANTOPT_UNROLL for (int v = 0; v < NV; ++v) store_bytes(sums[i] + kByteLanes * v, acc[i][v]);
  }
}

template <int MR, int NV>
inline void multiply_block(int64_t rows, const uint8_t* x, const int8_t* panel, int64_t steps,
                           int32_t (*sums)[kTileRows]) {
  if constexpr (MR > 1) {
    if (rows < MR) return multiply_block<MR - 1, NV>(rows, x, panel, steps, sums);
  }
  multiply_bytes<MR, NV>(x, panel, steps, sums);
}

// The same for all rows, in even blocks; begin(m) before and end(m) after those of each row.
template <int NV, class Begin, class End>
inline void multiply_rows(const uint8_t* x, int64_t rows, const int8_t* panel, int64_t steps,
                          int32_t (*sums)[kTileRows], const Begin& begin, const End& end) {
  constexpr int kMost = NV == 1 ? kSums / 2 : kSums / NV;
  for (int64_t m = 0; m < rows;) {
    const int64_t blocks = (rows - m + kMost - 1) / kMost, count = (rows - m + blocks - 1) / blocks;
    for (int64_t i = 0; i < count; ++i) begin(m + i);
    multiply_block<kMost, NV>(count, x + m * kChunkWidth, panel, steps, sums + m);
    for (int64_t i = 0; i < count; ++i) end(m + i);
    m += count;
  }
}

// Outputs [n, n + count) of a row of y from sums of products and of weights.
inline void finish_bytes(const int32_t* sums, const int32_t* weights, int32_t times, int64_t n, int64_t count,
                         const Epilogue& epilogue, float* y) {
  for (int64_t i = 0; i < count; i += kWidth) {
    VecBits sum, offset;  // their difference is right where sums have left 32 bits
    std::memcpy(&sum, sums + i, sizeof sum);
    std::memcpy(&offset, weights + i, sizeof offset);
    const Vec value = __builtin_convertvector((VecInt)((sum - offset) * static_cast<uint32_t>(times)), Vec);
    if (count - i >= kWidth) {
      store(y + n + i, epilogue(value, n + i));
    } else {
      const int part = static_cast<int>(count - i);
      store_part(y + n + i, epilogue(value, n + i, part), part);
    }
  }
}

template <Expansion expansion>
void bytes_block(const LinearProblem& p, int32_t times, int64_t row_begin, int64_t row_end, int64_t begin,
                 int64_t end) {
  alignas(64) int8_t panel[kPanelSteps * kStepBytes];
  alignas(64) int32_t sums[kByteRows][kTileRows], weights[kTileRows];
  const int64_t most = least(row_end - row_begin, kByteRows),
                chunks = (p.inputs + kChunkWidth - 1) / kChunkWidth;
  // [chunk][row][weight]
  const Memory<uint8_t> x(chunks * most * kChunkWidth);
  for (int64_t first = row_begin; first < row_end; first += kByteRows) {
    const int64_t rows = least(kByteRows, row_end - first);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t k = 0; k < p.inputs; k += 64) {
        order_bytes(p.q + (first + m) * p.inputs + k, p.inputs - k,
                    x.data() + (k / kChunkWidth * rows + m) * kChunkWidth + k % kChunkWidth);
      }
    }
    for (int64_t tile = begin / kTileRows; tile < tile_count(end); ++tile) {
      std::memset(sums, 0, sizeof sums[0] * static_cast<size_t>(rows));
      std::memset(weights, 0, sizeof weights);
      for (int64_t k = 0; k < p.inputs; k += kChunkWidth) {
        const int64_t next = k + kChunkWidth < p.inputs ? k + kChunkWidth : 0;
        prefetch_words(p, next, next > 0 ? tile : least(tile + 1, tile_count(end) - 1));
        expand_chunk<expansion>(p, tile, k, panel, weights);
        const int64_t steps = (chunk_words(p.inputs, k) + 1) / 2 * 8;
        const bool last = k + kChunkWidth >= p.inputs;
        const int64_t n = tile * kTileRows, count = least(kTileRows, p.outputs - n);
        const auto y = [&](int64_t m) { return p.y + (first + m) * p.outputs; };
        // Rows of y are far apart: the lines that are written soon are asked for together.
        const auto prefetch = [&](int64_t m) {
          if (!last) return;
          __builtin_prefetch(y(m) + n, 1);
          __builtin_prefetch(y(m) + n + count - 1, 1);
        };
        const auto finish = [&](int64_t m) {
          if (last) finish_bytes(sums[m], weights, times, n, count, epilogue_of(p, first + m), y(m));
        };
        const auto multiply = [&]<int NV>() {
          multiply_rows<NV>(x.data() + k * rows, rows, panel, steps, sums, prefetch, finish);
        };
        if (kTileVectors == 4 && count > 2 * kByteLanes) {
          multiply.template operator()<kTileVectors>();
        } else if (count > kByteLanes) {
          multiply.template operator()<2>();
        } else {
          multiply.template operator()<1>();
        }
      }
    }
  }
}

inline bool takes_bytes(const LinearProblem& p) {
  if (p.q == nullptr || p.tiles == nullptr || (p.group != 0 && p.levels == nullptr)) return false;
  return p.inputs > 0 && p.rows >= thresholds::least_byte_rows(p.outputs, p.inputs, p.levels != nullptr) &&
         ByteWeights(p).fit;
}

inline void linear_by_bytes(const LinearProblem& p, int64_t row_begin, int64_t row_end, int64_t begin,
                            int64_t end) {
  const ByteWeights of(p);
  switch (of.expansion) {
    case Expansion::binary:
      return bytes_block<Expansion::binary>(p, of.times, row_begin, row_end, begin, end);
    case Expansion::ternary:
      return bytes_block<Expansion::ternary>(p, of.times, row_begin, row_end, begin, end);
    case Expansion::planes:
      return bytes_block<Expansion::planes>(p, of.times, row_begin, row_end, begin, end);
  }
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

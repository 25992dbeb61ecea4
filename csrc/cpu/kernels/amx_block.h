// What the products of AMX share: a block of 32 rows times 32 outputs, four registers of sums, and its end.
#pragma once

// clang-format off: the vectors come before the functions that are written in them
#include "cpu/kernels/vec.h"
#include "core/activation.h"
// clang-format on

#include <cstdint>
#include <type_traits>

#include "core/tile.h"
#include "cpu/kernels/amx_registers.h"
#include "cpu/kernels/amx_rows.h"
#include "cpu/kernels/binary_linear.h"

namespace quantopt::amx {
namespace {

constexpr int64_t kBlockRows = 2 * kRegisterRows;
constexpr int64_t kSumBytes = kBlockRows * kTileRows * 4;  // of a block

template <class Value>
using Sum = std::conditional_t<std::is_same_v<Value, int8_t>, int32_t, float>;

inline int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

// Registers of a block of `rows` rows: sums 0 to 3 (rows x outputs), rows 4 and 5, weights 6 and 7.
inline void configure(int64_t rows) {
  AmxConfig config;
  const int64_t first = least(rows, kRegisterRows), second = rows - first;
  for (int half = 0; half < 2; ++half) {
    config.shape(half, first, kRowBytes);
    config.shape(2 + half, second, kRowBytes);
    config.shape(6 + half, kRegisterRows, kRowBytes);
  }
  config.shape(4, first, kRowBytes);
  config.shape(5, second, kRowBytes);
  amx_configure(config);
}

template <bool two>
inline void zero_sums() {
  amx_zero<0>();
  amx_zero<1>();
  if constexpr (two) {
    amx_zero<2>();
    amx_zero<3>();
  }
}

// To [row][output].
template <bool two>
inline void store_sums(char* to) {
  constexpr int64_t kStride = kTileRows * 4;
  amx_store<0>(to, kStride);
  amx_store<1>(to + kStride / 2, kStride);
  if constexpr (two) {
    amx_store<2>(to + kRegisterRows * kStride, kStride);
    amx_store<3>(to + kRegisterRows * kStride + kStride / 2, kStride);
  }
}

inline __m512 as_floats(const int32_t* sums) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums)); }
inline __m512 as_floats(const float* sums) { return _mm512_load_ps(sums); }

// Where the end of a block puts y, and what it does to sums before.
struct Output {
  int64_t outputs;
  const float* scale;  // null: sums are scaled already
  int64_t scale_stride;
  const float* bias;  // or null
  Activation activation;
  int32_t times;     // what whole sums are multiplied by
  float* y;          // or null
  uint16_t* y_bf16;  // the same in bfloat16, or null
  int64_t y_stride;  // elements from one row of y to the next
};

// The end of a block: y from the sums of 32 outputs. Rows: which row of y each of the block is (`row(m)`,
// less than 0 if it is none) and the factor of x (`factor(m)`), before or after the scale.
class Finish {
 public:
  explicit Finish(const Output& to) : to_(to) {}

  // Brings a line of y into the cache, where it is written soon: `line` of the block's.
  template <class Rows>
  __attribute__((always_inline)) void prefetch(const Rows& rows, int64_t tile, int64_t line) const {
    if (to_.y_bf16 != nullptr) {
      __builtin_prefetch(to_.y_bf16 + rows.row(line) * to_.y_stride + tile * kTileRows, 1);
    } else {
      __builtin_prefetch(to_.y + rows.row(line / 2) * to_.y_stride + tile * kTileRows + line % 2 * 16, 1);
    }
  }
  int64_t lines(int64_t rows) const { return to_.y_bf16 != nullptr ? rows : 2 * rows; }

  template <class Sums, class Rows>
  void operator()(const Rows& rows, int64_t count, int64_t tile, const Sums* sums) const {
    for (int half = 0; half < 2; ++half) {
      const int64_t n = tile * kTileRows + 16 * half;
      const __mmask16 mask = lanes_of(to_.outputs - n);
      if (mask == 0) return;
      Vec scale = fill<Vec>(1.0f), bias = fill<Vec>(0.0f);
      if (to_.scale != nullptr) {
        scale =
            to_.scale_stride == 0 ? fill<Vec>(*to_.scale) : (Vec)_mm512_maskz_loadu_ps(mask, to_.scale + n);
      }
      if (to_.bias != nullptr) bias = (Vec)_mm512_maskz_loadu_ps(mask, to_.bias + n);
      for (int64_t m = 0; m < count; ++m) {
        const int64_t row = rows.row(m);
        if (row < 0) continue;
        const Sums* from = sums + m * kTileRows + 16 * half;
        const Vec factor = fill<Vec>(rows.factor(m));
        Vec v;
        if constexpr (std::is_same_v<Sums, int32_t>) {
          __m512i whole = _mm512_load_si512(from);
          if (to_.times != 1) whole = _mm512_mullo_epi32(whole, _mm512_set1_epi32(to_.times));
          v = (Vec)_mm512_cvtepi32_ps(whole) * (scale * factor);
        } else {  // a power of two first, which loses nothing; without scale that of an int8 row
          v = (Vec)_mm512_load_ps(from) * factor;
          if (to_.scale != nullptr) v *= scale;
        }
        if (to_.bias != nullptr) v += bias;
        if (to_.activation != Activation::none) v = activate(to_.activation, v);
        put(v, mask, row, n);
      }
    }
  }

 private:
  void put(Vec v, __mmask16 mask, int64_t row, int64_t n) const {
    if (to_.y_bf16 != nullptr) {
      _mm512_mask_cvtepi32_storeu_epi16(to_.y_bf16 + row * to_.y_stride + n, mask,
                                        (__m512i)bfloat16_nearest((VecBits)v));
    } else {
      _mm512_mask_storeu_ps(to_.y + row * to_.y_stride + n, mask, (__m512)v);
    }
  }

  const Output to_;
};

}  // namespace
}  // namespace quantopt::amx

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

// What 32 outputs are scaled by and moved to.
struct OutputTile {
  int64_t first;
  __mmask16 mask[2];
  Vec scale[2], bias[2];
};

// The end of a block: y from the sums of 32 outputs. Rows say which row of y each of the block is (`row(m)`,
// or less than 0 if it is none, but with `kAll`) and by what its sums are multiplied, before or after the
// scale (`factor(m)`, with `kOneFactor` the same for all).
//
// Products on registers share their port with vector instructions: the fewer of these, the sooner both end.
class Finish {
 public:
  explicit Finish(const Output& to)
      : to_(to),
        times_((to.times & (to.times - 1)) == 0 ? 1 : to.times),
        power_(static_cast<float>(to.times / times_)) {}

  __attribute__((always_inline)) OutputTile tile(int64_t number) const {
    OutputTile t;
    t.first = number * kTileRows;
    for (int half = 0; half < 2; ++half) {
      const int64_t n = t.first + 16 * half;
      t.mask[half] = lanes_of(to_.outputs - n);
      t.scale[half] = fill<Vec>(to_.scale == nullptr ? 1.0f : *to_.scale);
      if (to_.scale_stride != 0 && to_.scale != nullptr) {
        t.scale[half] = (Vec)_mm512_maskz_loadu_ps(t.mask[half], to_.scale + n);
      }
      t.scale[half] *= power_;
      t.bias[half] = fill<Vec>(-0.0f);  // changes nothing, zeros neither
      if (to_.bias != nullptr) t.bias[half] = (Vec)_mm512_maskz_loadu_ps(t.mask[half], to_.bias + n);
    }
    return t;
  }

  // Brings row m of the block into the cache, where it is written soon.
  template <class Rows>
  __attribute__((always_inline)) void prefetch(const Rows& rows, int64_t m, int64_t tile) const {
    const int64_t at = rows.row(m) * to_.y_stride + tile * kTileRows;
    if (to_.y_bf16 != nullptr) {
      __builtin_prefetch(to_.y_bf16 + at, 1);
    } else {
      __builtin_prefetch(to_.y + at, 1);
      __builtin_prefetch(to_.y + at + 16, 1);
    }
  }

  // Rows [begin, end) of the block.
  template <class Sums, class Rows>
  __attribute__((always_inline)) void operator()(const Rows& rows, int64_t begin, int64_t end,
                                                 const OutputTile& tile, const Sums* sums) const {
    if (to_.activation != Activation::none || times_ != 1) {
      with_all(rows, begin, end, tile, sums);
    } else if (to_.y_bf16 != nullptr) {
      put_rows<true>(rows, begin, end, tile, sums, [](Vec v) { return v; });
    } else {
      put_rows<false>(rows, begin, end, tile, sums, [](Vec v) { return v; });
    }
  }

 private:
  template <class Sums, class Rows>
  __attribute__((noinline)) void with_all(const Rows& rows, int64_t begin, int64_t end,
                                          const OutputTile& tile, const Sums* sums) const {
    const auto activated = [&](Vec v) { return activate(to_.activation, v); };
    alignas(64) Sums multiples[kBlockRows * kTileRows];
    if (times_ != 1) {
      for (int64_t i = begin * kTileRows; i < end * kTileRows; ++i) {
        multiples[i] = sums[i] * static_cast<Sums>(times_);
      }
      sums = multiples;
    }
    if (to_.y_bf16 != nullptr) {
      put_rows<true>(rows, begin, end, tile, sums, activated);
    } else {
      put_rows<false>(rows, begin, end, tile, sums, activated);
    }
  }

  template <bool half_y, class Sums, class Rows, class Activated>
  __attribute__((always_inline)) void put_rows(const Rows& rows, int64_t begin, int64_t end,
                                               const OutputTile& tile, const Sums* sums,
                                               const Activated& activated) const {
    constexpr bool kWhole = std::is_same_v<Sums, int32_t>;
    const Vec first = fill<Vec>(rows.factor(begin));
    const Vec both[2] = {tile.scale[0] * first, tile.scale[1] * first};
    for (int64_t m = begin; m < end; ++m) {
      const int64_t row = rows.row(m);
      if (!Rows::kAll && row < 0) continue;
      const int64_t at = row * to_.y_stride + tile.first;
      const Vec factor = Rows::kOneFactor ? first : fill<Vec>(rows.factor(m));
      Vec v[2];
      QUANTOPT_UNROLL for (int h = 0; h < 2; ++h) {
        const Sums* from = sums + m * kTileRows + 16 * h;
        if constexpr (kWhole) {
          const Vec scale = Rows::kOneFactor ? both[h] : tile.scale[h] * factor;
          v[h] = (Vec)_mm512_cvtepi32_ps(_mm512_load_si512(from)) * scale;
        } else {  // a power of two first, which loses nothing; of groups, scaled already, the scale of x
          v[h] = (Vec)_mm512_load_ps(from) * factor * tile.scale[h];
        }
        v[h] = activated(v[h] + tile.bias[h]);
      }
      if constexpr (half_y) {
        const auto mask = static_cast<__mmask32>(tile.mask[0] | static_cast<uint32_t>(tile.mask[1]) << 16);
        _mm512_mask_storeu_epi16(to_.y_bf16 + at, mask, as_bfloat16(v));
      } else {
        _mm512_mask_storeu_ps(to_.y + at, tile.mask[0], (__m512)v[0]);
        _mm512_mask_storeu_ps(to_.y + at + 16, tile.mask[1], (__m512)v[1]);
      }
    }
  }

  // Rounded to the nearest, ties to even. The instruction takes denormals as zero.
  static __attribute__((always_inline)) __m512i as_bfloat16(const Vec* v) {
    constexpr int kDenormal = 0x20;
    const __mmask16 denormal =
        _mm512_fpclass_ps_mask((__m512)v[0], kDenormal) | _mm512_fpclass_ps_mask((__m512)v[1], kDenormal);
    if (__builtin_expect(denormal == 0, 1)) {
      return (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    }
    const __m256i low = _mm512_cvtepi32_epi16((__m512i)(bfloat16_nearest((VecBits)v[0]) >> 16));
    const __m256i high = _mm512_cvtepi32_epi16((__m512i)(bfloat16_nearest((VecBits)v[1]) >> 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

  const Output to_;
  const int32_t times_;  // a power of two is part of the scale instead, which loses nothing
  const float power_;
};

}  // namespace
}  // namespace quantopt::amx

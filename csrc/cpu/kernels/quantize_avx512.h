// Quantisation of 64 values at a time with AVX-512, as core/quantize.h defines it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "core/quantize.h"

namespace quantopt {
namespace {  // one set per translation unit, and so per instruction set

// The lanes of `left` values, at most 16.
inline __mmask16 lanes_of(int64_t left) {
  return static_cast<__mmask16>(left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1);
}

constexpr int64_t kQuantized = 64;  // values that are quantised together

// 64 values, of which `left` are read and the rest is zero.
inline void load_values(const float* x, int64_t left, __m512* v) {
  for (int i = 0; i < 4; ++i) {
    v[i] = left >= kQuantized ? _mm512_loadu_ps(x + 16 * i)
                              : _mm512_maskz_loadu_ps(lanes_of(left - 16 * i), x + 16 * i);
  }
}
inline void load_values(const uint16_t* x, int64_t left, __m512* v) {  // bfloat16
  for (int i = 0; i < 4; ++i) {
    const __m256i halves = left >= kQuantized
                               ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * i))
                               : _mm256_maskz_loadu_epi16(lanes_of(left - 16 * i), x + 16 * i);
    v[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
}

// max|x|; an infinity or NaN if there is one (core/quantize.h).
template <class X>
float largest_of(const X* x, int64_t count) {
  __m512i most[4] = {};
  for (int64_t k = 0; k < count; k += kQuantized) {
    __m512 v[4];
    load_values(x + k, count - k, v);
    for (int i = 0; i < 4; ++i) {
      const __m512i size = _mm512_and_si512(_mm512_set1_epi32(0x7FFFFFFF), _mm512_castps_si512(v[i]));
      most[i] = _mm512_max_epu32(most[i], size);
    }
  }
  const uint32_t bits = _mm512_reduce_max_epu32(
      _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3])));
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest;
}

// q = x / scale rounded half to even, within +-127, for |x| up to 127 scale; 0 where scale is 0 or NaN.
class Quantizer {
 public:
  explicit Quantizer(float scale)
      : none_(!(scale > 0.0f)),
        exact_(scale < std::numeric_limits<float>::min()),  // its reciprocal may be infinite
        divisor_(_mm512_set1_ps(scale)),
        reciprocal_(_mm512_set1_ps(1.0f / scale)) {}

  // 64 values as bytes.
  __m512i operator()(const __m512* x) const {
    if (none_) return _mm512_setzero_si512();
    __m512i whole[4];
    __m512 furthest = _mm512_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      const __m512 v = _mm512_mul_ps(x[i], reciprocal_);
      whole[i] = _mm512_cvtps_epi32(v);
      constexpr int kLargerSize = 0b1011;
      furthest = _mm512_range_ps(furthest, _mm512_sub_ps(v, _mm512_cvtepi32_ps(whole[i])), kLargerSize);
    }
    constexpr float kNearTie = 0.4999f;  // as near_tie of core/quantize.h
    if (exact_ || _mm512_cmp_ps_mask(furthest, _mm512_set1_ps(kNearTie), _CMP_GT_OQ) != 0) {
      const __m512 bound = _mm512_set1_ps(127.0f), lower = _mm512_set1_ps(-127.0f);
      for (int i = 0; i < 4; ++i) {
        const __m512 v = _mm512_div_ps(x[i], divisor_);
        whole[i] = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(v, bound), lower));
      }
    }
    // Two times two vectors are packed within their quarters.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i packed =
        _mm512_packs_epi16(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]));
    return _mm512_permutexvar_epi32(order, packed);
  }

 private:
  bool none_, exact_;
  __m512 divisor_, reciprocal_;
};

}  // namespace
}  // namespace quantopt

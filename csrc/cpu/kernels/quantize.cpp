// Symmetric quantisation of rows of x to int8.
#include "cpu/kernels/quantize.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include <cstring>
#include <limits>

#include "core/quantize.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kRoundBlock = 64;

#if defined(__AVX512BW__)

constexpr float kNearTie = 0.4999f;  // as near_tie of core/quantize.h

// q = x / scale rounded half to even, within +-127, for |x| up to 127 scale.
void quantize_by(float scale, const float* x, int64_t inputs, int8_t* q) {
  const __m512 divisor = _mm512_set1_ps(scale), reciprocal = _mm512_set1_ps(1.0f / scale);
  int64_t k = 0;
  if (scale >= std::numeric_limits<float>::min()) {  // its quotients round to 127 at most
    // Two times two vectors are packed within their quarters.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (; k + kRoundBlock <= inputs; k += kRoundBlock) {
      __m512i whole[4];
      __m512 furthest = _mm512_setzero_ps();
      for (int i = 0; i < 4; ++i) {
        const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + k + 16 * i), reciprocal);
        whole[i] = _mm512_cvtps_epi32(v);
        constexpr int kLargerSize = 0b1011;
        furthest = _mm512_range_ps(furthest, _mm512_sub_ps(v, _mm512_cvtepi32_ps(whole[i])), kLargerSize);
      }
      if (_mm512_cmp_ps_mask(furthest, _mm512_set1_ps(kNearTie), _CMP_GT_OQ) != 0) {
        for (int i = 0; i < 4; ++i) {
          whole[i] = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + k + 16 * i), divisor));
        }
      }
      const __m512i packed =
          _mm512_packs_epi16(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]));
      _mm512_storeu_si512(q + k, _mm512_permutexvar_epi32(order, packed));
    }
  }
  const __m512 bound = _mm512_set1_ps(127.0f), lower = _mm512_set1_ps(-127.0f);
  for (; k < inputs; k += 16) {
    const __mmask16 mask = static_cast<__mmask16>(inputs - k >= 16 ? 0xFFFF : (1u << (inputs - k)) - 1);
    const __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + k), divisor);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(v, bound), lower));
    _mm512_mask_cvtepi32_storeu_epi8(q + k, mask, whole);
  }
}

#else

// q = x / scale rounded half to even, within +-127.
void quantize_by(float scale, const float* x, int64_t inputs, int8_t* q) {
  const float reciprocal = 1.0f / scale;
  for (int64_t first = 0; first < inputs; first += kRoundBlock) {
    const int64_t count = least(kRoundBlock, inputs - first);
    const float* from = x + first;
    float rounded[kRoundBlock];
    int32_t near = 0;
    for (int64_t k = 0; k < count; ++k) {
      const float quotient = from[k] * reciprocal;
      rounded[k] = __builtin_rintf(quotient);
      near |= near_tie(quotient, rounded[k]);
    }
    if (near != 0) {
      for (int64_t k = 0; k < count; ++k) rounded[k] = quantized(from[k], scale);
    }
    for (int64_t k = 0; k < count; ++k) {
      q[first + k] = static_cast<int8_t>(static_cast<int32_t>(clamp(rounded[k], -127.0f, 127.0f)));
    }
  }
}

#endif

}  // namespace

#if defined(__AVX512BW__)

float row_magnitude(const float* x, int64_t inputs) {
  const __m512i size = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most[4] = {};
  int64_t k = 0;
  for (; k + kRoundBlock <= inputs; k += kRoundBlock) {
    for (int i = 0; i < 4; ++i) {
      most[i] = _mm512_max_epu32(most[i], _mm512_and_si512(size, _mm512_loadu_si512(x + k + 16 * i)));
    }
  }
  for (; k < inputs; k += 16) {
    const __mmask16 mask = static_cast<__mmask16>(inputs - k >= 16 ? 0xFFFF : (1u << (inputs - k)) - 1);
    most[0] = _mm512_max_epu32(most[0], _mm512_and_si512(size, _mm512_maskz_loadu_epi32(mask, x + k)));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(
      _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3])));
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest;
}

#else

float row_magnitude(const float* x, int64_t inputs) { return largest_magnitude(x, inputs); }

#endif

float quantize_row(const float* x, int64_t inputs, int8_t* q) {
  const float scale = quantization_scale(row_magnitude(x, inputs));
  if (!(scale > 0.0f)) {
    std::memset(q, 0, static_cast<size_t>(inputs));
  } else {
    quantize_by(scale, x, inputs, q);
  }
  return scale;
}

}  // namespace quantopt::QUANTOPT_ISA

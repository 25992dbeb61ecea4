// Symmetric quantisation of rows of x to int8.
#include "cpu/kernels/quantize.h"

#include <cstring>

#include "core/quantize.h"
#if defined(__AVX512BW__)
#include "cpu/kernels/quantize_avx512.h"
#endif

namespace quantopt::QUANTOPT_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kRoundBlock = 64;

#if defined(__AVX512BW__)

void quantize_by(float scale, const float* x, int64_t inputs, int8_t* q) {
  const Quantizer quantizer(scale);
  for (int64_t k = 0; k < inputs; k += kQuantized) {
    const int64_t left = inputs - k;
    __m512 v[4];
    load_values(x + k, left, v);
    const __m512i bytes = quantizer(v);
    if (left >= kQuantized) {
      _mm512_storeu_si512(q + k, bytes);
    } else {
      _mm512_mask_storeu_epi8(q + k, (__mmask64{1} << left) - 1, bytes);
    }
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

float row_magnitude(const float* x, int64_t inputs) { return largest_of(x, inputs); }

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

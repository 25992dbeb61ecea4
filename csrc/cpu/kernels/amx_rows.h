// Activations as the tile registers of AMX take them.
//
// A register holds 16 rows of 64 bytes: a step of K, 64 signed bytes or 32 bfloat16. The values of a step are
// in the order in which weights are expanded with one instruction each (amx_expand.h), which a dot product
// does not see: in bytes, k = 8 j + t of each 32 at 4 t + j; in bfloat16, k = 16 j + 15 - t at 2 t + j.
#pragma once

#include "cpu/kernels/quantize_avx512.h"

namespace quantopt::amx {
namespace {

#define QUANTOPT_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t kRegisterRows = 16;
constexpr int64_t kRowBytes = 64;
constexpr int64_t kRegisterBytes = kRegisterRows * kRowBytes;

template <class Value>
constexpr int64_t kStepValues = kRowBytes / static_cast<int64_t>(sizeof(Value));

struct Orders {
  alignas(64) uint8_t bytes[64];
  alignas(64) uint16_t halves[32];
};
constexpr Orders make_orders() {
  Orders orders{};
  for (int i = 0; i < 32; ++i) {
    const auto byte = static_cast<uint8_t>(8 * (i % 4) + i / 4);
    orders.bytes[i] = byte;
    orders.bytes[32 + i] = static_cast<uint8_t>(32 + byte);
    orders.halves[i] = static_cast<uint16_t>(16 * (i % 2) + 15 - i / 2);
  }
  return orders;
}
constexpr Orders kOrders = make_orders();

// Steps of `count` values, `pitch` bytes apart, the last filled up with zeros.
template <class X>
inline void put_quantized(const X* x, int64_t count, const Quantizer& quantizer, char* to, int64_t pitch) {
  const __m512i order = _mm512_load_si512(kOrders.bytes);
  for (int64_t k = 0; k < count; k += kQuantized, to += pitch) {
    __m512 v[4];
    load_values(x + k, count - k, v);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi8(order, quantizer(v)));
  }
}

// A power of two by which the values of a row are multiplied, and sums divided, so that neither come near the
// denormals, which products of bfloat16 take as zero, nor near the largest number: 1 unless the row is small
// or large as a whole. What is lost then is less than 2^-60 of its largest value.
struct PowerOfTwo {
  float times, back;
};
inline PowerOfTwo power_for(float largest) {
  uint32_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  const int32_t exponent = static_cast<int32_t>(bits >> 23) - 127;
  if ((exponent >= -60 && exponent <= 60) || exponent == 128 || largest == 0.0f) return {1.0f, 1.0f};
  const int32_t by = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
  const auto power = [](int32_t e) {
    const uint32_t of = static_cast<uint32_t>(e + 127) << 23;
    float value;
    std::memcpy(&value, &of, sizeof value);
    return value;
  };
  return {power(-by), power(by)};
}

// bfloat16 values times a power of two.
inline void put_halves(const uint16_t* x, int64_t count, float times, char* to, int64_t pitch) {
  const __m512i order = _mm512_load_si512(kOrders.halves);
  for (int64_t k = 0; k < count; k += 32, to += pitch) {
    const int64_t left = count - k;
    const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    __m512i v = _mm512_maskz_loadu_epi16(mask, x + k);
    if (times != 1.0f) {
      const __m512 factor = _mm512_set1_ps(times);
      const __m512 low = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), factor);
      const __m512 high = _mm512_mul_ps(
          _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))), factor);
      v = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                  _mm512_castps_si512(high));
    }
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, v));
  }
}

constexpr int kParts = 3;

// fp32 values times a power of two as the sum of three bfloat16 parts of 8 bits each, exactly; `part` bytes
// from one part of a step to the next. Infinities and NaN are in the first part, and zero in the others.
inline void put_parts(const float* x, int64_t count, float times, char* to, int64_t pitch, int64_t part) {
  const __m512i order = _mm512_load_si512(kOrders.halves);
  const __m512 factor = _mm512_set1_ps(times);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  for (int64_t k = 0; k < count; k += 32, to += pitch) {
    __m512i parts[kParts] = {};
    for (int half = 0; half < 2; ++half) {
      const __mmask16 mask = lanes_of(count - k - 16 * half);
      __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k + 16 * half), factor);
      constexpr int kInfinityOrNaN = 0x99;
      const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(v, kInfinityOrNaN));
      for (int i = 0; i < kParts; ++i) {
        const __m512i first = _mm512_and_si512(_mm512_castps_si512(v), upper);
        const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(first, 16));
        parts[i] = half == 0 ? _mm512_castsi256_si512(halves) : _mm512_inserti64x4(parts[i], halves, 1);
        v = _mm512_maskz_sub_ps(finite, v, _mm512_castsi512_ps(first));
      }
    }
    for (int i = 0; i < kParts; ++i) {
      _mm512_storeu_si512(to + i * part, _mm512_permutexvar_epi16(order, parts[i]));
    }
  }
}

}  // namespace
}  // namespace quantopt::amx

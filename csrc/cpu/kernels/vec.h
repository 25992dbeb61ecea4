// Vectors of floats for the rules of csrc/core, by the vector extension of GCC and Clang, at the width of the
// instruction set that this translation unit is compiled for. Include it before the rules: vectors have no
// namespace in which their functions could be found later.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/rounding.h"
#include "core/scalar.h"

namespace quantopt {
namespace {  // one set per translation unit, and so per instruction set

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecInt __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecBits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kWidth)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline __attribute__((always_inline)) Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline __attribute__((always_inline)) void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
// The first `count` of the floats, with zeros behind them.
inline __attribute__((always_inline)) Vec load_part(const float* p, int count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  Vec x = {};
  std::memcpy(&x, p, sizeof(float) * static_cast<size_t>(count));
  return x;
#endif
}
inline __attribute__((always_inline)) void store_part(float* p, Vec x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)x);
#else
  std::memcpy(p, &x, sizeof(float) * static_cast<size_t>(count));
#endif
}
// Past the caches, to an address that is a multiple of the vector's size.
inline __attribute__((always_inline)) void store_past_caches(float* p, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}

// To be called before other threads may read what was stored so.
inline void finish_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// 16-bit numbers, one to a lane. The intrinsics are one instruction where gcc 12 makes six of a conversion.
inline __attribute__((always_inline)) VecBits load_halves(const void* p) {
#if defined(__AVX512F__)
  return (VecBits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (VecBits)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  VecHalf half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, VecBits);
#endif
}

inline __attribute__((always_inline)) Vec load(const BFloat16* p) { return (Vec)(load_halves(p) << 16); }

inline __attribute__((always_inline)) Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec x;
  for (int k = 0; k < kWidth; ++k) x[k] = static_cast<float>(__builtin_bit_cast(_Float16, p[k].bits));
  return x;
#endif
}
inline __attribute__((always_inline)) void store(Float16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int k = 0; k < kWidth; ++k) p[k].bits = __builtin_bit_cast(uint16_t, static_cast<_Float16>(x[k]));
#endif
}

inline __attribute__((always_inline)) Vec absolute(Vec x) { return (Vec)((VecBits)x & 0x7FFFFFFFu); }

inline __attribute__((always_inline)) Vec power_of_two(Vec shifted) {
  return (Vec)(((VecBits)shifted + 127u) << 23);
}

inline __attribute__((always_inline)) Vec turned_by(Vec s, Vec x) {
#if defined(__AVX512F__)
  constexpr int kAndXor = 0x6A;  // (a & b) ^ c
  return (Vec)_mm512_ternarylogic_epi32((__m512i)s, _mm512_set1_epi32(INT32_MIN), (__m512i)x, kAndXor);
#else
  return (Vec)((VecBits)x ^ ((VecBits)s & 0x80000000u));
#endif
}

// As the templates: x < bound ? bound : x. One instruction, where gcc may make a comparison and a selection.
inline __attribute__((always_inline)) Vec maximum(Vec x, Vec bound) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return x < bound ? bound : x;
#endif
}
inline __attribute__((always_inline)) Vec minimum(Vec x, Vec bound) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)bound, (__m256)x);
#else
  return x > bound ? bound : x;
#endif
}

inline __attribute__((always_inline)) Vec round_down(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Vec)_mm256_floor_ps((__m256)x);
#else
  for (int k = 0; k < kWidth; ++k) x[k] = floorf(x[k]);
  return x;
#endif
}

inline __attribute__((always_inline)) Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int k = 0; k < kWidth; ++k) x[k] = sqrtf(x[k]);
  return x;
#endif
}

// High and low words of the 64-bit products of a constant and every lane.
inline __attribute__((always_inline)) void wide_product(uint32_t constant, VecBits x, VecBits& high,
                                                        VecBits& low) {
#if defined(__AVX512F__)
  const __m512i k = _mm512_set1_epi32(static_cast<int>(constant));
  const __m512i even = _mm512_mul_epu32((__m512i)x, k);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), k);
  high = (VecBits)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  low = (VecBits)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  const __m256i k = _mm256_set1_epi32(static_cast<int>(constant));
  const __m256i even = _mm256_mul_epu32((__m256i)x, k);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), k);
  high = (VecBits)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = (VecBits)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  for (int k = 0; k < kWidth; ++k) {
    const uint64_t product = static_cast<uint64_t>(constant) * x[k];
    high[k] = static_cast<uint32_t>(product >> 32);
    low[k] = static_cast<uint32_t>(product);
  }
#endif
}

// Transposes the 4x4 words of every 128-bit lane: w[j] lane q <- lane j of each w[.] in lane q.
inline __attribute__((always_inline)) void transpose_quads(VecBits w[4]) {
#if defined(__AVX512F__)
  const __m512i a = _mm512_unpacklo_epi32((__m512i)w[0], (__m512i)w[1]);
  const __m512i b = _mm512_unpackhi_epi32((__m512i)w[0], (__m512i)w[1]);
  const __m512i c = _mm512_unpacklo_epi32((__m512i)w[2], (__m512i)w[3]);
  const __m512i d = _mm512_unpackhi_epi32((__m512i)w[2], (__m512i)w[3]);
  w[0] = (VecBits)_mm512_unpacklo_epi64(a, c);
  w[1] = (VecBits)_mm512_unpackhi_epi64(a, c);
  w[2] = (VecBits)_mm512_unpacklo_epi64(b, d);
  w[3] = (VecBits)_mm512_unpackhi_epi64(b, d);
#elif defined(__AVX2__)
  const __m256i a = _mm256_unpacklo_epi32((__m256i)w[0], (__m256i)w[1]);
  const __m256i b = _mm256_unpackhi_epi32((__m256i)w[0], (__m256i)w[1]);
  const __m256i c = _mm256_unpacklo_epi32((__m256i)w[2], (__m256i)w[3]);
  const __m256i d = _mm256_unpackhi_epi32((__m256i)w[2], (__m256i)w[3]);
  w[0] = (VecBits)_mm256_unpacklo_epi64(a, c);
  w[1] = (VecBits)_mm256_unpackhi_epi64(a, c);
  w[2] = (VecBits)_mm256_unpacklo_epi64(b, d);
  w[3] = (VecBits)_mm256_unpackhi_epi64(b, d);
#else
  const VecBits from[4] = {w[0], w[1], w[2], w[3]};
  for (int row = 0; row < 4; ++row) {
    for (int k = 0; k < kWidth; ++k) w[row][k] = from[k % 4][k / 4 * 4 + row];
  }
#endif
}

}  // namespace
}  // namespace quantopt

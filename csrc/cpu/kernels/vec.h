// Vectors of floats for the rules of csrc/core, by the vector extension of GCC and Clang, at the width of the
// instruction set that this translation unit is compiled for. Include it before the rules: vectors have no
// namespace in which their functions could be found later.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/philox.h"
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

inline __attribute__((always_inline)) VecBits load_halves(const void* p) {
  VecHalf half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, VecBits);
}
inline __attribute__((always_inline)) void store_halves(void* p, VecBits x) {
  const VecHalf half = __builtin_convertvector(x, VecHalf);
  std::memcpy(p, &half, sizeof(half));
}

inline __attribute__((always_inline)) Vec load(const BFloat16* p) { return (Vec)(load_halves(p) << 16); }
inline __attribute__((always_inline)) void store(BFloat16* p, Vec x) {
  store_halves(p, bfloat16_nearest((VecBits)x));
}

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

inline __attribute__((always_inline)) Vec turned_by(Vec s, Vec x) {
  return (Vec)((VecBits)x ^ ((VecBits)s & 0x80000000u));
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

}  // namespace
}  // namespace quantopt

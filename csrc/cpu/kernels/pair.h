// Two vectors of floats as one number of the rules of csrc/core. Instructions of both alternate: a rule is a
// long chain of them, and a processor that reads them in order finds more that need not wait for each other.
// Of 16-bit elements, a pair is also a whole cache line at 512 bits.
#pragma once

#include "cpu/kernels/vec.h"

namespace quantopt {
namespace {  // one set per translation unit, and so per instruction set

#define QUANTOPT_INLINE inline __attribute__((always_inline))

constexpr int kPair = 2 * kWidth;  // elements

struct Pair {
  Vec first, second;
};
struct PairBits {
  VecBits first, second;
};

QUANTOPT_INLINE PairBits bits_of(Pair x) { return {(VecBits)x.first, (VecBits)x.second}; }

// ---- arithmetic

#define QUANTOPT_OPERATOR(op)                                                                             \
  QUANTOPT_INLINE Pair operator op(Pair x, Pair y) { return {x.first op y.first, x.second op y.second}; } \
  QUANTOPT_INLINE Pair operator op(Pair x, float y) { return {x.first op y, x.second op y}; }             \
  QUANTOPT_INLINE Pair operator op(float x, Pair y) { return {x op y.first, x op y.second}; }
QUANTOPT_OPERATOR(+)
QUANTOPT_OPERATOR(-)
QUANTOPT_OPERATOR(*)
QUANTOPT_OPERATOR(/)
#undef QUANTOPT_OPERATOR

QUANTOPT_INLINE Pair operator-(Pair x) { return {-x.first, -x.second}; }
QUANTOPT_INLINE Pair& operator+=(Pair& x, Pair y) { return x = x + y; }

// ---- comparisons

#if defined(__AVX512F__)
typedef __mmask16 VecMask;
#define QUANTOPT_COMPARE(name, op, code) \
  QUANTOPT_INLINE VecMask name(Vec x, Vec y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)y, code); }
#else
typedef VecInt VecMask;
#define QUANTOPT_COMPARE(name, op, code) \
  QUANTOPT_INLINE VecMask name(Vec x, Vec y) { return x op y; }
#endif
QUANTOPT_COMPARE(less, <, _CMP_LT_OS)
QUANTOPT_COMPARE(at_least, >=, _CMP_GE_OS)
QUANTOPT_COMPARE(equal, ==, _CMP_EQ_OQ)
#undef QUANTOPT_COMPARE

struct PairMask {
  VecMask first, second;
};

QUANTOPT_INLINE PairMask operator<(Pair x, float y) {
  return {less(x.first, fill<Vec>(y)), less(x.second, fill<Vec>(y))};
}
QUANTOPT_INLINE PairMask operator>=(Pair x, float y) {
  return {at_least(x.first, fill<Vec>(y)), at_least(x.second, fill<Vec>(y))};
}
QUANTOPT_INLINE PairMask operator==(Pair x, float y) {
  return {equal(x.first, fill<Vec>(y)), equal(x.second, fill<Vec>(y))};
}

// Floats without a sign order as integers do: one comparison sees both bounds.
QUANTOPT_INLINE PairMask positive_below(Pair x, float bound) {
  const uint32_t end = __builtin_bit_cast(uint32_t, bound);
  const auto inside = [last = end == 0 ? 0u : end - 1u](Vec part) {
    const VecBits before = (VecBits)part - 1u;
#if defined(__AVX512F__)
    return _mm512_cmplt_epu32_mask((__m512i)before, _mm512_set1_epi32(static_cast<int>(last)));
#else
    return (VecInt)(before < last);
#endif
  };
  return {inside(x.first), inside(x.second)};
}

QUANTOPT_INLINE bool any(PairMask mask) {
#if defined(__AVX512F__)
  return !_mm512_kortestz(mask.first, mask.second);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(mask.first | mask.second)) != 0;
#else
  const VecInt both = mask.first | mask.second;
  int32_t lanes = 0;
  for (int k = 0; k < kWidth; ++k) lanes |= both[k];
  return lanes != 0;
#endif
}

// Whether a magnitude is `bound` or more.
QUANTOPT_INLINE bool any_magnitude_from(Pair x, uint32_t bound) {
  const VecBits first = (VecBits)x.first + (VecBits)x.first;  // without the sign
  const VecBits second = (VecBits)x.second + (VecBits)x.second;
#if defined(__AVX512F__)
  const __m512i larger = _mm512_max_epu32((__m512i)first, (__m512i)second);
  return _mm512_cmpge_epu32_mask(larger, _mm512_set1_epi32(static_cast<int>(2 * bound))) != 0;
#else
  return any(PairMask{(VecInt)(first >= 2 * bound), (VecInt)(second >= 2 * bound)});
#endif
}

QUANTOPT_INLINE Vec select(VecMask mask, Vec x, Vec otherwise) {
#if defined(__AVX512F__)
  return (Vec)_mm512_mask_blend_ps(mask, (__m512)otherwise, (__m512)x);
#else
  return mask ? x : otherwise;
#endif
}
QUANTOPT_INLINE Pair select(PairMask mask, Pair x, Pair otherwise) {
  return {select(mask.first, x.first, otherwise.first), select(mask.second, x.second, otherwise.second)};
}

// Not x : otherwise of the pairs, of which gcc would choose the address, and so store them.
QUANTOPT_INLINE Pair select(bool condition, Pair x, Pair otherwise) {
  return {condition ? x.first : otherwise.first, condition ? x.second : otherwise.second};
}

// ---- functions

QUANTOPT_INLINE Pair minimum(Pair x, Pair bound) {
  return {minimum(x.first, bound.first), minimum(x.second, bound.second)};
}
QUANTOPT_INLINE Pair maximum(Pair x, Pair bound) {
  return {maximum(x.first, bound.first), maximum(x.second, bound.second)};
}
QUANTOPT_INLINE Pair maximum_where(PairMask mask, Pair x, Pair bound) {
#if defined(__AVX512F__)
  return {(Vec)_mm512_mask_max_ps((__m512)x.first, mask.first, (__m512)bound.first, (__m512)x.first),
          (Vec)_mm512_mask_max_ps((__m512)x.second, mask.second, (__m512)bound.second, (__m512)x.second)};
#else
  return select(mask, maximum(x, bound), x);
#endif
}
QUANTOPT_INLINE PairMask operator<(Pair x, Pair y) {
  return {less(x.first, y.first), less(x.second, y.second)};
}
QUANTOPT_INLINE Pair absolute(Pair x) { return {absolute(x.first), absolute(x.second)}; }
QUANTOPT_INLINE Pair round_down(Pair x) { return {round_down(x.first), round_down(x.second)}; }
QUANTOPT_INLINE Pair square_root(Pair x) { return {square_root(x.first), square_root(x.second)}; }
QUANTOPT_INLINE Pair turned_by(Pair s, Pair x) {
  return {turned_by(s.first, x.first), turned_by(s.second, x.second)};
}

// ---- memory

QUANTOPT_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kWidth)}; }
QUANTOPT_INLINE void store_pair(float* p, Pair x) {
  store(p, x.first);
  store(p + kWidth, x.second);
}
// Past the caches, to an address that is a multiple of the vector's size.
QUANTOPT_INLINE void stream_pair(float* p, Pair x) {
  store_past_caches(p, x.first);
  store_past_caches(p + kWidth, x.second);
}

QUANTOPT_INLINE Pair load_pair(const BFloat16* p) {
#if defined(__AVX512VBMI__)  // one permutation for each vector in place of a widening and a shift; of words
                             // it is two
  alignas(64) static constexpr uint8_t kHalves[64] = {0, 0, 0,  1,  0, 0, 2,  3,  0, 0, 4,  5,  0, 0, 6,  7,
                                                      0, 0, 8,  9,  0, 0, 10, 11, 0, 0, 12, 13, 0, 0, 14, 15,
                                                      0, 0, 16, 17, 0, 0, 18, 19, 0, 0, 20, 21, 0, 0, 22, 23,
                                                      0, 0, 24, 25, 0, 0, 26, 27, 0, 0, 28, 29, 0, 0, 30, 31};
  const __m512i first = _mm512_load_si512(kHalves), second = _mm512_add_epi8(first, _mm512_set1_epi8(32));
  const __m512i line = _mm512_loadu_si512(p);
  constexpr __mmask64 kHigh = 0xCCCCCCCCCCCCCCCC;
  return {(Vec)_mm512_maskz_permutexvar_epi8(kHigh, first, line),
          (Vec)_mm512_maskz_permutexvar_epi8(kHigh, second, line)};
#elif defined(__AVX512BW__)  // as above
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                      0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i line = _mm512_loadu_si512(p);
  return {(Vec)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, first, line),
          (Vec)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, second, line)};
#else
  return {load(p), load(p + kWidth)};
#endif
}

// A whole line of 16-bit elements, or half of one.
#if defined(__AVX512F__)
typedef __m512i Line;
#elif defined(__AVX2__)
typedef __m256i Line;
#else
struct Line {
  VecHalf first, second;
};
#endif

// The high halves of the words.
QUANTOPT_INLINE Line high_halves(VecBits first, VecBits second) {
#if defined(__AVX512BW__)  // one permutation of both, vpermt2w, takes as long as the three
  const __m512i both =
      _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32((__m512i)first, 16), (__m512i)second);
#if defined(__AVX512VBMI__)
  alignas(64) static constexpr uint8_t kOrder[64] = {
      0,  1,  4,  5,  8,  9,  12, 13, 16, 17, 20, 21, 24, 25, 28, 29, 32, 33, 36, 37, 40, 41,
      44, 45, 48, 49, 52, 53, 56, 57, 60, 61, 2,  3,  6,  7,  10, 11, 14, 15, 18, 19, 22, 23,
      26, 27, 30, 31, 34, 35, 38, 39, 42, 43, 46, 47, 50, 51, 54, 55, 58, 59, 62, 63};
  return _mm512_permutexvar_epi8(_mm512_load_si512(kOrder), both);
#else
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                      22, 24, 26, 28, 30, 1,  3,  5,  7,  9,  11,
                                                      13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
#endif
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)(first >> 16), (__m256i)(second >> 16));
  return _mm256_permute4x64_epi64(packed, 0xD8);
#else
  return {__builtin_convertvector(first >> 16, VecHalf), __builtin_convertvector(second >> 16, VecHalf)};
#endif
}

QUANTOPT_INLINE Line rounded_to_nearest(Pair x) {
#if defined(__AVX512BF16__)  // flushes denormals to zero, otherwise the same
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)x.second, (__m512)x.first);
#else
  return high_halves(bfloat16_nearest((VecBits)x.first), bfloat16_nearest((VecBits)x.second));
#endif
}

// With 16 random bits for each element at `random`.
QUANTOPT_INLINE Line rounded_stochastically(Pair x, const uint16_t* random) {
  const VecBits first = (VecBits)x.first, second = (VecBits)x.second;
  const VecBits low = load_halves(random), high = load_halves(random + kWidth);
  if (any_magnitude_from(x, kBFloat16Top)) {
    return high_halves(bfloat16_stochastic(first, low), bfloat16_stochastic(second, high));
  }
  return high_halves(bfloat16_stochastic_finite(first, low), bfloat16_stochastic_finite(second, high));
}

QUANTOPT_INLINE void store_line(BFloat16* p, Line line) { std::memcpy(p, &line, sizeof line); }
QUANTOPT_INLINE void store_pair(BFloat16* p, Pair x) { store_line(p, rounded_to_nearest(x)); }
// Past the caches, to an address that is a multiple of the vector's size, which is also that of the line.
QUANTOPT_INLINE void stream_pair(BFloat16* p, Pair x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), rounded_to_nearest(x));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded_to_nearest(x));
#else
  store_pair(p, x);
#endif
}

QUANTOPT_INLINE Pair load_pair(const Float16* p) { return {load(p), load(p + kWidth)}; }
QUANTOPT_INLINE void store_pair(Float16* p, Pair x) {
  store(p, x.first);
  store(p + kWidth, x.second);
}

// The first `count` elements of a pair, the rest zero.
template <class T>
QUANTOPT_INLINE Pair load_some(const T* p, int64_t count) {
  T part[kPair] = {};
  std::memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load_pair(part);
}

}  // namespace
}  // namespace quantopt

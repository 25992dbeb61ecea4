// Memory access of the step's kernels: N elements of any dtype, 16 bytes at a time where the address allows
// it, and their conversion to and from float32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/philox.h"
#include "core/rounding.h"
#include "core/step.h"

namespace quantopt {
namespace {

// ---- words in memory

// N elements as stored: N words of float32, or the first N / 2 words of a 16-bit type.
template <int N>
struct Raw {
  uint32_t word[N];
};

struct alignas(16) Quad {
  uint32_t word[4];
};

__device__ __forceinline__ void store_quad(void* p, const Quad& q) {
#ifdef __CUDA_ARCH__  // in PTX: the compiler splits the store where the divisions of the elements branch
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(q.word[0]), "r"(q.word[1]),
               "r"(q.word[2]), "r"(q.word[3])
               : "memory");
#else
  *static_cast<Quad*>(p) = q;
#endif
}

template <int N>
__device__ __forceinline__ void load_words(const void* p, Raw<N>& raw, int words) {
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    if (j >= words) break;
    const Quad q = static_cast<const Quad*>(p)[j / 4];
#pragma unroll
    for (int k = 0; k < 4; ++k) raw.word[j + k] = q.word[k];
  }
}

template <int N>
__device__ __forceinline__ void store_words(void* p, const Raw<N>& raw, int words) {
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    if (j >= words) break;
    store_quad(static_cast<Quad*>(p) + j / 4,
               Quad{{raw.word[j], raw.word[j + 1], raw.word[j + 2], raw.word[j + 3]}});
  }
}

// Elements i .. i + N - 1 at an address that is a multiple of 16, or the first `count` of them.
template <int N>
__device__ __forceinline__ Raw<N> load_raw(Dtype dtype, const void* p, int64_t i, bool full, int count) {
  Raw<N> raw;
  if (dtype == Dtype::kFloat32) {
    const auto* from = static_cast<const uint32_t*>(p) + i;
    if constexpr (N >= 4) {
      if (full) {
        load_words(from, raw, N);
        return raw;
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) raw.word[n] = n < count ? from[n] : 0u;
  } else {
    const auto* from = static_cast<const uint16_t*>(p) + i;
    if constexpr (N >= 8) {
      if (full) {
        load_words(from, raw, N / 2);
        return raw;
      }
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const uint32_t low = n < count ? from[n] : 0u;
      const uint32_t high = n + 1 < count ? from[n + 1] : 0u;
      raw.word[n / 2] = low | high << 16;
    }
  }
  return raw;
}

template <int N>
__device__ __forceinline__ void store_raw(Dtype dtype, const Raw<N>& raw, void* p, int64_t i, bool full,
                                          int count) {
  if (dtype == Dtype::kFloat32) {
    auto* to = static_cast<uint32_t*>(p) + i;
    if constexpr (N >= 4) {
      if (full) return store_words(to, raw, N);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n < count) to[n] = raw.word[n];
    }
  } else {
    auto* to = static_cast<uint16_t*>(p) + i;
    if constexpr (N >= 8) {
      if (full) return store_words(to, raw, N / 2);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n < count) to[n] = static_cast<uint16_t>(raw.word[n / 2] >> (n % 2 * 16));
    }
  }
}

// ---- conversions

template <int N>
struct Floats {
  float at[N];
};

__device__ __forceinline__ float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

__device__ __forceinline__ uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(uint32_t, x);
#endif
}

__device__ __forceinline__ float float_of_float16(uint32_t bits) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
#else
  return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(bits)));
#endif
}

// Two 16-bit values, rounded to nearest, the first in the low 16 bits.
__device__ __forceinline__ uint32_t float16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const auto bits = [](float x) -> uint32_t {
    return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
  };
  return bits(low) | bits(high) << 16;
#endif
}

// The high halves of two words, that of `low` first.
__device__ __forceinline__ uint32_t high_halves(uint32_t low, uint32_t high) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, 0x7632);
#else
  return low >> 16 | (high & 0xFFFF0000u);
#endif
}

__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
#ifdef __CUDA_ARCH__  // the same result as below, except for the payload of a NaN
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return high_halves(bfloat16_nearest(bits_of(low)), bfloat16_nearest(bits_of(high)));
#endif
}

template <int N>
__device__ __forceinline__ Floats<N> widen(Dtype dtype, const Raw<N>& raw) {
  Floats<N> x;
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int n = 0; n < N; ++n) x.at[n] = float_of(raw.word[n]);
  } else if (dtype == Dtype::kBFloat16) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x.at[n] = float_of(n % 2 == 0 ? raw.word[n / 2] << 16 : raw.word[n / 2] & 0xFFFF0000u);
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) x.at[n] = float_of_float16(raw.word[n / 2] >> (n % 2 * 16));
  }
  return x;
}

template <int N>
__device__ __forceinline__ Raw<N> narrow(Dtype dtype, const Floats<N>& x) {
  Raw<N> raw;
  const auto high = [&](int n) { return n + 1 < N ? x.at[(n + 1) % N] : 0.0f; };
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int n = 0; n < N; ++n) raw.word[n] = bits_of(x.at[n]);
  } else if (dtype == Dtype::kBFloat16) {
#pragma unroll
    for (int n = 0; n < N; n += 2) raw.word[n / 2] = bfloat16_pair(x.at[n], high(n));
  } else {
#pragma unroll
    for (int n = 0; n < N; n += 2) raw.word[n / 2] = float16_pair(x.at[n], high(n));
  }
  return raw;
}

__device__ __forceinline__ void random_block(const PhiloxKey& key, uint64_t block, uint32_t out[4]) {
  philox(key, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), out);
}

// The random 16 bits of elements i .. i + 7, of which the first `lead` = i % 8 of the block of i are not.
__device__ __forceinline__ void random_across_blocks(const PhiloxKey& key, int64_t i, int lead,
                                                     uint32_t out[4]) {
  uint32_t word[8];
  const auto block = static_cast<uint64_t>(i) / 8;
  random_block(key, block, word);
  random_block(key, block + 1, word + 4);
  if (lead & 4) {
#pragma unroll
    for (int j = 0; j < 6; ++j) word[j] = word[j + 2];
  }
  if (lead & 2) {
#pragma unroll
    for (int j = 0; j < 5; ++j) word[j] = word[j + 1];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = lead & 1 ? word[j] >> 16 | word[j + 1] << 16 : word[j];
}

// bfloat16, rounded with the random 16 bits of elements i .. i + N - 1. one_block: they are in one block of
// Philox, as one is.
template <int N>
__device__ __forceinline__ Raw<N> narrow_stochastic(const Floats<N>& x, const PhiloxKey& key, int64_t i,
                                                    bool one_block = true) {
  uint32_t random[4];
  if (N == 8 && !one_block) {
    random_across_blocks(key, i, static_cast<int>(i % 8), random);
  } else {
    random_block(key, static_cast<uint64_t>(i) / 8, random);
  }
  Raw<N> raw;
  if constexpr (N == 1) {
    const int lane = static_cast<int>(i % 8);
    const uint32_t first = lane < 2 ? random[0] : random[1], last = lane < 6 ? random[2] : random[3];
    const uint32_t random16 = (lane < 4 ? first : last) >> (lane % 2 * 16) & 0xFFFFu;
    raw.word[0] = bfloat16_stochastic(bits_of(x.at[0]), random16) >> 16;
  } else {
    const auto round = [&](auto rounded) {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        const uint32_t low = rounded(bits_of(x.at[n]), random[n / 2] & 0xFFFFu);
        raw.word[n / 2] = high_halves(low, rounded(bits_of(x.at[n + 1]), random[n / 2] >> 16));
      }
    };
    bool special = false;
#pragma unroll
    for (int n = 0; n < N; ++n) special |= (bits_of(x.at[n]) & 0x7FFFFFFFu) >= kBFloat16Top;
    if (special) {
      round([](uint32_t bits, uint32_t random16) { return bfloat16_stochastic(bits, random16); });
    } else {
      round([](uint32_t bits, uint32_t random16) { return bfloat16_stochastic_finite(bits, random16); });
    }
  }
  return raw;
}

}  // namespace
}  // namespace quantopt

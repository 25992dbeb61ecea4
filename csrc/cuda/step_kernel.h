// The kernels of the fused step. The arithmetic is that of csrc/core, compiled without contraction into fused
// multiply-add (setup.py), so that the result is that of the CPU kernels bit for bit. A thread reads and
// writes 16 bytes at a time where pointers and scales allow it; the rest goes element by element.
//
// Included by one step_<rule>.cu per rule, so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/askew.h"
#include "core/base.h"
#include "core/rounding.h"
#include "core/simple.h"
#include "core/stam.h"
#include "cuda/step_launch.h"

namespace quantopt {
namespace {

// ---- numbers in memory and in registers

// N elements as they lie in memory: N words of float32, or the first N / 2 words of a 16-bit type.
template <int N>
struct Raw {
  uint32_t word[N];
};

struct alignas(16) Quad {
  uint32_t word[4];
};

__device__ __forceinline__ void store_quad(void* p, const Quad& q) {
#ifdef __CUDA_ARCH__  // said outright: the compiler splits the store where the elements' divisions branch
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
__device__ __forceinline__ Raw<N> load_raw(Dtype dtype, const void* p, int64_t i, bool whole, int count) {
  Raw<N> raw;
  if (dtype == Dtype::kFloat32) {
    const auto* from = static_cast<const uint32_t*>(p) + i;
    if constexpr (N >= 4) {
      if (whole) {
        load_words(from, raw, N);
        return raw;
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) raw.word[n] = n < count ? from[n] : 0u;
  } else {
    const auto* from = static_cast<const uint16_t*>(p) + i;
    if constexpr (N >= 8) {
      if (whole) {
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
__device__ __forceinline__ void store_raw(Dtype dtype, const Raw<N>& raw, void* p, int64_t i, bool whole,
                                          int count) {
  if (dtype == Dtype::kFloat32) {
    auto* to = static_cast<uint32_t*>(p) + i;
    if constexpr (N >= 4) {
      if (whole) return store_words(to, raw, N);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n < count) to[n] = raw.word[n];
    }
  } else {
    auto* to = static_cast<uint16_t*>(p) + i;
    if constexpr (N >= 8) {
      if (whole) return store_words(to, raw, N / 2);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n < count) to[n] = static_cast<uint16_t>(raw.word[n / 2] >> (n % 2 * 16));
    }
  }
}

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

__device__ __forceinline__ float float_of_float16(uint32_t half) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(half)));
  return x;
#else
  return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(half)));
#endif
}

// Two 16-bit numbers to nearest, the first in the low half.
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

__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
#ifdef __CUDA_ARCH__  // but for the bits of a NaN the same
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return bfloat16_nearest(bits_of(low)) | bfloat16_nearest(bits_of(high)) << 16;
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

// bfloat16, rounded by the random halves of elements i .. i + N - 1, which lie in one block of Philox.
template <int N>
__device__ __forceinline__ Raw<N> narrow_stochastic(const Floats<N>& x, const PhiloxKey& key, int64_t i) {
  const auto block = static_cast<uint64_t>(i) / 8;
  uint32_t random[4];
  philox<uint32_t>(key, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), random);
  Raw<N> raw;
  if constexpr (N == 1) {
    const int lane = static_cast<int>(i % 8);
    const uint32_t first = lane < 2 ? random[0] : random[1], last = lane < 6 ? random[2] : random[3];
    raw.word[0] =
        bfloat16_stochastic(bits_of(x.at[0]), (lane < 4 ? first : last) >> (lane % 2 * 16) & 0xFFFFu);
  } else {
    const auto round = [&](auto rounded) {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        const uint32_t low = rounded(bits_of(x.at[n]), random[n / 2] & 0xFFFFu);
        raw.word[n / 2] = low | rounded(bits_of(x.at[n + 1]), random[n / 2] >> 16) << 16;
      }
    };
    bool special = false;
#pragma unroll
    for (int n = 0; n < N; ++n) special |= (bits_of(x.at[n]) & 0x7FFFFFFFu) >= kBFloat16Top;
    if (special) {
      round([](uint32_t bits, uint32_t half) { return bfloat16_stochastic(bits, half); });
    } else {
      round([](uint32_t bits, uint32_t half) { return bfloat16_stochastic_finite(bits, half); });
    }
  }
  return raw;
}

// ---- rules: the constants are the same for all tensors, the grid follows from the scale

struct Levels {
  float scale, before;
  float limit;  // bound of the latent
};

struct MakeBase {
  static constexpr bool kScaled = false;
  using Constants = BaseStep;
  using Rule = BaseStep;
  QUANTOPT_HOST_DEVICE static Constants constants(const Hyper& h, bool decoupled) {
    return make_base_step(h, decoupled);
  }
  template <class R>
  __device__ __forceinline__ static R rule(const Constants& c, const StepParams&, const Levels&) {
    return c;
  }
};

template <bool Binary>
struct MakeProx {
  static constexpr bool kScaled = true;
  struct Constants {
    BaseStep base;
    float threshold;
  };
  using Rule = ProxStep<Binary>;
  QUANTOPT_HOST_DEVICE static Constants constants(const Hyper& h, bool decoupled) {
    return {make_base_step(h, decoupled), static_cast<float>(h.threshold)};
  }
  template <class R>
  __device__ __forceinline__ static R rule(const Constants& c, const StepParams& p, const Levels& levels) {
    return {c.base, c.threshold, make_grid(levels.scale, p.level_factor, p.levels)};
  }
};

template <class AskewRule>
struct MakeAskew {
  static constexpr bool kScaled = true;
  using Constants = AskewConstants;
  using Rule = AskewRule;
  QUANTOPT_HOST_DEVICE static Constants constants(const Hyper& h, bool decoupled) {
    return make_askew_constants(h, decoupled || Rule::kLatent);
  }
  template <class R>
  __device__ __forceinline__ static R rule(const Constants& c, const StepParams& p, const Levels& levels) {
    return {c, make_grid(levels.scale, p.level_factor, p.levels)};
  }
};

template <bool Binary>
struct MakeMemory : MakeAskew<AskewMemory<Binary, true>> {
  using RuleOfInfiniteRate = AskewMemory<Binary, false>;
};

template <bool Binary>
struct MakeSplitting {
  static constexpr bool kScaled = true;
  using Constants = StamConstants;
  using Rule = StamSplitting<Binary>;
  QUANTOPT_HOST_DEVICE static Constants constants(const Hyper& h, bool) {
    return make_stam_constants(h, true);
  }
  template <class R>
  __device__ __forceinline__ static R rule(const Constants& c, const StepParams& p, const Levels& levels) {
    return {c, make_grid(levels.before, p.level_factor, p.levels),
            make_grid(levels.scale, p.level_factor, p.levels)};
  }
};

template <bool Binary>
struct MakeAlternating {
  static constexpr bool kScaled = true;
  using Constants = StamConstants;
  using Rule = StamAlternating<Binary>;
  QUANTOPT_HOST_DEVICE static Constants constants(const Hyper& h, bool) {
    return make_stam_constants(h, false);
  }
  template <class R>
  __device__ __forceinline__ static R rule(const Constants& c, const StepParams& p, const Levels& levels) {
    return {c, make_grid(levels.before, p.level_factor, p.levels),
            make_grid(levels.scale, p.level_factor, p.levels), levels.limit};
  }
};

// ---- the base direction

struct SgdDirection {  // with momentum or without
  static constexpr bool kSecond = false;
  MomentumDirection with_momentum;
  static __device__ __forceinline__ SgdDirection make(const Hyper& h, bool nesterov, const float*) {
    return {{static_cast<float>(h.momentum), nesterov}};
  }
  __device__ __forceinline__ float operator()(float g, float& m, float& v, bool has_momentum) const {
    const float d = with_momentum(g, m, v);
    return has_momentum ? d : g;
  }
};

struct AdamStep {
  static constexpr bool kSecond = true;
  AdamDirection adam;
  static __device__ __forceinline__ AdamStep make(const Hyper& h, bool, const float* step) {
    return {make_adam_direction(h, static_cast<double>(*step))};
  }
  __device__ __forceinline__ float operator()(float g, float& m, float& v, bool) const {
    return adam(g, m, v);
  }
};

// ---- what a block needs to know

template <class Maker, class Direction>
struct Known {
  typename Maker::Constants constants;
  Direction direction;
};

// The powers of Adam are costly, and the numbers may lie on the device: one thread computes for the block.
template <class Maker, class Direction>
__device__ __forceinline__ Known<Maker, Direction> know(const StepParams& params,
                                                        const typename Maker::Constants& constants,
                                                        const StepTensor& t) {
  if (!Direction::kSecond && params.device_hyper == nullptr) {
    return {constants, Direction::make(params.hyper, params.nesterov, nullptr)};
  }
  __shared__ Known<Maker, Direction> known;
  if (threadIdx.x == 0) {
    const Hyper h = params.device_hyper != nullptr ? *params.device_hyper : params.hyper;
    known = {Maker::constants(h, params.decoupled), Direction::make(h, params.nesterov, t.step)};
  }
  __syncthreads();
  return known;
}

__device__ __forceinline__ bool skipped(const StepParams& params) {
  return params.found_inf != nullptr && *params.found_inf != 0.0f;
}

__device__ __forceinline__ float gradient_factor(const StepParams& params) {
  return params.grad_scale != nullptr ? params.gradient_factor / *params.grad_scale : params.gradient_factor;
}

// The tensor of this block: the last whose first block is not after it.
__device__ __forceinline__ int tensor_of_block(const StepTable& table) {
  int at = 0, end = table.count;
  while (end - at > 1) {
    const int middle = (at + end) / 2;
    (table.first_block[middle] <= blockIdx.x ? at : end) = middle;
  }
  return at;
}

template <Storage S>
__device__ __forceinline__ Dtype param_type(const StepParams& params) {
  return S == Storage::kFloat32 ? Dtype::kFloat32 : is_bfloat16(S) ? Dtype::kBFloat16 : params.param_dtype;
}

template <Storage S>
__device__ __forceinline__ Dtype momentum_type(const StepParams& params) {
  return S == Storage::kAny        ? params.momentum_dtype
         : S == Storage::kBFloat16 ? Dtype::kBFloat16
                                   : Dtype::kFloat32;
}

// The index of the scale of element i: scales start anew at every row.
__device__ __forceinline__ int64_t scale_index(const StepTensor& t, int64_t i) {
  if (t.numel <= INT32_MAX) {  // 64-bit division takes several times as long
    const auto element = static_cast<uint32_t>(i), length = static_cast<uint32_t>(t.row);
    const uint32_t row = element / length;
    return row * t.scales_per_row + (element - row * length) / static_cast<uint32_t>(t.group);
  }
  const int64_t row = i / t.row;
  return row * t.scales_per_row + (i - row * t.row) / t.group;
}

template <class Maker, class R>
__device__ __forceinline__ R rule_at(const typename Maker::Constants& constants, const StepParams& params,
                                     const StepTensor& t, int64_t scale, int64_t element) {
  Levels levels{1.0f, 1.0f, INFINITY};
  if constexpr (Maker::kScaled) levels.scale = t.scale[scale];
  if constexpr (R::kLatent) {
    levels.before = t.before[scale];
    if (t.sigma != nullptr) {
      levels.limit = static_cast<float>(constants.bound) * t.sigma[element / t.sigma_row];
    }
  }
  return Maker::template rule<R>(constants, params, levels);
}

// ---- N elements of one tensor

template <int N>
struct Elements {
  Raw<N> param, grad, momentum, second, latent;
};

// With the constants of a block: R the rule, D the direction, S the storage.
template <class R, class D, Storage S>
struct Stepper {
  const StepParams& params;
  const StepTensor& t;
  D direction;
  float factor;
  PhiloxKey key;

  __device__ __forceinline__ bool has_latent() const {  // its own, or master weights
    return R::kLatent || (S == Storage::kAny && t.latent != nullptr);
  }

  template <int N>
  __device__ __forceinline__ Elements<N> load(int64_t i, bool whole, int count) const {
    Elements<N> e;
    e.grad = load_raw<N>(param_type<S>(params), t.grad, i, whole, count);
    if (R::kReadsWeight || !has_latent()) {
      e.param = load_raw<N>(param_type<S>(params), t.param, i, whole, count);
    }
    if (has_latent()) e.latent = load_raw<N>(Dtype::kFloat32, t.latent, i, whole, count);
    if (D::kSecond || t.momentum != nullptr) {
      e.momentum = load_raw<N>(momentum_type<S>(params), t.momentum, i, whole, count);
    }
    if constexpr (D::kSecond) e.second = load_raw<N>(Dtype::kFloat32, t.second, i, whole, count);
    return e;
  }

  template <int N>
  __device__ __forceinline__ Floats<N> weights(const Elements<N>& e) const {
    return has_latent() ? widen(Dtype::kFloat32, e.latent) : widen(param_type<S>(params), e.param);
  }

  // The direction d, with the new momentum and second in the elements.
  template <int N>
  __device__ __forceinline__ Floats<N> directions(const R& rule, Elements<N>& e, const Floats<N>& w) const {
    const bool has_momentum = D::kSecond || t.momentum != nullptr;
    const Floats<N> g = widen(param_type<S>(params), e.grad);
    Floats<N> m{}, v{}, d;
    if (has_momentum) m = widen(momentum_type<S>(params), e.momentum);
    if constexpr (D::kSecond) v = widen(Dtype::kFloat32, e.second);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      d.at[n] = direction(rule.gradient(g.at[n] * factor, w.at[n]), m.at[n], v.at[n], has_momentum);
    }
    if (has_momentum) e.momentum = narrow(momentum_type<S>(params), m);
    if constexpr (D::kSecond) e.second = narrow(Dtype::kFloat32, v);
    return d;
  }

  // The step of the weights w by d, and everything written.
  template <int N>
  __device__ __forceinline__ void finish(const R& rule, const Elements<N>& e, const Floats<N>& w,
                                         const Floats<N>& d, int64_t i, bool whole, int count) const {
    Floats<N> weight, before{};
    Floats<N> next;
    if constexpr (R::kReadsWeight) before = widen(param_type<S>(params), e.param);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      next.at[n] = rule.step(w.at[n], d.at[n]);
      if constexpr (R::kLatent) {
        weight.at[n] = rule.weight(next.at[n], before.at[n]);
      } else {
        weight.at[n] = next.at[n];
      }
    }
    if (D::kSecond || t.momentum != nullptr) {
      store_raw(momentum_type<S>(params), e.momentum, t.momentum, i, whole, count);
    }
    if constexpr (D::kSecond) store_raw(Dtype::kFloat32, e.second, t.second, i, whole, count);
    if (has_latent()) {
      store_raw(Dtype::kFloat32, narrow(Dtype::kFloat32, next), t.latent, i, whole, count);
    }
    Raw<N> out;
    if (is_bfloat16(S) && params.stochastic_rounding) {
      out = narrow_stochastic(weight, key, i);
    } else {
      out = narrow(param_type<S>(params), weight);
    }
    store_raw(param_type<S>(params), out, t.param, i, whole, count);
  }

  template <int N>
  __device__ __forceinline__ void step(const R& rule, Elements<N>& e, int64_t i) const {
    const Floats<N> w = weights(e);
    const Floats<N> d = directions(rule, e, w);
    finish(rule, e, w, d, i, true, N);
  }
};

template <class R, class D, Storage S>
__device__ __forceinline__ Stepper<R, D, S> make_stepper(const StepParams& params, const StepTensor& t,
                                                         const D& direction) {
  PhiloxKey key{params.seed_low, params.seed_high, 0, t.index};
  if (is_bfloat16(S) && params.stochastic_rounding) key.step = static_cast<uint32_t>(*t.step);
  return {params, t, direction, gradient_factor(params), key};
}

// ---- one block per chunk, with the levels as they are

template <class Maker, class R, Storage S, class D>
__device__ __forceinline__ void step_chunk(const StepParams& params, const StepTensor& t, int64_t begin,
                                           const Known<Maker, D>& known) {
  constexpr int kVector = vector_of(S);
  // Vectors that are loaded before one is stepped: two where that are at most three arrays of float32.
  constexpr int kInFlight = S == Storage::kFloat32 && !R::kReadsWeight && !D::kSecond ? 2 : 1;
  constexpr int64_t kStride = kThreads * kVector;
  const auto stepper = make_stepper<R, D, S>(params, t, known.direction);
  const int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
  const auto rule_of = [&](int64_t i) {
    return rule_at<Maker, R>(known.constants, params, t, Maker::kScaled ? scale_index(t, i) : 0, i);
  };
  int64_t tail = begin;  // elements from here on go one by one
  if (t.access != Access::kElements) {
    tail = end - end % kVector;
    R rule = rule_at<Maker, R>(known.constants, params, t, 0, 0);
#pragma unroll 1
    for (int64_t i = begin + threadIdx.x * kVector; i < tail; i += kInFlight * kStride) {
      Elements<kVector> e[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (i + k * kStride < tail) e[k] = stepper.template load<kVector>(i + k * kStride, true, kVector);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int64_t at = i + k * kStride;
        if (at < tail) {
          if (Maker::kScaled && t.access == Access::kScalePerVector) rule = rule_of(at);
          stepper.step(rule, e[k], at);
        }
      }
    }
  }
#pragma unroll 1
  for (int64_t i = tail + threadIdx.x; i < end; i += kThreads) {
    Elements<1> e = stepper.template load<1>(i, true, 1);
    stepper.step(rule_of(i), e, i);
  }
}

template <class Maker, class D, Storage S>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(S, D::kSecond))
    step_kernel(const __grid_constant__ StepTable table, const __grid_constant__ StepParams params,
                const __grid_constant__ typename Maker::Constants constants) {
  if (skipped(params)) return;
  const int at = tensor_of_block(table);
  const StepTensor& t = table.tensors[at];
  const auto known = know<Maker, D>(params, constants, t);
  const int64_t begin = (blockIdx.x - table.first_block[at]) * kChunk;
  if constexpr (Maker::Rule::kReadsWeight) {
    if (known.constants.rate > FLT_MAX) {
      return step_chunk<Maker, typename Maker::RuleOfInfiniteRate, S>(params, t, begin, known);
    }
  }
  step_chunk<Maker, typename Maker::Rule, S>(params, t, begin, known);
}

// ---- moving levels

// Sum over the 32 threads of a warp, or over the block, the same in each of them and in every run.
__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
  return x;
}

__device__ __forceinline__ double sum_of_block(double x) {
  __shared__ double parts[kThreads / 32];
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += parts[i];
  return total;
}

// Rows that a warp or a block holds in registers: the mean of |point| becomes the level, then the step.
template <class Maker, Storage S>
__global__ void __launch_bounds__(kThreads, 2)
    row_kernel(const __grid_constant__ StepTable table, const __grid_constant__ StepParams params,
               const __grid_constant__ typename Maker::Constants constants) {
  using R = typename Maker::Rule;
  constexpr int kVector = vector_of(S);
  constexpr int kVectors = static_cast<int>(kRowPerThread) / kVector;
  if (skipped(params)) return;
  const int at = tensor_of_block(table);
  const StepTensor& t = table.tensors[at];
  const auto known = know<Maker, SgdDirection>(params, constants, t);
  const auto stepper = make_stepper<R, SgdDirection, S>(params, t, known.direction);

  const bool by_warp = t.row <= kWarpRow;
  const int team = by_warp ? 32 : kThreads;
  const int lane = static_cast<int>(threadIdx.x) % team;
  const int64_t row = static_cast<int64_t>(blockIdx.x - table.first_block[at]) * (kThreads / team) +
                      static_cast<int>(threadIdx.x) / team;
  const int64_t start = row * t.row;
  if (start >= t.numel) return;  // a whole warp; the block has no barrier then

  const bool vectors = t.access != Access::kElements;
  const auto count_of = [&](int k) {  // elements of vector k of this thread
    const auto first = static_cast<int64_t>(lane + k * team) * kVector;
    const int64_t left = t.row - first;
    return static_cast<int>(left < 0 ? 0 : left < kVector ? left : kVector);
  };
  const auto element_of = [&](int k) { return start + static_cast<int64_t>(lane + k * team) * kVector; };

  Elements<kVector> e[kVectors];
  Floats<kVector> w[kVectors], d[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int count = count_of(k);
    if (count > 0) e[k] = stepper.template load<kVector>(element_of(k), vectors && count == kVector, count);
  }
  const R rule_before = rule_at<Maker, R>(known.constants, params, t, row, start);
  float part = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int count = count_of(k);
    if (count > 0) {
      w[k] = stepper.weights(e[k]);
      d[k] = stepper.directions(rule_before, e[k], w[k]);
#pragma unroll
      for (int n = 0; n < kVector; ++n) {
        if (n < count) part += absolute(rule_before.point(w[k].at[n], d[k].at[n]));
      }
    }
  }
  const double sum = by_warp ? sum_of_warp(part) : sum_of_block(part);
  const auto scale = static_cast<float>(sum / static_cast<double>(t.row));
  R rule = rule_before;
  rule.grid = make_grid(scale, params.level_factor, params.levels);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int count = count_of(k);
    if (count > 0) {
      stepper.finish(rule, e[k], w[k], d[k], element_of(k), vectors && count == kVector, count);
    }
  }
  if (lane == 0) t.scale[row] = scale;
}

// Longer rows: the sum of |point| over a chunk of a row, changing nothing. finish_kernel makes the level of
// the sums, step_kernel the step.
template <class Maker>
__global__ void __launch_bounds__(kThreads, 2)
    magnitude_kernel(const __grid_constant__ StepTable table, const __grid_constant__ StepParams params,
                     const __grid_constant__ typename Maker::Constants constants) {
  using R = typename Maker::Rule;
  constexpr Storage S = Storage::kAny;
  constexpr int kVector = vector_of(S);
  if (skipped(params)) return;
  const int at = tensor_of_block(table);
  const StepTensor& t = table.tensors[at];
  const auto known = know<Maker, SgdDirection>(params, constants, t);
  const auto stepper = make_stepper<R, SgdDirection, S>(params, t, known.direction);
  const int64_t block = blockIdx.x - table.first_block[at], chunks = (t.row + kChunk - 1) / kChunk;
  const int64_t row = block / chunks;
  const int64_t begin = row * t.row + (block - row * chunks) * kChunk;
  const int64_t row_end = (row + 1) * t.row, end = begin + kChunk < row_end ? begin + kChunk : row_end;
  const R rule = rule_at<Maker, R>(known.constants, params, t, row, begin);
  float part = 0.0f;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x * kVector; i < end; i += kThreads * kVector) {
    const int count = end - i < kVector ? static_cast<int>(end - i) : kVector;
    auto e = stepper.template load<kVector>(i, t.access != Access::kElements && count == kVector, count);
    const Floats<kVector> w = stepper.weights(e);
    const Floats<kVector> d = stepper.directions(rule, e, w);
#pragma unroll
    for (int n = 0; n < kVector; ++n) {
      if (n < count) part += absolute(rule.point(w.at[n], d.at[n]));
    }
  }
  const double sum = sum_of_block(part);
  if (threadIdx.x == 0) t.partial[block] = sum;
}

// ---- launching

template <class Maker, class D>
cudaError_t launch_steps(const StepLaunch& s) {
  const auto constants = Maker::constants(s.params.hyper, s.params.decoupled);
  const unsigned blocks = s.table.first_block[s.table.count];
  const auto with = [&](auto* kernel) {
    return launch(kernel, blocks, s.stream, s.table, s.params, constants);
  };
  switch (s.storage) {
    case Storage::kFloat32: return with(step_kernel<Maker, D, Storage::kFloat32>);
    case Storage::kBFloat16:
      if constexpr (!Maker::Rule::kLatent) return with(step_kernel<Maker, D, Storage::kBFloat16>);
      break;
    case Storage::kBFloat16Wide:
      if constexpr (!Maker::Rule::kLatent) return with(step_kernel<Maker, D, Storage::kBFloat16Wide>);
      break;
    case Storage::kAny: break;
  }
  return with(step_kernel<Maker, D, Storage::kAny>);
}

template <class Maker>
cudaError_t launch_sgd_or_adam(const StepLaunch& s) {
  return s.adam ? launch_steps<Maker, AdamStep>(s) : launch_steps<Maker, SgdDirection>(s);
}

template <class Maker>
cudaError_t launch_moving(const StepLaunch& s) {
  const auto constants = Maker::constants(s.params.hyper, s.params.decoupled);
  const unsigned blocks = s.table.first_block[s.table.count];
  const auto with = [&](auto* kernel) {
    return launch(kernel, blocks, s.stream, s.table, s.params, constants);
  };
  switch (s.phase) {
    case Phase::kStep: return launch_steps<Maker, SgdDirection>(s);
    case Phase::kMagnitude: return with(magnitude_kernel<Maker>);
    default:
      return s.storage == Storage::kFloat32 ? with(row_kernel<Maker, Storage::kFloat32>)
                                            : with(row_kernel<Maker, Storage::kAny>);
  }
}

}  // namespace
}  // namespace quantopt

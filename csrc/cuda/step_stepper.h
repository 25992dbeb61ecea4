// The fused step of N elements of one tensor on the device: read, base direction, rule, write.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "core/base.h"
#include "core/rules.h"
#include "cuda/step_launch.h"
#include "cuda/step_memory.h"

namespace quantopt {
namespace {

// ---- the base

// SGD with or without momentum, and "given": a kernel serves all three, as whether there is a momentum buffer
// is the same for all threads.
struct SgdBase {
  static constexpr bool kAdam = false;
  MomentumDirection with_momentum;
  static __device__ __forceinline__ SgdBase make(const Hyper& h, bool nesterov, const float*) {
    return {{static_cast<float>(h.momentum), nesterov}};
  }
  __device__ __forceinline__ float operator()(float g, float& m, float& v, bool has_momentum) const {
    const float d = with_momentum(g, m, v);
    return has_momentum ? d : g;
  }
};

struct AdamBase {
  static constexpr bool kAdam = true;
  AdamDirection adam;
  static __device__ __forceinline__ AdamBase make(const Hyper& h, bool, const float* step) {
    return {make_adam_direction(h, static_cast<double>(*step))};
  }
  __device__ __forceinline__ float operator()(float g, float& m, float& v, bool) const {
    return adam(g, m, v);
  }
};

// ---- constants of a block

__device__ __forceinline__ bool frozen(const Hyper& h) { return h.lr == 0.0; }

template <class Row, class Direction>
struct BlockConstants {
  typename Row::Constants rule;
  Direction direction;
  float bound;  // of the latent, in units of StepTensor::latent_bound
  bool frozen;  // weights, latents and scales stay as they are
};

// `constants` are the launcher's, for hyper-parameters on the host. Adam's powers take long, and the
// hyper-parameters may be on the device: then one thread computes the constants for the block.
template <class Row, class Direction>
__device__ __forceinline__ BlockConstants<Row, Direction> block_constants(
    const StepParams& params, const typename Row::Constants& constants, const StepTensor& t) {
  const auto make = [&](const Hyper& h, const typename Row::Constants& rule) {
    return BlockConstants<Row, Direction>{rule, Direction::make(h, params.nesterov, t.step),
                                          static_cast<float>(h.bound), frozen(h)};
  };
  if (!Direction::kAdam && params.device_hyper == nullptr) return make(params.hyper, constants);
  __shared__ BlockConstants<Row, Direction> shared;
  if (threadIdx.x == 0) {
    const Hyper h = params.device_hyper != nullptr ? *params.device_hyper : params.hyper;
    shared = make(h, Row::constants(h, params.decoupled));
  }
  __syncthreads();
  return shared;
}

__device__ __forceinline__ bool skipped(const StepParams& params) {
  return params.found_inf != nullptr && *params.found_inf != 0.0f;
}

__device__ __forceinline__ float gradient_factor(const StepParams& params) {
  return params.grad_scale != nullptr ? params.gradient_factor / *params.grad_scale : params.gradient_factor;
}

// The tensor of this block: the last one whose first block is at most this block.
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

template <Storage S>
__device__ __forceinline__ Dtype exp_avg_sq_type(const StepParams& params) {
  return S == Storage::kFloat32 ? Dtype::kFloat32 : params.exp_avg_sq_dtype;
}

// Whether the network's weights are not rounded to 16 bits.
template <Storage S>
__device__ __forceinline__ bool is_exact(const StepParams& params) {
  return param_type<S>(params) == Dtype::kFloat32;
}

// ---- the levels of an element

// The index of the scale of element i: the first group of a row begins with the row.
__device__ __forceinline__ int64_t scale_index(const StepTensor& t, int64_t i) {
  if (t.numel <= INT32_MAX) {  // 64-bit division takes several times as long
    const auto element = static_cast<uint32_t>(i), length = static_cast<uint32_t>(t.row);
    const uint32_t row = element / length;
    return row * t.scales_per_row + (element - row * length) / static_cast<uint32_t>(t.group);
  }
  const int64_t row = i / t.row;
  return row * t.scales_per_row + (i - row * t.row) / t.group;
}

template <class Row, class R>
__device__ __forceinline__ SpanLevels levels_at(float bound, const StepParams& params, const StepTensor& t,
                                                int64_t scale, int64_t element) {
  SpanLevels levels{};
  levels.latent_limit = INFINITY;
  if constexpr (Row::kQuantised) {
    levels.grid = make_grid(t.scale[scale], params.level_factor, params.levels);
    levels.before = levels.grid;
  }
  if constexpr (Row::kDynamicScale) {
    levels.before = make_grid(t.previous_scale[scale], params.level_factor, params.levels);
  }
  if constexpr (R::kLatent) {
    if (t.latent_bound != nullptr) {
      levels.latent_limit = bound * t.latent_bound[t.bound_row == 0 ? scale : element / t.bound_row];
    }
  }
  return levels;
}

// The object of the rule for an element: R of Row::visit_object.
template <class Row, class R, class Direction>
__device__ __forceinline__ R rule_at(const BlockConstants<Row, Direction>& constants,
                                     const StepParams& params, const StepTensor& t, int64_t scale,
                                     int64_t element) {
  return Row::template object<R>(constants.rule,
                                 levels_at<Row, R>(constants.bound, params, t, scale, element));
}

// ---- N elements of one tensor

template <int N>
struct Elements {
  Raw<N> param, grad, momentum, latent;
  Raw<N> exp_avg_sq;  // as stored, from Stepper::directions on float32
};

template <class R, class Direction, Storage S>
struct Stepper {
  const StepParams& params;
  const StepTensor& t;
  Direction direction;
  bool frozen;
  float factor;
  PhiloxKey key;

  __device__ __forceinline__ bool has_latent() const {  // of the rule, or master weights
    return R::kLatent || (S == Storage::kAny && t.latent != nullptr);
  }
  __device__ __forceinline__ bool has_momentum() const { return Direction::kAdam || t.momentum != nullptr; }

  template <int N>
  __device__ __forceinline__ Elements<N> load(int64_t i, bool full, int count) const {
    Elements<N> e;
    e.grad = load_raw<N>(param_type<S>(params), t.grad, i, full, count);
    if (R::kReadsWeight || !has_latent()) {
      e.param = load_raw<N>(param_type<S>(params), t.param, i, full, count);
    }
    if (has_latent()) e.latent = load_raw<N>(Dtype::kFloat32, t.latent, i, full, count);
    if (has_momentum()) e.momentum = load_raw<N>(momentum_type<S>(params), t.momentum, i, full, count);
    if constexpr (Direction::kAdam) {
      e.exp_avg_sq = load_raw<N>(exp_avg_sq_type<S>(params), t.exp_avg_sq, i, full, count);
    }
    return e;
  }

  template <int N>
  __device__ __forceinline__ Floats<N> weights(const Elements<N>& e) const {
    return has_latent() ? widen(Dtype::kFloat32, e.latent) : widen(param_type<S>(params), e.param);
  }

  // What the network ran with, where the rule reads it.
  template <int N>
  __device__ __forceinline__ Floats<N> ran_with(const Elements<N>& e) const {
    if constexpr (R::kReadsWeight) return widen(param_type<S>(params), e.param);
    return {};
  }

  // Returns the direction d, and updates momentum and exp_avg_sq in e.
  template <int N>
  __device__ __forceinline__ Floats<N> directions(const R& rule, Elements<N>& e, const Floats<N>& w) const {
    const Floats<N> g = widen(param_type<S>(params), e.grad);
    Floats<N> m{}, v{}, d;
    if (has_momentum()) m = widen(momentum_type<S>(params), e.momentum);
    if constexpr (Direction::kAdam) v = widen(exp_avg_sq_type<S>(params), e.exp_avg_sq);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      d.at[n] = direction(rule.gradient(g.at[n] * factor, w.at[n]), m.at[n], v.at[n], has_momentum());
    }
    if (has_momentum()) e.momentum = narrow(momentum_type<S>(params), m);
    if constexpr (Direction::kAdam) e.exp_avg_sq = narrow(Dtype::kFloat32, v);
    return d;
  }

  // Momentum and exp_avg_sq, which are ready before the scale of a row is: their registers are free then.
  // one_block: as in narrow_stochastic.
  template <int N>
  __device__ __forceinline__ void store_base_state(const Elements<N>& e, int64_t i, bool full, int count,
                                                   bool one_block) const {
    if (has_momentum()) store_raw(momentum_type<S>(params), e.momentum, t.momentum, i, full, count);
    if constexpr (Direction::kAdam) {
      if (exp_avg_sq_type<S>(params) == Dtype::kFloat32) {
        store_raw(Dtype::kFloat32, e.exp_avg_sq, t.exp_avg_sq, i, full, count);
      } else {
        const PhiloxKey of_state{params.state_seed_low, params.state_seed_high, key.step,
                                 t.index + kStateTensor};
        const Raw<N> v = narrow_stochastic(widen(Dtype::kFloat32, e.exp_avg_sq), of_state, i, one_block);
        store_raw(Dtype::kBFloat16, v, t.exp_avg_sq, i, full, count);
      }
    }
  }

  // Steps the weights w by d and stores them with their latents.
  template <int N>
  __device__ __forceinline__ void update_and_store(const R& rule, const Elements<N>& e, const Floats<N>& w,
                                                   const Floats<N>& d, int64_t i, bool full,
                                                   int count) const {
    const Floats<N> before = ran_with(e);
    Floats<N> weight, next;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      next.at[n] = rule.step(w.at[n], d.at[n], before.at[n]);
      if constexpr (R::kLatent) {
        weight.at[n] = rule.weight(next.at[n], before.at[n]);
      } else {
        weight.at[n] = next.at[n];
      }
    }
    if (frozen) return;
    if (has_latent()) {
      store_raw(Dtype::kFloat32, narrow(Dtype::kFloat32, next), t.latent, i, full, count);
    }
    Raw<N> out;
    if (is_bfloat16(S) && params.stochastic_rounding) {
      out = narrow_stochastic(weight, key, i);
    } else {
      out = narrow(param_type<S>(params), weight);
    }
    store_raw(param_type<S>(params), out, t.param, i, full, count);
  }

  template <int N>
  __device__ __forceinline__ void step(const R& rule, Elements<N>& e, int64_t i) const {
    const Floats<N> w = weights(e);
    const Floats<N> d = directions(rule, e, w);
    store_base_state(e, i, true, N, true);
    update_and_store(rule, e, w, d, i, true, N);
  }
};

template <class R, Storage S, class Direction>
__device__ __forceinline__ Stepper<R, Direction, S> make_stepper(const StepParams& params,
                                                                 const StepTensor& t,
                                                                 const Direction& direction, bool frozen) {
  PhiloxKey key{params.seed_low, params.seed_high, 0, t.index};
  const bool draws = (is_bfloat16(S) && params.stochastic_rounding) ||
                     (Direction::kAdam && exp_avg_sq_type<S>(params) == Dtype::kBFloat16);
  if (draws) key.step = static_cast<uint32_t>(*t.step);
  return {params, t, direction, frozen, gradient_factor(params), key};
}

}  // namespace
}  // namespace quantopt

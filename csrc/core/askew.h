// AskewSGD (Leconte, Schechtman, Moulines, AISTATS 2023). The constraint of a weight at t is
// h(t) = e - u^2 >= 0 with u = (1 - |t|)(1 + |t|); outside it the velocity along the outward side
// s = sgn(t) must be at least min(k, cap), k(t) = r (u - e/u) / (4 |t|).
// Source: docs/algorithms.md, section 2.
#pragma once

#include <cmath>

#include "host_device.h"
#include "hyper.h"
#include "levels.h"
#include "scalar.h"

namespace quantopt {

struct AskewConstants {
  float lr;
  float decay;         // wd where it is part of the velocity, else 0
  float shrink;        // 1 - lr wd where it acts before the step, else 1
  float epsilon;       // e
  float root_epsilon;  // sqrt(e)
  float t_star;        // sqrt(1 - sqrt(e)): feasible iff |t| >= t_star
  float rate;          // r
  float cap;
  float bound;         // memory: the latent stays in [-bound hi, bound hi]
  bool constrained;    // false at lr = 0 in the gradient form, where alpha = r / lr is undefined
};

// Weight decay of a latent is the same number in both forms; it acts before the step there.
QUANTOPT_HOST_DEVICE AskewConstants make_askew_constants(const Hyper& h, bool decay_before_step) {
  AskewConstants c;
  const double root_epsilon = sqrt(h.epsilon);
  c.lr = static_cast<float>(h.lr);
  c.decay = static_cast<float>(decay_before_step ? 0.0 : h.weight_decay);
  c.shrink = static_cast<float>(decay_before_step ? 1.0 - h.lr * h.weight_decay : 1.0);
  c.epsilon = static_cast<float>(h.epsilon);
  c.root_epsilon = static_cast<float>(root_epsilon);
  c.t_star = static_cast<float>(sqrt(1.0 - root_epsilon));
  c.rate = static_cast<float>(h.rate);
  c.cap = static_cast<float>(h.cap);
  c.bound = static_cast<float>(h.bound);
  c.constrained = h.lr != 0.0;
  return c;
}

template <class F>
QUANTOPT_HOST_DEVICE F askew_u(F t) {
  const F size = absolute(t);
  return (1.0f - size) * (1.0f + size);  // exact to 1e-7; 1 - t*t is not near |t| = 1
}

// min(k(t), cap) in units of t; meaningful where u > sqrt(e). The denominators are clamped: k is
// infinite at t = 0.
template <class F>
QUANTOPT_HOST_DEVICE F restoring_step(F t, F u, const AskewConstants& c) {
  const F safe_u = maximum(u, fill<F>(1e-12f));
  const F quarter = maximum(4.0f * absolute(t), fill<F>(1e-12f));
  return minimum(c.rate * (safe_u - c.epsilon / safe_u) / quarter, fill<F>(c.cap));
}

// The least outward speed: `speed` where the weight is infeasible and has a side, else no bound.
template <class F>
QUANTOPT_HOST_DEVICE F where_infeasible(F speed, F t, F u, const AskewConstants& c) {
  const F bound = u > c.root_epsilon ? speed : fill<F>(-INFINITY);
  return t != 0.0f ? bound : fill<F>(-INFINITY);
}

// constrain = "velocity": the constraint is imposed on the step that is taken.
//   v = -lr (d + wd w);  v = s max(s v, half min(k, cap)) where t != 0 and u > sqrt(e)
//   w <- clamp(w + v, -hi, hi)
template <bool Binary>
struct AskewVelocity {
  static constexpr bool kLatent = false;
  static constexpr bool kReadsWeight = false;

  AskewConstants c;
  Grid grid;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F) const { return g; }

  template <class F>
  QUANTOPT_HOST_DEVICE F step(F w, F d) const {
    w = w * c.shrink;
    const F t = (w - cell_middle<Binary>(w, grid)) / grid.half;
    const F u = askew_u(t);
    const F v = -c.lr * (d + c.decay * w);
    const F side = sign(t);
    const F least = where_infeasible(grid.half * restoring_step(t, u, c), t, u, c);
    return clamp(w + side * maximum(side * v, least), -grid.hi, grid.hi);
  }
};

// constrain = "gradient": the authors' order. With alpha = r / lr the gradient of an infeasible
// weight becomes -K unless -g K > K^2, K = half alpha h / (4 t (t^2 - 1)) clamped to
// half cap / lr; then the base step on it and the clamp to [-hi, hi].
template <bool Binary>
struct AskewGradient {
  static constexpr bool kLatent = false;
  static constexpr bool kReadsWeight = false;

  AskewConstants c;
  Grid grid;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F w) const {
    w = w * c.shrink;
    const F t = (w - cell_middle<Binary>(w, grid)) / grid.half;
    const F u = askew_u(t);
    const F side = sign(t);
    const F least = where_infeasible(grid.half * restoring_step(t, u, c) / c.lr, t, u, c);
    const F outward = -side * maximum(-side * g, least);  // least = |K|
    return c.constrained ? outward : g;
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F step(F w, F d) const {
    w = w * c.shrink;
    return clamp(w - c.lr * (d + c.decay * w), -grid.hi, grid.hi);
  }
};

// memory = True: a latent l moves by the base step and the weight is its projection onto the
// feasible interval, p = mid + half s min(max(|t|, t_star), 1). LimitedSpeed: |t| of the weight grows
// by at most min(k, cap) per step until it is feasible.
template <bool Binary, bool LimitedSpeed>
struct AskewMemory {
  static constexpr bool kLatent = true;
  static constexpr bool kReadsWeight = LimitedSpeed;

  AskewConstants c;
  Grid grid;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F) const { return g; }

  template <class F>
  QUANTOPT_HOST_DEVICE F step(F l, F d) const {
    return clamp(l * c.shrink - c.lr * d, -c.bound * grid.hi, c.bound * grid.hi);
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F weight(F l, F before) const {
    const F mid = cell_middle<Binary>(l, grid);
    const F t = (l - mid) / grid.half;
    F size = clamp(absolute(t), c.t_star, 1.0f);
    if (LimitedSpeed) {
      const F t_before = (before - cell_middle<Binary>(before, grid)) / grid.half;
      const F u = askew_u(t_before);
      const F reach = absolute(t_before) + restoring_step(t_before, u, c);
      const F size_limited = minimum(size, reach);
      size = u > c.root_epsilon ? size_limited : size;
    }
    return mid + sign(t) * (grid.half * size);
  }
};

}  // namespace quantopt

// AskewSGD (Leconte, Schechtman, Moulines, AISTATS 2023). The constraint of a weight at t is
// h(t) = e - u^2 >= 0 with u = (1 - |t|)(1 + |t|); outside it the velocity along the outward side
// s = sgn(t) must be at least min(k, cap), k(t) = r (u - e/u) / (4 |t|). As printed, a weight may also leave
// [-hi, hi]; beyond the outer levels the constraint is e - delta^2 >= 0, delta = |t| - 1, and the velocity
// along -s must be at least min(r (delta^2 - e) / (2 delta), cap); in the middle of a cell it is +cap.
// Source: docs/algorithms.md, section 2.
#pragma once

#include <cfloat>
#include <cmath>

#include "host_device.h"
#include "hyper.h"
#include "levels.h"
#include "scalar.h"

namespace quantopt {

struct AskewConstants {
  float lr;
  float decay;    // wd where it is part of the velocity, else 0
  float shrink;   // 1 - lr wd where it acts before the step, else 1
  bool shrinks;   // shrink != 1
  float epsilon;  // e
  float t_star;   // sqrt(1 - sqrt(e)): feasible iff |t| >= t_star
  float t_end;    // 1 + sqrt(e); as printed, |t| > t_end is not feasible
  float rate;     // r
  float cap;
  float bound;   // memory: the latent stays in [-bound hi, bound hi]
  bool printed;  // without a latent: as printed, no clamp to [-hi, hi]
};

// Weight decay of a latent is the same number in both forms; it acts before the step there.
QUANTOPT_HOST_DEVICE AskewConstants make_askew_constants(const Hyper& h, bool decay_before_step) {
  AskewConstants c;
  c.lr = static_cast<float>(h.lr);
  c.decay = static_cast<float>(decay_before_step ? 0.0 : h.weight_decay);
  c.shrink = static_cast<float>(decay_before_step ? 1.0 - h.lr * h.weight_decay : 1.0);
  c.shrinks = c.shrink != 1.0f;
  c.epsilon = static_cast<float>(h.epsilon);
  c.t_star = static_cast<float>(sqrt(1.0 - sqrt(h.epsilon)));
  c.t_end = static_cast<float>(1.0 + sqrt(h.epsilon));
  c.rate = static_cast<float>(h.rate);
  c.cap = static_cast<float>(h.cap);
  c.bound = static_cast<float>(h.bound);
  c.printed = h.bound > FLT_MAX;
  return c;
}

// The constraint in the weight's own units, with W = |w - mid| = half |t|. This form needs one division, and
// its u = (half - W)(half + W) / half^2 is exact to rounding at the levels, where 1 - t*t is not.
template <bool Binary>
struct Constraint {
  AskewConstants c;
  Grid grid;
  float nearest;                // t_star half: a weight is feasible from this distance on
  float per_half_step_squared;  // 1 / half^2
  float gain;                   // r half^2 / 4
  float longest;                // cap half

  QUANTOPT_HOST_DEVICE Constraint(const AskewConstants& constants, const Grid& levels)
      : c(constants),
        grid(levels),
        nearest(constants.t_star * levels.half_step),
        per_half_step_squared(1.0f / (levels.half_step * levels.half_step)),
        gain(0.25f * constants.rate * levels.half_step * levels.half_step),
        longest(constants.cap * levels.half_step) {}

  // half min(k, cap) for an infeasible weight; infinite k at t = 0 becomes the cap.
  template <class F>
  QUANTOPT_HOST_DEVICE F restoring_step(F distance) const {
    const F u = (grid.half_step - distance) * (grid.half_step + distance) * per_half_step_squared;
    const F k = gain * (u * u - c.epsilon) / (distance * u + 1e-30f);  // no 0 / 0 at rate 0
    return minimum(k, fill<F>(longest));
  }

  // x turned outward and no less than `least` where the weight is infeasible and has a side, t != 0.
  template <class F, class Least>
  QUANTOPT_HOST_DEVICE F at_least(F x, F offset, const Least& least) const {
    const F distance = absolute(offset);
    const auto infeasible = positive_below(distance, nearest);
    if (!any(infeasible)) return x;  // always at e = 1, and mostly where training has moved the weights there
    return turned_by(offset, maximum_where(infeasible, turned_by(offset, x), least(distance)));
  }

  // half min(r (delta^2 - e) / (2 delta), cap) of a weight beyond t_end half.
  template <class F>
  QUANTOPT_HOST_DEVICE F returning_step(F distance) const {
    const F beyond = distance - grid.half_step;                                  // half delta
    const float feasible_squared = c.epsilon * grid.half_step * grid.half_step;  // its largest square
    const F k = 0.5f * c.rate * (beyond * beyond - feasible_squared) / beyond;
    return minimum(k, fill<F>(longest));
  }

  // at_least with what the printed form adds. `in_units` turns steps of the weight into the units of x.
  template <class F, class Units>
  QUANTOPT_HOST_DEVICE F as_printed(F x, F offset, const Units& in_units) const {
    const F distance = absolute(offset);
    x = at_least(x, offset, [&](F from) { return in_units(restoring_step(from)); });
    const auto beyond = fill<F>(c.t_end * grid.half_step) < distance;
    if (any(beyond)) {
      const F inward = -turned_by(offset, x);
      x = -turned_by(offset, maximum_where(beyond, inward, in_units(returning_step(distance))));
    }
    const auto middle = distance == 0.0f;
    if (nearest > 0.0f && any(middle)) {
      const float most = in_units(longest);
      x = select(middle, clamp(x, most, most), x);  // a NaN stays
    }
    return x;
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F offset(F w) const {
    return w - cell_middle<Binary>(w, grid);
  }
};

// constrain = "velocity": the constraint is imposed on the step that is taken.
//   v = -lr (d + wd w);  v = s max(s v, half min(k, cap)) where t != 0 and u > sqrt(e)
//   w <- clamp(w + v, -hi, hi); Printed: w + v
template <bool Binary, bool Printed>
struct AskewVelocity : Constraint<Binary> {
  static constexpr bool kLatent = false;
  static constexpr bool kReadsWeight = false;
  using Constraint<Binary>::Constraint;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F) const {
    return g;
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F step(F w, F d, F) const {
    const AskewConstants& c = this->c;
    if (c.shrinks) w = w * c.shrink;
    const F v = -c.lr * (d + c.decay * w);
    if constexpr (Printed) return w + this->as_printed(v, this->offset(w), [](auto step) { return step; });
    const F taken =
        this->at_least(v, this->offset(w), [this](F distance) { return this->restoring_step(distance); });
    return clamp(w + taken, -this->grid.hi, this->grid.hi);
  }
};

// constrain = "gradient": the authors' order. With alpha = r / lr the gradient of an infeasible
// weight becomes -K unless -g K > K^2, K = half alpha h / (4 t (t^2 - 1)) clamped to
// half cap / lr; then the base step on it and, unless Printed, the clamp to [-hi, hi].
template <bool Binary, bool Printed>
struct AskewGradient : Constraint<Binary> {
  static constexpr bool kLatent = false;
  static constexpr bool kReadsWeight = false;
  using Constraint<Binary>::Constraint;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F w) const {
    if (this->c.lr == 0.0f) return g;  // alpha = r / lr is undefined
    if constexpr (Printed) {
      const auto per_lr = [this](auto step) { return step / this->c.lr; };
      return -this->as_printed(-g, this->offset(w * this->c.shrink), per_lr);
    }
    const auto least = [this](F distance) { return this->restoring_step(distance) / this->c.lr; };  // |K|
    return -this->at_least(-g, this->offset(w * this->c.shrink), least);
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F step(F w, F d, F) const {
    const AskewConstants& c = this->c;
    w = w * c.shrink;
    const F moved = w - c.lr * (d + c.decay * w);
    return Printed ? moved : clamp(moved, -this->grid.hi, this->grid.hi);
  }
};

// memory = True: a latent l moves by the base step and the weight is its projection onto the
// feasible interval, p = mid + half s min(max(|t|, t_star), 1). LimitedSpeed: |t| of the weight grows
// by at most min(k, cap) per step until it is feasible.
template <bool Binary, bool LimitedSpeed>
struct AskewMemory : Constraint<Binary> {
  static constexpr bool kLatent = true;
  static constexpr bool kReadsWeight = LimitedSpeed;
  using Constraint<Binary>::Constraint;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F) const {
    return g;
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F step(F l, F d, F) const {
    const float limit = this->c.bound * this->grid.hi;
    return clamp(l * this->c.shrink - this->c.lr * d, -limit, limit);
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F weight(F l, F before) const {
    const Grid& grid = this->grid;
    const F mid = cell_middle<Binary>(l, grid);
    const F offset = l - mid;
    F distance = clamp(absolute(offset), this->c.t_star * grid.half_step, grid.half_step);
    if (LimitedSpeed) {
      const F distance_before = absolute(this->offset(before));
      const F reached = minimum(distance, distance_before + this->restoring_step(distance_before));
      distance = select(distance_before < this->nearest, reached, distance);
    }
    return mid + sign(offset) * distance;
  }
};

}  // namespace quantopt

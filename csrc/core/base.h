// The base: where the direction d comes from that a rule then constrains.
//   SGD   m <- beta m + g;  d = g + beta m (Nesterov) or m
//   Adam  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  d = (m / c1) / (sqrt(v / c2) + eps)
// with c1 = 1 - b1^k, c2 = 1 - b2^k at the k-th step, computed as d = m / (c1 / sqrt(c2) sqrt(v) + c1 eps):
// divisions and roots are what the step waits for where the caches hold its data.
//   given d = g: the caller has put the direction where the gradient is.
// Source: docs/algorithms.md.
#pragma once

#include <cmath>

#include "host_device.h"
#include "hyper.h"
#include "scalar.h"

namespace quantopt {

// BASES of quantopt/rules.py has the same names in the same order; a test compares them.
enum class Base { kSgd, kAdam, kGiven };
inline constexpr const char* kBaseNames[] = {"sgd", "adam", "given"};

struct MomentumDirection {
  static constexpr bool kExpAvgSq = false;

  float beta;
  bool nesterov;

  template <class F>
  QUANTOPT_HOST_DEVICE F operator()(F g, F& m, F&) const {
    m = beta * m + g;
    const F ahead = g + beta * m;
    return select(nesterov, ahead, m);
  }
};

struct AdamDirection {
  static constexpr bool kExpAvgSq = true;

  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float root_factor;  // c1 / sqrt(c2)
  float root_offset;  // c1 eps

  template <class F>
  QUANTOPT_HOST_DEVICE F operator()(F g, F& m, F& v) const {
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    return m / (root_factor * square_root(v) + root_offset);
  }
};

QUANTOPT_HOST_DEVICE AdamDirection make_adam_direction(const Hyper& h, double step) {
  AdamDirection a;
  a.beta1 = static_cast<float>(h.momentum);
  a.beta2 = static_cast<float>(h.beta2);
  a.one_minus_beta1 = static_cast<float>(1.0 - h.momentum);
  a.one_minus_beta2 = static_cast<float>(1.0 - h.beta2);
  const double correction1 = 1.0 - pow(h.momentum, step), correction2 = 1.0 - pow(h.beta2, step);
  a.root_factor = static_cast<float>(correction1 / sqrt(correction2));
  a.root_offset = static_cast<float>(correction1 * h.adam_eps);
  return a;
}

}  // namespace quantopt

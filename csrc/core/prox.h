// ProxQuant (Bai, Wang, Liberty, ICLR 2019), the L1 proximal step towards the nearest level:
//   p <- w - lr d;  p <- q + sgn(p - q) max(|p - q| - lam_k, 0),  q = project(p)
// Source: docs/algorithms.md, section 4.
#pragma once

#include "base_step.h"
#include "host_device.h"
#include "levels.h"
#include "scalar.h"

namespace quantopt {

struct ProxConstants {
  BaseStep base;
  float threshold;  // lam_k; infinite: the level
};

template <bool Binary>
struct ProxStep {
  static constexpr bool kLatent = false;
  static constexpr bool kReadsWeight = false;

  ProxConstants c;
  Grid grid;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F w) const {
    return c.base.gradient(g, w);
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F step(F w, F d, F before) const {
    const F p = c.base.step(w, d, before);
    const F q = project<Binary>(p, grid);
    if (c.threshold > 3.4e38f) return q;  // also of an infinite p
    const F gap = p - q;
    const F rest = maximum(absolute(gap) - c.threshold, fill<F>(0.0f));
    return q + with_sign_of(rest, gap);
  }
};

}  // namespace quantopt

// The rules without a constraint: the base step itself (bits = 0), and ProxQuant.
#pragma once

#include "host_device.h"
#include "hyper.h"
#include "levels.h"
#include "scalar.h"

namespace quantopt {

// w <- w (1 - lr wd) - lr d (decoupled), or the same with wd w inside the gradient, as torch.optim.
struct BaseStep {
  static constexpr bool kLatent = false;
  static constexpr bool kReadsWeight = false;

  float lr;
  float decay;   // wd of the coupled form, else 0
  float shrink;  // 1 - lr wd of the decoupled form, else 1

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F w) const {
    return g + decay * w;
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F step(F w, F d) const {
    return w * shrink - lr * d;
  }
};

QUANTOPT_HOST_DEVICE BaseStep make_base_step(const Hyper& h, bool decoupled) {
  BaseStep base;
  base.lr = static_cast<float>(h.lr);
  base.decay = static_cast<float>(decoupled ? 0.0 : h.weight_decay);
  base.shrink = static_cast<float>(decoupled ? 1.0 - h.lr * h.weight_decay : 1.0);
  return base;
}

// ProxQuant (Bai, Wang, Liberty, ICLR 2019), the L1 proximal step towards the nearest level:
//   p <- w - lr d;  p <- q + sgn(p - q) max(|p - q| - lam_k, 0),  q = project(p)
template <bool Binary>
struct ProxStep {
  static constexpr bool kLatent = false;
  static constexpr bool kReadsWeight = false;

  BaseStep base;
  float threshold;  // lam_k; infinite: the level
  Grid grid;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F w) const {
    return base.gradient(g, w);
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F step(F w, F d) const {
    const F p = base.step(w, d);
    const F q = project<Binary>(p, grid);
    if (threshold > 3.4e38f) return q;  // also of an infinite p
    const F gap = p - q;
    const F rest = maximum(absolute(gap) - threshold, fill<F>(0.0f));
    return q + with_sign_of(rest, gap);
  }
};

}  // namespace quantopt

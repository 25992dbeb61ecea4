// The step of weights without levels (bits = 0), as torch.optim.
#pragma once

#include "host_device.h"
#include "hyper.h"

namespace quantopt {

// w <- w (1 - lr wd) - lr d (decoupled), or the same with wd w inside the gradient.
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
  QUANTOPT_HOST_DEVICE F step(F w, F d, F) const {
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

}  // namespace quantopt

// STAM, two forms reconstructed from the abstract of Bian, Liu, Zhang (arXiv 2204.11065); also
// BinaryConnect and BinaryRelax, which are the alternating form with a clipped latent.
// kappa is the relaxation weight; kappa = infinity ("hard") is a branch, not a large number.
// Source: docs/algorithms.md, sections 3 and 4.
#pragma once

#include "host_device.h"
#include "hyper.h"
#include "levels.h"
#include "scalar.h"

namespace quantopt {

struct StamConstants {
  float lr;
  float shrink;  // splitting: 1 / (1 + lr wd); alternating: 1 - lr wd
  bool decays;   // wd != 0
  float keep;    // 1 / (1 + kappa): what is left of the distance to the level
  float lam;     // alternating only
  float bound;   // alternating: latent clipped at bound * latent_bound; infinite: not clipped
  bool free;     // kappa = 0
  bool hard;     // kappa = infinity
};

QUANTOPT_HOST_DEVICE StamConstants make_stam_constants(const Hyper& h, bool splitting) {
  StamConstants c;
  const double decay = h.lr * h.weight_decay;
  c.lr = static_cast<float>(h.lr);
  c.shrink = static_cast<float>(splitting ? 1.0 / (1.0 + decay) : 1.0 - decay);
  c.decays = h.weight_decay != 0.0;
  c.keep = static_cast<float>(1.0 / (1.0 + h.kappa));
  c.lam = static_cast<float>(h.lam);
  c.bound = static_cast<float>(h.bound);
  c.free = h.kappa == 0.0;
  c.hard = h.kappa > 3.4e38;
  return c;
}

// (x + kappa level) / (1 + kappa), written so that a level is a fixed point.
template <class F>
QUANTOPT_HOST_DEVICE F relax(F x, F level, const StamConstants& c) {
  if (c.free) return x;
  return c.hard ? level : level + (x - level) * c.keep;
}

// form = "splitting": stochastic three-operator splitting, state x.
//   ex = x - y;  r = y - lr d - ex;  q = project(r);  x <- relax(r, q) + ex
//   the network runs with y = clamp(x / (1 + lr wd), -hi, hi) of the new x.
// The y of a step is what the network ran with, which was made with the lr of the step before: with weight
// decay it is read (and clamped, as the first weights may lie anywhere). Without, it follows from x (`before`
// is the grid that it was clamped with; it differs from `grid` only when the levels move). Weights of 16 bits
// are rounded, and their rounding would add up in ex: their y follows from x too.
template <bool Binary, bool ReadsPoint>
struct StamSplitting {
  static constexpr bool kLatent = true;
  static constexpr bool kReadsWeight = ReadsPoint;

  StamConstants c;
  Grid before;
  Grid grid;

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F) const {
    return g;
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F box(F x, const Grid& levels) const {
    return clamp(x * c.shrink, -levels.hi, levels.hi);
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F differentiated_at(F x, F p) const {
    if constexpr (ReadsPoint) {
      return clamp(p, -before.hi, before.hi);
    } else {
      return box(x, before);
    }
  }
  // Returns r. The mean of |r| over a row is its dynamic scale.
  template <class F>
  QUANTOPT_HOST_DEVICE F point(F x, F d, F p) const {
    const F y = differentiated_at(x, p);
    return y - c.lr * d - (x - y);
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F step(F x, F d, F p) const {
    const F y = differentiated_at(x, p);
    const F ex = x - y;
    const F r = y - c.lr * d - ex;
    return relax(r, project<Binary>(r, grid), c) + ex;
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F weight(F x, F) const {
    return box(x, grid);
  }
};

// form = "alternating", state u:
//   u <- clamp(u (1 - lr wd) - lr d + lr lam (q - u), -limit, limit)
//   p = relax(u, q), q = project(u) on the levels of the new u (binary: a sgn(u), a = mean |u|).
template <bool Binary>
struct StamAlternating {
  static constexpr bool kLatent = true;
  static constexpr bool kReadsWeight = false;

  StamConstants c;
  Grid before;
  Grid grid;
  float limit;  // bound * latent_bound

  template <class F>
  QUANTOPT_HOST_DEVICE F gradient(F g, F) const {
    return g;
  }

  template <class F>
  QUANTOPT_HOST_DEVICE F point(F u, F d, F p) const {
    return step(u, d, p);
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F step(F u, F d, F) const {
    F next = u * c.shrink - c.lr * d;
    if (c.lam != 0.0f) next += c.lr * c.lam * (project<Binary>(u, before) - u);
    return clamp(next, -limit, limit);
  }
  template <class F>
  QUANTOPT_HOST_DEVICE F weight(F u, F) const {
    return relax(u, project<Binary>(u, grid), c);
  }
};

}  // namespace quantopt

// The few functions that the rules are written in. F is float, or on the CPU several floats
// (cpu/kernels/vec.h), of which comparisons give masks and select chooses lane by lane. Comparisons let a NaN
// through, as torch.clamp does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace quantopt {

template <class F>
QUANTOPT_HOST_DEVICE F fill(float x) {
  return F{} + x;
}
template <class Mask, class F>
QUANTOPT_HOST_DEVICE F select(Mask mask, F x, F otherwise) {
  return mask ? x : otherwise;
}
QUANTOPT_HOST_DEVICE bool any(bool mask) { return mask; }
template <class F>
QUANTOPT_HOST_DEVICE F minimum(F x, F bound) {
  return select(x > bound, bound, x);
}
template <class F>
QUANTOPT_HOST_DEVICE F maximum(F x, F bound) {
  return select(x < bound, bound, x);
}
// The maximum where the mask is set, else x.
QUANTOPT_HOST_DEVICE float maximum_where(bool mask, float x, float bound) {
  return mask ? maximum(x, bound) : x;
}
template <class F>
QUANTOPT_HOST_DEVICE F clamp(F x, float lo, float hi) {
  return maximum(minimum(x, fill<F>(hi)), fill<F>(lo));
}
// sgn with sgn(0) = +1; -1 for NaN, whose factor carries it on.
template <class F>
QUANTOPT_HOST_DEVICE F sign(F x) {
  return select(x >= 0.0f, fill<F>(1.0f), fill<F>(-1.0f));
}
// magnitude * sgn(x), and NaN for NaN.
template <class F>
QUANTOPT_HOST_DEVICE F with_sign_of(F magnitude, F x) {
  return select(x >= 0.0f, magnitude, select(x < 0.0f, -magnitude, x));
}

// Whether 0 < x < bound, for x >= 0 or NaN.
QUANTOPT_HOST_DEVICE bool positive_below(float x, float bound) { return x > 0.0f && x < bound; }

QUANTOPT_HOST_DEVICE float absolute(float x) { return fabsf(x); }
// x, or -x where the sign bit of s is set.
QUANTOPT_HOST_DEVICE float turned_by(float s, float x) { return copysignf(1.0f, s) * x; }
QUANTOPT_HOST_DEVICE float round_down(float x) { return floorf(x); }
QUANTOPT_HOST_DEVICE float square_root(float x) { return sqrtf(x); }
// 2^n for a whole n from -127 (gives 0) to 128 (gives infinity), of which `shifted` is n + 1.5 * 2^23.
QUANTOPT_HOST_DEVICE float power_of_two(float shifted) {
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  std::memcpy(&shifted, &bits, sizeof bits);
  return shifted;
}

}  // namespace quantopt

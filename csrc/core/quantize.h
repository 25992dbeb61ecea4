// Symmetric quantisation to 8 bits: s = max|x| / 127, q = x / s rounded half to even, within +-127.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/scalar.h"

namespace quantopt {

// s of a row from its largest magnitude; NaN if that is an infinity or NaN.
QUANTOPT_HOST_DEVICE float quantization_scale(float largest) {
  return largest < INFINITY ? largest / 127.0f : NAN;
}

// q of x; 0 if s is 0 or NaN.
QUANTOPT_HOST_DEVICE float quantized(float x, float s) {
  if (!(s > 0.0f)) return 0.0f;
  return clamp(rintf(x / s), -127.0f, 127.0f);
}

// The same with inverse = 1 / s, without a division but where x / s is close to the middle between two whole
// numbers: x * inverse differs from it by less than 2^-15.
QUANTOPT_HOST_DEVICE float quantized(float x, float s, float inverse) {
  const float quotient = x * inverse, whole = rintf(quotient);
  const bool safe = fabsf(fabsf(quotient - whole) - 0.5f) > 1e-4f;  // not if the inverse is no number
  return safe && s > 0.0f && inverse < INFINITY ? clamp(whole, -127.0f, 127.0f) : quantized(x, s);
}

}  // namespace quantopt

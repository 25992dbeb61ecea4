// Symmetric quantisation to 8 bits: s = max|x| / 127, q = x / s rounded half to even, within +-127. A row of
// zeros has s = 0 and q = 0, one with an infinity or NaN s = NaN and q = 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/scalar.h"

namespace quantopt {

// max|x|; an infinity or NaN if there is one. As integers, magnitudes order like floats, and those come last.
QUANTOPT_HOST_DEVICE float largest_magnitude(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t k = 0; k < count; ++k) {
    uint32_t size;
    std::memcpy(&size, x + k, sizeof size);
    size &= 0x7FFFFFFFu;
    most = size > most ? size : most;
  }
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  return largest;
}

// s of a row from its largest magnitude; NaN if that is an infinity or NaN.
QUANTOPT_HOST_DEVICE float quantization_scale(float largest) {
  return largest < INFINITY ? largest / 127.0f : NAN;
}

// q of x; 0 if s is 0 or NaN.
QUANTOPT_HOST_DEVICE float quantized(float x, float s) {
  if (!(s > 0.0f)) return 0.0f;
  return clamp(rintf(x / s), -127.0f, 127.0f);
}

// Whether x / s may round otherwise than quotient = x * (1 / s), which differs from it by less than 2^-15,
// does to `whole`: close to the middle between two whole numbers, or if the reciprocal is no number.
QUANTOPT_HOST_DEVICE bool near_tie(float quotient, float whole) {
  return !(fabsf(fabsf(quotient - whole) - 0.5f) > 1e-4f);
}

// The same with inverse = 1 / s, without a division but near ties.
QUANTOPT_HOST_DEVICE float quantized(float x, float s, float inverse) {
  const float quotient = x * inverse, whole = rintf(quotient);
  return s > 0.0f && !near_tie(quotient, whole) ? clamp(whole, -127.0f, 127.0f) : quantized(x, s);
}

}  // namespace quantopt

// Rounding of float to bfloat16, to nearest and stochastic. U is uint32_t, or a vector of them: the bits of
// floats. A result is the high half of its word; the low half may be anything.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace quantopt {

// To nearest even.
template <class U>
QUANTOPT_HOST_DEVICE U bfloat16_nearest(U bits) {
  const U rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? U{} + 0x7FC00000u : rounded;
}

// Magnitudes from the largest of bfloat16 on: only these can round to infinity, or are infinite or NaN.
inline constexpr uint32_t kBFloat16Top = 0x7F7F0000u;

// Up with the probability of the fraction that is cut off, by 16 random bits. Of a magnitude below
// kBFloat16Top.
template <class U>
QUANTOPT_HOST_DEVICE U bfloat16_stochastic_finite(U bits, U random16) {
  return bits + random16;
}

// Never rounds a finite value to infinity: the largest finite magnitude is kept.
template <class U>
QUANTOPT_HOST_DEVICE U bfloat16_stochastic(U bits, U random16) {
  const U size = bits & 0x7FFFFFFFu;
  const U top = size > 0x7F800000u ? U{} + 0x7FC00000u : (size == 0x7F800000u ? size : U{} + kBFloat16Top);
  return size < kBFloat16Top ? bfloat16_stochastic_finite(bits, random16) : ((bits & 0x80000000u) | top);
}

}  // namespace quantopt

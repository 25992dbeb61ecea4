// Philox4x32-10 (Salmon et al., SC 2011) and stochastic rounding of float to bfloat16.
// Element i of tensor n at step k takes the 16-bit half i % 8 of the block with counter
// (i / 8 low, i / 8 high, k, n) and the 64-bit seed as key: the result does not depend on chunks,
// threads or vector width.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace quantopt {

struct PhiloxKey {
  uint32_t seed_low, seed_high;
  uint32_t step, tensor;
};

QUANTOPT_HOST_DEVICE void philox(const PhiloxKey& key, uint64_t block, uint32_t out[4]) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = key.step, c3 = key.tensor;
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// bfloat16 of the float with these bits, in the low half: to nearest even, or up with the probability of the
// fraction that is cut off, by 16 random bits. U is uint32_t, or a vector of them.
template <class U>
QUANTOPT_HOST_DEVICE U bfloat16_nearest(U bits) {
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? U{} + 0x7FC0u : rounded;
}

// Never rounds a finite value to infinity: the largest finite magnitude is kept.
template <class U>
QUANTOPT_HOST_DEVICE U bfloat16_stochastic(U bits, U random16) {
  const U size = bits & 0x7FFFFFFFu;
  const U rounded = size + random16;
  const U finite = rounded < 0x7F800000u ? rounded : U{} + 0x7F7F0000u;
  const U special = size > 0x7F800000u ? U{} + 0x7FC00000u : size;
  return ((bits & 0x80000000u) | (size < 0x7F800000u ? finite : special)) >> 16;
}

}  // namespace quantopt

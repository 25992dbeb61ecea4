// Philox4x32-7 (Salmon et al., SC 2011: the fewest rounds that pass BigCrush; their default has a margin of
// 3). Element i of tensor n at step k takes the 16-bit half i % 8 of the block with counter (i / 8 low, i / 8
// high, k, n) and the 64-bit seed as key: the result does not depend on chunks, threads or vector width.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace quantopt {

struct PhiloxKey {
  uint32_t seed_low, seed_high;
  uint32_t step, tensor;
};

QUANTOPT_HOST_DEVICE void wide_product(uint32_t constant, uint32_t x, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(constant) * x;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// Four random words of the block (low, high); U is uint32_t, or a vector of them.
template <class U>
QUANTOPT_HOST_DEVICE void philox(const PhiloxKey& key, U low, U high, U out[4]) {
  U c0 = low, c1 = high, c2 = U{} + key.step, c3 = U{} + key.tensor;
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
  for (int round = 0; round < 7; ++round) {
    U high0, low0, high1, low1;
    wide_product(0xD2511F53u, c0, high0, low0);
    wide_product(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

}  // namespace quantopt

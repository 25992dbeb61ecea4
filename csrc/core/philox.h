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

// exp_avg_sq of tensor n takes the random numbers of tensor n + 2^31: two tensors that are rounded with the
// same bits would err alike.
inline constexpr uint32_t kStateTensor = 0x80000000u;

QUANTOPT_HOST_DEVICE void wide_product(uint32_t constant, uint32_t x, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(constant) * x;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// The last `Rounds` rounds. The words are numbers or vectors of them: what is the same in all lanes stays one
// number for as long as it is.
template <int Rounds, class A, class B, class C, class D, class U>
QUANTOPT_HOST_DEVICE void philox_rounds(A c0, B c1, C c2, D c3, uint32_t k0, uint32_t k1, U out[4]) {
  if constexpr (Rounds == 0) {
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
  } else {
    A high0, low0;
    C high1, low1;
    wide_product(0xD2511F53u, c0, high0, low0);
    wide_product(0xCD9E8D57u, c2, high1, low1);
    philox_rounds<Rounds - 1>(high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0, k0 + 0x9E3779B9u,
                              k1 + 0xBB67AE85u, out);
  }
}

// Four random words of the block (low, high), which are uint32_t, or vectors of them.
template <class U, class High>
QUANTOPT_HOST_DEVICE void philox(const PhiloxKey& key, U low, High high, U out[4]) {
  philox_rounds<7>(low, high, key.step, key.tensor, key.seed_low, key.seed_high, out);
}

}  // namespace quantopt

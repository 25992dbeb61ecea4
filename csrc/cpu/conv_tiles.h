// Which convolutions run on packed weights on the CPU.
#pragma once

#include <cstdint>

namespace quantopt {

// Whether a convolution runs on tiles, where the instruction set has such kernels; else ATen's is faster. The
// outputs and channels are those of a group. With several groups: not with less than a quarter of the 32
// outputs or 16 channels that are taken together. With scales for groups of weights, which run along whole
// rows of W: those of whole words, and enough outputs to gather the values of several kernel positions for.
// quantopt._C has this function, for the shapes of tiles under tracing.
inline bool conv_takes_tiles(int64_t outputs, int64_t channels, int64_t taps, int64_t groups,
                             int64_t group_size) {
  constexpr int64_t kPatchOutputs = 64;
  if (group_size > 0) {
    if (group_size % 16 != 0 || (taps > 1 && outputs < kPatchOutputs)) return false;
    channels *= taps;
  }
  return groups == 1 || 4 * outputs * channels >= (outputs + 31) / 32 * 32 * ((channels + 15) / 16 * 16);
}

}  // namespace quantopt

// The layout of weights that kernels read, derived from the bits of a checkpoint: tiles of 32 rows of W. What
// a tile holds of each row differs by device: cpu/kernels/binary_linear.h, cuda/binary_linear.h.
#pragma once

namespace quantopt {

constexpr int kTileRows = 32;

}  // namespace quantopt

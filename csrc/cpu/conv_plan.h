// How the images of a convolution are laid out for AMX (cpu/kernels/amx_conv.h).
//
// With a stride, pixels go to planes by their remainders, so that those of neighbouring outputs are
// neighbours; planes that no kernel position meets are left out, and so are kernel positions that meet no
// pixel. The border on the right of a line is that on the left of the next. Images may alternate slot by
// slot: a register then has the pixels of several, as many as a line of y needs to fill registers.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels/amx_conv.h"

namespace quantopt {

struct ConvPlan {
  amx::ConvSlots slots;
  std::vector<amx::ConvLine> lines;
  std::vector<amx::ConvTap> taps;
  std::vector<amx::ConvBlock> blocks;

  ConvPlan() = default;
  ConvPlan(ConvPlan&&) = default;  // `slots` points into the others
};

// The layout of `images` images that alternate.
ConvPlan plan_conv(const ConvProblem& c, int64_t images, bool side_by_side);

// How many images should alternate, at most `most`: those with which the fewest registers are multiplied.
// image_bytes: of the slots of an image, about.
int64_t images_together(const ConvProblem& c, int64_t most, int64_t image_bytes, bool side_by_side);

}  // namespace quantopt

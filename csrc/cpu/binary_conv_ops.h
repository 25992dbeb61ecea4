// What the packed convolutions of all instruction sets are called with.
#pragma once

#include <ATen/core/Tensor.h>

#include "binary_arguments.h"
#include "cpu/kernels/binary_conv.h"

namespace quantopt {

// The convolution of group `group`, whose tiles are in `layout`, without x and y. x is channels last.
ConvProblem problem_of(const at::Tensor& x, const ConvArguments& conv, const at::Tensor& layout,
                       int64_t group);

}  // namespace quantopt

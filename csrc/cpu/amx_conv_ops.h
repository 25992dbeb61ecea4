// Packed convolutions on AMX: the choice of them, memory and threads around cpu/kernels/amx_conv.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "binary_arguments.h"
#include "cpu/binary_linear_ops.h"

namespace quantopt {

// y [B, N, H, W], channels last, in bfloat16 if `y_type` is that, else in fp32; or undefined where other
// kernels take less time or there is none on AMX. x: as it is multiplied, fp32 or bfloat16, channels last.
// layout: makes the tiles.
at::Tensor conv_on_amx(const BinaryKernels& kernels, const ConvArguments& conv, const at::Tensor& x,
                       at::ScalarType y_type, const std::function<at::Tensor()>& layout);

// The scale of each image in int8, for each pixel: [B, pixels].
at::Tensor scales_of_pixels(const at::Tensor& x, int64_t pixels);

}  // namespace quantopt

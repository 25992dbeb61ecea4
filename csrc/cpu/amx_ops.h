// Packed products on AMX: the choice of them, memory and threads around cpu/kernels/amx_linear.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "binary_arguments.h"
#include "cpu/binary_linear_ops.h"

namespace quantopt {

// y [x without its last dimension, N] in bfloat16 if `y_type` is that, else in fp32; or undefined where other
// kernels take less time or there is none on AMX. x_scale: the scales to quantise each row of x by, or
// undefined: those of the rows.
at::Tensor linear_on_amx(const BinaryKernels& kernels, const BinaryArguments& w, const at::Tensor& x,
                         const at::Tensor& x_scale, at::ScalarType y_type);

}  // namespace quantopt

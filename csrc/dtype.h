// The element type of a tensor, as the kernels know it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "core/step.h"

namespace quantopt {

// For other types an error that says which argument of which operation has it.
inline Dtype dtype_of(const at::Tensor& tensor, const char* operation, const char* argument) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::kFloat32;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, operation, ": ", argument, " has dtype ", tensor.scalar_type(),
                       "; float32, bfloat16 or float16 is needed (the reference backend takes float64)");
  }
}

}  // namespace quantopt

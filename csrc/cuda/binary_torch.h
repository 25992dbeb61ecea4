// What the operators on packed weights share on CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "core/step.h"

namespace quantopt {

inline void check(const char* error) { TORCH_CHECK(error == nullptr, "quantopt: CUDA: ", error); }

inline Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default: return Dtype::kFloat32;
  }
}

}  // namespace quantopt

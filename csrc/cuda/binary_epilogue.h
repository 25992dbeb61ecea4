// From a sum to y, for the kernels of binary_linear.h.
#pragma once

#include "cuda/binary_linear.h"
#include "cuda/ptx.h"

namespace quantopt {

// Multiplied, added and rounded as on the CPU, so that whole numbers give the same bits. `bias` is that of n,
// if there is one.
__device__ __forceinline__ float with_epilogue(const BinaryEpilogue& e, float sum, float scale, float x_scale,
                                               float bias) {
  float y = __fmul_rn(sum, __fmul_rn(scale, x_scale));
  if (e.bias != nullptr) y = __fadd_rn(y, bias);
  return activate(e.activation, y);
}

__device__ __forceinline__ void store_with_epilogue(const BinaryEpilogue& e, float sum, float x_scale,
                                                    int64_t m, int64_t n, int64_t outputs) {
  const float scale = e.scale != nullptr ? e.scale[n * e.scale_stride] : 1.0f;
  const float y = with_epilogue(e, sum, scale, x_scale, e.bias != nullptr ? e.bias[n] : 0.0f);
  const int64_t at = m * outputs + n;
  switch (e.dtype) {
    case Dtype::kFloat32: static_cast<float*>(e.y)[at] = y; break;
    case Dtype::kBFloat16: from_float(y, static_cast<BFloat16*>(e.y)[at]); break;
    case Dtype::kFloat16: from_float(y, static_cast<Half*>(e.y)[at]); break;
  }
}

// With x_scale where the epilogue says.
__device__ __forceinline__ void store_with_epilogue(const BinaryEpilogue& e, float sum, int64_t m, int64_t n,
                                                    int64_t outputs) {
  store_with_epilogue(e, sum, e.x_scale != nullptr ? e.x_scale[m] : 1.0f, m, n, outputs);
}

}  // namespace quantopt

// csrc/cuda/torch_cuda.h for the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include "cuda/device.h"

namespace quantopt {

inline CudaContext host_context{0, nullptr, 80, 4};

inline void* current_stream(at::Device) { return nullptr; }

inline CudaContext cuda_context(at::Device) { return host_context; }

inline at::Tensor float_product(const at::Tensor& a, const at::Tensor& b) {
  return at::mm(a.to(at::kDouble), b.to(at::kDouble)).to(at::kFloat);
}

}  // namespace quantopt

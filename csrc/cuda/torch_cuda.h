// What the operators ask of torch that only its CUDA has; tests/cuda_on_host has the same for the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "cuda/device.h"

namespace quantopt {

// A cudaStream_t.
inline void* current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// A device with its current stream.
inline CudaContext cuda_context(at::Device device) {
  CudaContext context{};
  const char* error = describe_device(device.index(), context);
  TORCH_CHECK(error == nullptr, "quantopt: CUDA: ", error);
  context.stream = current_stream(device);
  return context;
}

// a b of 16-bit floats, added up and left in fp32.
inline at::Tensor float_product(const at::Tensor& a, const at::Tensor& b) { return at::mm(a, b, at::kFloat); }

}  // namespace quantopt

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/device.h"

namespace quantopt {

const char* describe_device(int device, CudaContext& context) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&context.processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  context.device = device;
  // A newer device runs the code of the newest architecture of the build, which has no more than that has.
  context.capability = std::min(10 * major + minor, QUANTOPT_NEWEST_ARCH);
  return nullptr;
}

}  // namespace quantopt

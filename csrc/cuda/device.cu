#include <cuda_runtime.h>

#include "cuda/device.h"

namespace quantopt {

const char* describe_device(int device, CudaPlace& place) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&place.processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  place.device = device;
  place.capability = 10 * major + minor;
  return nullptr;
}

}  // namespace quantopt

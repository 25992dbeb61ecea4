// Launching a kernel, with the error of this launch: one left over by others is not ours to report or to
// clear.
#pragma once

#include <cuda_runtime.h>

namespace quantopt {

struct Launch {
  dim3 blocks;
  int threads;
  size_t shared = 0;     // bytes of dynamic shared memory
  bool overlap = false;  // may start while the kernel before it runs: it calls wait_for_previous_kernel
  int cluster = 1;       // blocks along z that can read each other's shared memory
  cudaStream_t stream;
};

// kArgumentBytes: limit of the size of all arguments; every version of CUDA allows 4096.
template <size_t kArgumentBytes = 4096, class... Arguments>
cudaError_t launch(const Launch& how, void (*kernel)(Arguments...), const Arguments&... arguments) {
  static_assert((sizeof(Arguments) + ...) <= kArgumentBytes, "kernel arguments");
  constexpr size_t kShared = 48 << 10;  // what a kernel may have without asking
  if (how.shared > kShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (how.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = static_cast<unsigned>(how.cluster);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = how.blocks;
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The error of start(), a launch on `device`, as text; null if there is none.
template <class Start>
const char* on_device(int device, const Start& start) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = start();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace quantopt

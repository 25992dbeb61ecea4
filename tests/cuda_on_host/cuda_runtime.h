// As much of CUDA as csrc/cuda/askew_step.cu needs, on the host: the blocks and threads of a launch run one
// after the other. The indices, tables, tails and alignment of the kernels are tested with it where there is
// no GPU. A __shared__ variable is one for all; that is right where the first thread writes it and the others
// read it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned width) : x(width) {}
};
inline dim3 blockIdx, threadIdx;
inline void __syncthreads() {}
using std::min;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  unsigned dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline int64_t launches = 0;
inline unsigned blocks_from_the_end = ~0u;  // run only so many blocks of a launch, the last ones

template <class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...),
                               const std::common_type_t<Arguments>&... arguments) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks == 0 || blocks > 0x7FFFFFFFu || threads == 0 || threads > 1024) return cudaErrorInvalidValue;
  ++launches;
  for (unsigned block = blocks > blocks_from_the_end ? blocks - blocks_from_the_end : 0; block < blocks;
       ++block) {
    for (unsigned thread = 0; thread < threads; ++thread) {
      blockIdx.x = block;
      threadIdx.x = thread;
      kernel(arguments...);
    }
  }
  return cudaSuccess;
}

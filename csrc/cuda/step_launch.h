// What the launcher (step.cu) and the kernels (step_kernel.h, instantiated in step_*.cu) tell each other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/step.h"

namespace quantopt {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // elements per block

// A row of at most kWarpRow elements is reduced by a warp, of at most kBlockRow by a block, each thread of
// which keeps its part in registers. Longer ones are read twice.
constexpr int64_t kRowPerThread = 16;
constexpr int64_t kWarpRow = 32 * kRowPerThread;
constexpr int64_t kBlockRow = kThreads * kRowPerThread;

// The arguments of a kernel: 32764 bytes since CUDA 12.1, whose driver and all its architectures allow it.
#if CUDART_VERSION >= 12010
constexpr int kTensors = 248;
#else
constexpr int kTensors = 28;
#endif

// How the elements of a tensor meet their scales.
enum class Access : uint32_t {
  kOneScale,        // 16 bytes at a time, one scale for the tensor (or none)
  kScalePerVector,  // 16 bytes at a time, which share a scale
  kElements,        // element by element
};

// In what types the tensors lie: the cases that move the fewest bytes at compile time, all others at run
// time.
enum class Storage {
  kFloat32,       // parameters and momentum float32
  kBFloat16,      // parameters and momentum bfloat16, no latent or master weights
  kBFloat16Wide,  // the same with float32 momentum
  kAny,
};

__host__ __device__ constexpr bool is_bfloat16(Storage storage) {
  return storage == Storage::kBFloat16 || storage == Storage::kBFloat16Wide;
}

// Elements that a thread reads at a time: 16 bytes of the parameter.
__host__ __device__ constexpr int vector_of(Storage storage) { return storage == Storage::kFloat32 ? 4 : 8; }

// Blocks that share a processor, at least: as many as the registers allow without spills.
__host__ __device__ constexpr int blocks_per_processor(Storage storage, bool adam) {
  return storage == Storage::kAny || (adam && is_bfloat16(storage)) ? 2 : 3;
}

struct StepTensor {
  void* param;
  const void* grad;
  void* momentum;
  float* second;
  float* latent;
  float* scale;         // the levels after the step
  const float* before;  // the levels before it: another array where they moved in an earlier launch
  const float* sigma;
  union {
    const float* step;  // k of Adam and of the random numbers
    double* partial;    // magnitude_kernel: sum of each block
  };
  int64_t numel, row, group, scales_per_row, sigma_row;
  uint32_t index;
  Access access;
};

// One launch serves up to kTensors tensors: the table of their pointers is a kernel argument, and a block
// finds its tensor there.
struct StepTable {
  StepTensor tensors[kTensors];
  uint32_t first_block[kTensors + 1];  // of each tensor; the last entry is the number of blocks
  int count;
};

struct StepParams {
  Hyper hyper;
  const Hyper* device_hyper;  // where not null, read there instead of `hyper`
  const float* grad_scale;
  const float* found_inf;
  float gradient_factor;
  float level_factor;
  int levels;
  Dtype param_dtype, momentum_dtype;
  bool nesterov, decoupled, stochastic_rounding;
  uint32_t seed_low, seed_high;
};

enum class Phase {
  kStep,       // one block per chunk
  kRows,       // moving levels: one warp or block per row, reduced and stepped
  kMagnitude,  // moving levels of long rows: one block per chunk of a row, its sum alone
};

struct StepLaunch {
  const StepTable& table;
  const StepParams& params;
  Phase phase;
  Storage storage;
  bool binary, adam;
  cudaStream_t stream;
};

// Returns the error of this launch: one left over by others is not ours to report or to clear.
template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), unsigned blocks, cudaStream_t stream,
                   const Arguments&... arguments) {
  static_assert(
      (sizeof(Arguments) + ...) + 16 * sizeof...(Arguments) <= (CUDART_VERSION >= 12010 ? 32764 : 4096),
      "kernel arguments");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

cudaError_t launch_base(const StepLaunch& step);
cudaError_t launch_askew(const StepLaunch& step);
cudaError_t launch_askew_gradient(const StepLaunch& step);
cudaError_t launch_askew_memory(const StepLaunch& step);
cudaError_t launch_splitting(const StepLaunch& step);
cudaError_t launch_alternating(const StepLaunch& step);
cudaError_t launch_prox(const StepLaunch& step);

}  // namespace quantopt

// The arguments of the step's kernels, and what step.cu passes to launch_rule (step_dispatch.h).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/step.h"
#include "cuda/launch.h"

namespace quantopt {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // elements per block

// Dynamic scales. The elements of a scale, a group or a row without groups, are reduced by as many lanes of a
// warp as read one vector each; of more than a vector for each lane, by a warp (at most kWarpRow) or a block
// (at most kBlockRow), each thread of which keeps its part in registers. Longer groups are read twice.
constexpr int64_t kRowPerThread = 16;
constexpr int64_t kWarpRow = 32 * kRowPerThread;
constexpr int64_t kBlockRow = kThreads * kRowPerThread;

// Bytes that the arguments of a kernel may take; all architectures of CUDA 12.1 and later allow the larger
// size.
constexpr size_t kStepArgumentBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;

// How the elements of a tensor are read, and which scale they take.
enum class Access : uint32_t {
  kOneScale,        // 16 bytes at a time, one scale for the tensor (or none)
  kScalePerVector,  // 16 bytes at a time, which share a scale
  kElements,        // element by element
};

// The dtypes of the tensors: known at compile time in the cases that move the fewest bytes, at run time in
// all others.
enum class Storage {
  kFloat32,       // parameters, momentum and exp_avg_sq float32
  kBFloat16,      // parameters and momentum bfloat16, no latent or master weights; exp_avg_sq any
  kBFloat16Wide,  // the same with float32 momentum
  kAny,
};

__host__ __device__ constexpr bool is_bfloat16(Storage storage) {
  return storage == Storage::kBFloat16 || storage == Storage::kBFloat16Wide;
}

// Elements that a thread reads at a time: 16 bytes of the parameter.
__host__ __device__ constexpr int vector_of(Storage storage) { return storage == Storage::kFloat32 ? 4 : 8; }

// The lanes, a power of two, that read a vector each of a group of at most 32 vectors.
__host__ __device__ constexpr int lanes_of(int64_t group, int vector) {
  int lanes = 1;
  while (lanes * vector < group) lanes *= 2;
  return lanes;
}

// Groups that a lane helps to reduce, one after the other: those of a chunk in a block, but where Adam reads
// 8 elements at a time, as a loop would spill there.
__host__ __device__ constexpr int group_rounds(Storage storage, bool adam) {
  return storage == Storage::kFloat32 ? 4 : adam ? 1 : 2;
}

// Blocks per multiprocessor that __launch_bounds__ asks for: as many as the registers allow without spills.
__host__ __device__ constexpr int blocks_per_processor(Storage storage, bool adam) {
  return storage == Storage::kAny || (adam && is_bfloat16(storage)) ? 2 : 3;
}

struct StepTensor {
  void* param;
  const void* grad;
  void* momentum;
  void* exp_avg_sq;
  float* latent;
  float* scale;
  const float*
      previous_scale;  // the scale that the weights have now: not `scale` after scale_epilogue_kernel
  const float* latent_bound;
  const float* step;  // k of Adam and of the random numbers
  double* partial;    // magnitude_kernel: sum of each block
  int64_t numel, row, group, scales_per_row, bound_row;
  uint32_t index;
  Access access;
};

// One launch serves up to kTensors tensors: the table of their pointers is a kernel argument, in which a
// block finds its tensor.
constexpr size_t kOtherArgumentBytes = 512;
constexpr int kTensors =
    static_cast<int>((kStepArgumentBytes - kOtherArgumentBytes) / (sizeof(StepTensor) + sizeof(uint32_t)));

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
  Dtype param_dtype, momentum_dtype, exp_avg_sq_dtype;
  bool nesterov, decoupled, stochastic_rounding;
  uint32_t seed_low, seed_high;              // of stochastic_rounding
  uint32_t state_seed_low, state_seed_high;  // of bfloat16 exp_avg_sq
};

enum class Phase {
  kStep,       // one block per chunk
  kGroups,     // dynamic scale: some lanes of a warp per group, which they reduce and step
  kRows,       // the same of longer groups, with one warp or block per group
  kMagnitude,  // dynamic scale of long groups: one block per chunk of a group, which it only reduces
};

struct StepLaunch {
  const StepTable& table;
  const StepParams& params;
  Phase phase;
  Storage storage;
  bool binary, adam;
  cudaStream_t stream;
};

// `blocks` blocks of kThreads threads.
inline Launch launch_of(unsigned blocks, cudaStream_t stream) {
  return {dim3(blocks), kThreads, 0, false, 1, stream};
}

// Launches the kernels of one rule; step_dispatch.h defines it.
template <Rule rule>
cudaError_t launch_rule(const StepLaunch& step);

}  // namespace quantopt

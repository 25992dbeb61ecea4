// The fused step on CUDA. No torch.
#pragma once

#include <cstdint>

#include "core/step.h"

namespace quantopt {

struct CudaStepInputs {
  const float* grad_scale;  // device; null: 1. The gradient is divided by it
  const float* found_inf;   // device; null: 0. If not 0, nothing is changed
  float* const* steps;      // host array of device pointers, one per parameter, each counted up; null: none
  int64_t step_count;       // length of steps
  bool dynamic_scale;       // every scale is first replaced, as in cpu/step.h
  void* workspace;          // device; cuda_step_workspace bytes, at an address that is a multiple of 8
  int device;
  void* stream;  // a cudaStream_t
};

// Bytes of device memory for CudaStepInputs::workspace: 0 where no group is too long for a block.
int64_t cuda_step_workspace(const StepSegment* segments, int64_t count, bool dynamic_scale);

// Steps `count` segments (in host memory; their pointers are device pointers), asynchronously. Not read:
// StepSegment::step (it is steps[index], on the device), StepSegment::next_scale and the step of the key.
// Returns null, or the CUDA error of a launch that failed.
const char* step_on_cuda(const StepOptions& options, const StepSegment* segments, int64_t count,
                         const CudaStepInputs& inputs);

}  // namespace quantopt

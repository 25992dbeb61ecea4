// The AskewSGD and AskewAdam step, and the plain base step that their other parameters take, on CUDA. No
// torch.
#pragma once

#include <cstdint>

#include "core/step.h"

namespace quantopt {

struct CudaStepInputs {
  const float* grad_scale;  // device; null: 1. The gradient is divided by it
  const float* found_inf;   // device; null: 0. If not 0, nothing is changed
  float* const* steps;      // host array of device pointers, one per parameter, each counted up; null: none
  int64_t step_count;       // length of steps
};

// Why the CUDA kernels cannot make this step, or null if they can.
const char* askew_step_unsupported_on_cuda(const StepOptions& options);

// Steps `count` segments (in host memory; their pointers are device pointers) on the device and the stream
// (a cudaStream_t), asynchronously. StepSegment::step and next_scale are not read: k of Adam is steps[index].
// Returns null, or the CUDA error of a launch that failed.
const char* askew_step_on_cuda(const StepOptions& options, const StepSegment* segments, int64_t count,
                               const CudaStepInputs& inputs, int device, void* stream);

}  // namespace quantopt

// Turns the arguments of the op quantopt::fused_step into StepOptions and StepSegments, with every check that
// the kernels rely on. Shared by the CPU and CUDA registrations.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "core/step.h"

namespace quantopt {

struct StepArguments {
  std::string_view rule;
  at::TensorList params, grads, momentums, seconds, latents, scales, sigmas, steps;
  const at::Tensor& hyper;
  int64_t levels, group_size;
  bool moving_levels, nesterov, maximize, decoupled;
  int64_t seed;
};

// Options without the gradient factor and the step of the random key, which depend on tensors.
StepOptions step_options(const StepArguments& arguments);

// Checks every tensor; `device` is where they must be. Tensors without elements give no segment.
void step_segments(const StepArguments& arguments, at::Device device, std::vector<StepSegment>& segments);

}  // namespace quantopt

// The step of checked arguments, for the op quantopt::fused_step and for StepPlan.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/step.h"

namespace quantopt {

// Counts `steps` up and steps every segment on the device of `first_param`, divided by grad_scale, unless
// found_inf is not 0. Asynchronous on CUDA.
void run_step(const StepOptions& options, std::vector<StepSegment>& segments, bool dynamic_scale,
              at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, const at::Tensor& first_param);

}  // namespace quantopt

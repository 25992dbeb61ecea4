// The fused step on a CUDA device, for the op and for StepPlan.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/step.h"

namespace quantopt {

// Steps every segment on the current stream of the device of `first_param`, asynchronously. `steps`: one
// counter per parameter, or none. Throws where a tensor is on another device or a launch fails.
void run_step_on_cuda(const StepOptions& options, std::vector<StepSegment>& segments, bool dynamic_scale,
                      at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf, const at::Tensor& first_param);

}  // namespace quantopt

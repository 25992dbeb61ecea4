// The fused step on a CUDA device, for the op and for StepPlan.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/step.h"

namespace quantopt {

// Steps every segment on the current stream of `device`, asynchronously. `steps`: one counter per parameter,
// or none. Throws where a tensor is on another device or a launch fails.
void step_on_device(const StepOptions& options, const std::vector<StepSegment>& segments, bool moving_levels,
                    at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf, const at::Tensor& param);

}  // namespace quantopt

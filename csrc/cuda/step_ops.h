// The fused step on CUDA tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/step.h"

namespace quantopt {

// See run_step of step_ops.h, which has checked the arguments. Asynchronous, on the current stream of the
// device; throws where `steps` are on another device or a launch fails.
void run_step_on_cuda(const StepOptions& options, std::vector<StepSegment>& segments, bool dynamic_scale,
                      at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf, const at::Tensor& first_param);

}  // namespace quantopt

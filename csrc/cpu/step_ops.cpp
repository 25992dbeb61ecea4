#include "cpu/step_ops.h"

#include "cpu/step.h"

namespace quantopt {

void run_step_on_cpu(const StepOptions& options_in, std::vector<StepSegment>& segments, bool dynamic_scale,
                     at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf, const at::Tensor&) {
  if (found_inf && *found_inf->const_data_ptr<float>() != 0.0f) return;
  StepOptions options = options_in;
  if (grad_scale) options.gradient_factor /= *grad_scale->const_data_ptr<float>();
  for (const at::Tensor& step : steps) *step.mutable_data_ptr<float>() += 1.0f;
  if (!steps.empty()) {
    for (StepSegment& segment : segments) segment.step = *steps[segment.index].const_data_ptr<float>();
  }
  step_on_cpu(options, segments, dynamic_scale);
}

}  // namespace quantopt

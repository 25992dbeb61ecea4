// quantopt::fused_step on the CPU.
#include <torch/library.h>

#include "cpu/step.h"
#include "step_arguments.h"

namespace quantopt {
namespace {

void fused_step_cpu(c10::string_view rule, at::TensorList params, at::TensorList grads,
                    at::TensorList momentums, at::TensorList seconds, at::TensorList latents,
                    at::TensorList scales, at::TensorList sigmas, at::TensorList steps,
                    const at::Tensor& hyper, int64_t levels, int64_t group_size, bool moving_levels,
                    bool nesterov, bool maximize, bool decoupled, int64_t seed,
                    const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
  const StepArguments arguments{{rule.data(), rule.size()},
                                params,
                                grads,
                                momentums,
                                seconds,
                                latents,
                                scales,
                                sigmas,
                                steps,
                                hyper,
                                levels,
                                group_size,
                                moving_levels,
                                nesterov,
                                maximize,
                                decoupled,
                                seed};
  StepOptions options = step_options(arguments);
  thread_local std::vector<StepSegment> segments;  // kept between steps
  step_segments(arguments, at::Device(at::kCPU), segments);
  if (found_inf && *found_inf->const_data_ptr<float>() != 0.0f) return;
  if (grad_scale) options.gradient_factor /= *grad_scale->const_data_ptr<float>();
  for (const at::Tensor& step : steps) *step.mutable_data_ptr<float>() += 1.0f;
  for (StepSegment& segment : segments) {
    if (!steps.empty()) segment.step = *steps[segment.index].const_data_ptr<float>();
  }
  step_on_cpu(options, segments, moving_levels);
}

}  // namespace
}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CPU, m) { m.impl("fused_step", &quantopt::fused_step_cpu); }

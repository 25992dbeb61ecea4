// quantopt::fused_step on CUDA.
#include "cuda/step_ops.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "cuda/step.h"
#include "cuda/torch_cuda.h"
#include "step_arguments.h"

namespace quantopt {
namespace {

const float* flag_on(const std::optional<at::Tensor>& tensor, at::Device device, const char* what) {
  if (!tensor) return nullptr;
  TORCH_CHECK_VALUE(tensor->device() == device && tensor->scalar_type() == at::kFloat && tensor->numel() == 1,
                    "fused_step: ", what, " must be one float32 number on ", device);
  return tensor->const_data_ptr<float>();
}

void fused_step_cuda(c10::string_view rule, at::TensorList params, at::TensorList grads,
                     at::TensorList momentums, at::TensorList seconds, at::TensorList latents,
                     at::TensorList scales, at::TensorList sigmas, at::TensorList steps,
                     const at::Tensor& hyper, int64_t levels, int64_t group_size, bool moving_levels,
                     bool nesterov, bool maximize, bool decoupled, int64_t seed,
                     const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf) {
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
  if (params.empty()) return;
  const StepOptions options = step_options(arguments);
  thread_local std::vector<StepSegment> segments;  // kept between steps
  step_segments(arguments, params[0].device(), segments);
  step_on_device(options, segments, moving_levels, steps, grad_scale, found_inf, params[0]);
}

}  // namespace

void step_on_device(const StepOptions& options, const std::vector<StepSegment>& segments, bool moving_levels,
                    at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
                    const std::optional<at::Tensor>& found_inf, const at::Tensor& param) {
  const at::Device device = param.device();
  for (const StepSegment& segment : segments) {
    TORCH_CHECK_VALUE(!moving_levels || segment.sigma == nullptr || segment.sigma_row >= segment.row,
                      "fused_step: sigmas[", segment.index,
                      "] is finer than the moving level of its parameter");
  }
  thread_local std::vector<float*> counters;  // kept between steps
  counters.clear();
  for (const at::Tensor& step : steps) {
    TORCH_CHECK_VALUE(step.device() == device, "fused_step: steps must be on ", device, ", not on ",
                      step.device());
    counters.push_back(step.mutable_data_ptr<float>());
  }
  CudaStepInputs inputs{};
  inputs.grad_scale = flag_on(grad_scale, device, "grad_scale");
  inputs.found_inf = flag_on(found_inf, device, "found_inf");
  inputs.steps = counters.empty() ? nullptr : counters.data();
  inputs.step_count = static_cast<int64_t>(counters.size());
  inputs.moving_levels = moving_levels;
  inputs.device = device.index();
  const c10::DeviceGuard guard(device);
  inputs.stream = current_stream(device);
  const auto count = static_cast<int64_t>(segments.size());
  at::Tensor workspace;  // of the caching allocator: what follows on this stream may have it back at once
  if (const int64_t bytes = cuda_step_workspace(segments.data(), count, moving_levels)) {
    workspace = param.new_empty({bytes}, at::TensorOptions().dtype(at::kByte));
    inputs.workspace = workspace.mutable_data_ptr();
  }
  const char* error = step_on_cuda(options, segments.data(), count, inputs);
  TORCH_CHECK(error == nullptr, "fused_step: ", error);
}

}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CUDA, m) { m.impl("fused_step", &quantopt::fused_step_cuda); }

// quantopt::fused_step on CUDA.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "cuda/askew_step.h"
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
  const char* reason = askew_step_unsupported_on_cuda(options);
  TORCH_CHECK_NOT_IMPLEMENTED(reason == nullptr, "fused_step: ", reason);
  TORCH_CHECK_NOT_IMPLEMENTED(!options.stochastic_rounding, "fused_step: the CUDA kernels round to nearest");

  const at::Device device = params[0].device();
  const c10::DeviceGuard guard(device);
  thread_local std::vector<StepSegment> segments;  // kept between steps
  step_segments(arguments, device, segments);
  thread_local std::vector<float*> counters;
  counters.clear();
  for (const at::Tensor& step : steps) {
    TORCH_CHECK_VALUE(step.device() == device, "fused_step: steps must be on ", device, ", not on ",
                      step.device());
    counters.push_back(step.mutable_data_ptr<float>());
  }
  const CudaStepInputs inputs{
      flag_on(grad_scale, device, "grad_scale"), flag_on(found_inf, device, "found_inf"),
      counters.empty() ? nullptr : counters.data(), static_cast<int64_t>(counters.size())};
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  const char* error = askew_step_on_cuda(options, segments.data(), static_cast<int64_t>(segments.size()),
                                         inputs, device.index(), stream.native_handle());
  TORCH_CHECK(error == nullptr, "fused_step: ", error);
}

}  // namespace
}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CUDA, m) { m.impl("fused_step", &quantopt::fused_step_cuda); }

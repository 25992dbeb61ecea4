// The step on the device of its tensors: counters, flags, stream and workspace for step_on_cuda.
#include "cuda/step_ops.h"

#include <c10/core/DeviceGuard.h>

#include "cuda/step.h"
#include "cuda/torch_cuda.h"

namespace quantopt {

void run_step_on_cuda(const StepOptions& options, std::vector<StepSegment>& segments, bool dynamic_scale,
                      at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf, const at::Tensor& first_param) {
  const at::Device device = first_param.device();
  for (const StepSegment& segment : segments) {
    TORCH_CHECK_VALUE(
        !dynamic_scale || segment.latent_bound == nullptr || segment.bound_row == 0 ||
            segment.bound_row >= segment.row,
        "fused_step: latent_bounds[", segment.index,
        "] has one value per channel, but the dynamic scale of its parameter has one: pass one");
  }
  thread_local std::vector<float*> counters;  // its memory serves the next step
  counters.clear();
  for (const at::Tensor& step : steps) {
    counters.push_back(step.mutable_data_ptr<float>());
  }
  CudaStepInputs inputs{};
  inputs.grad_scale = grad_scale ? grad_scale->const_data_ptr<float>() : nullptr;
  inputs.found_inf = found_inf ? found_inf->const_data_ptr<float>() : nullptr;
  inputs.steps = counters.empty() ? nullptr : counters.data();
  inputs.step_count = static_cast<int64_t>(counters.size());
  inputs.dynamic_scale = dynamic_scale;
  inputs.device = device.index();
  const c10::DeviceGuard guard(device);
  inputs.stream = current_stream(device);
  const auto count = static_cast<int64_t>(segments.size());
  at::Tensor workspace;  // of the caching allocator, which reuses it for later work on this stream alone
  if (const int64_t bytes = cuda_step_workspace(segments.data(), count, dynamic_scale)) {
    workspace = first_param.new_empty({bytes}, at::TensorOptions().dtype(at::kByte));
    inputs.workspace = workspace.mutable_data_ptr();
  }
  const char* error = step_on_cuda(options, segments.data(), count, inputs);
  TORCH_CHECK(error == nullptr, "fused_step: ", error);
}

}  // namespace quantopt

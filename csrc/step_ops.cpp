// quantopt::fused_step on every device.
#include "step_ops.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include "cpu/step_ops.h"
#include "memory.h"
#include "step_arguments.h"
#ifdef QUANTOPT_WITH_CUDA
#include "cuda/step_ops.h"
#endif

namespace quantopt {
namespace {

void check_number(const std::optional<at::Tensor>& tensor, const char* name, at::Device device) {
  TORCH_CHECK_VALUE(
      !tensor || (tensor->device() == device && tensor->scalar_type() == at::kFloat && tensor->numel() == 1),
      "fused_step: ", name, " must be one float32 number on ", device);
  if (tensor) check_memory(*tensor, "fused_step", name);
}

// The arguments of the schema, as one record for what follows.
void fused_step(c10::string_view rule, c10::string_view base, at::TensorList params, at::TensorList grads,
                at::TensorList momentum_buffers, at::TensorList exp_avg_sqs, at::TensorList latents,
                at::TensorList scales, at::TensorList latent_bounds, at::TensorList steps,
                const at::Tensor& hyper, int64_t levels, int64_t group_size, bool dynamic_scale,
                bool nesterov, bool maximize, bool decoupled, int64_t seed, int64_t state_seed,
                const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
  const StepRecord record{
      rule,     base,          params,    grads, momentum_buffers, exp_avg_sqs, latents,
      scales,   latent_bounds, steps,     hyper, levels,           group_size,  dynamic_scale,
      nesterov, maximize,      decoupled, seed,  state_seed,       grad_scale,  found_inf};
  const StepOptions options = step_options(record);
  if (params.empty()) return;
  thread_local std::vector<StepSegment> segments;  // keeps its memory between steps
  step_segments(record, params[0].device(), segments);
  run_step(options, segments, dynamic_scale, steps, grad_scale, found_inf, params[0]);
}

}  // namespace

void run_step(const StepOptions& options, std::vector<StepSegment>& segments, bool dynamic_scale,
              at::TensorList steps, const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, const at::Tensor& first_param) {
  const at::Device device = first_param.device();
  check_number(grad_scale, "grad_scale", device);
  check_number(found_inf, "found_inf", device);
#ifdef QUANTOPT_WITH_CUDA
  const auto run = device.is_cuda() ? &run_step_on_cuda : &run_step_on_cpu;
#else
  const auto run = &run_step_on_cpu;
#endif
  run(options, segments, dynamic_scale, steps, grad_scale, found_inf, first_param);
}

}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CPU, m) { m.impl("fused_step", &quantopt::fused_step); }
#ifdef QUANTOPT_WITH_CUDA
TORCH_LIBRARY_IMPL(quantopt, CUDA, m) { m.impl("fused_step", &quantopt::fused_step); }
#endif

#include "step_plan.h"

#include <c10/util/Exception.h>

#include "memory.h"
#include "step_arguments.h"
#include "step_ops.h"

namespace quantopt {

StepPlan::StepPlan(const StepRecord& record, at::TensorList left_out, at::TensorList counted)
    : params_(record.params.vec()),
      left_out_(left_out.vec()),
      steps_(record.steps.vec()),
      hyper_(record.hyper),
      dynamic_scale_(record.dynamic_scale) {
  TORCH_CHECK_VALUE(!params_.empty(), "StepPlan: params is empty; a step of no parameters needs no plan");
  StepRecord checked = record;
  if (record.grads.empty()) checked.grads = record.params;
  options_ = step_options(checked);
  const at::Device device = params_[0].device();
#ifdef QUANTOPT_WITH_CUDA
  TORCH_CHECK_VALUE(device.is_cpu() || device.is_cuda(), "StepPlan: no kernels for ", device);
#else
  TORCH_CHECK_VALUE(device.is_cpu(), "StepPlan: this build has no kernels for ", device);
#endif
  step_segments(checked, device, segments_);
  for (at::TensorList tensors : {record.params, record.momentum_buffers, record.exp_avg_sqs, record.latents,
                                 record.scales, record.latent_bounds, record.steps}) {
    watched_.add(tensors);
  }
  watched_.count_writes(counted);
}

bool StepPlan::valid(std::optional<std::vector<at::Tensor>> grads) {
  has_gradients_ = false;
  if (grads && grads->size() != params_.size()) return false;
  for (const at::Tensor& param : left_out_) {
    if (param.grad().defined() && param.numel() > 0) return false;
  }
  if (!watched_.unchanged()) return false;
  grads_.clear();
  for (StepSegment& segment : segments_) {
    const at::Tensor& param = params_[segment.index];
    const at::Tensor& grad = grads ? (*grads)[segment.index] : param.grad();
    if (!gradient_fits(grad, param)) return false;
    segment.grad = grad.unsafeGetTensorImpl()->data();
    grads_.push_back(grad);
  }
  has_gradients_ = true;
  return true;
}

void StepPlan::step(const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
  TORCH_CHECK(has_gradients_, "StepPlan.step: call valid() before each step; it takes up the gradients");
  has_gradients_ = false;
  check_memory(hyper_, "StepPlan.step", "hyper");
  if (options_.device_hyper == nullptr) options_.hyper = *static_cast<const Hyper*>(hyper_.const_data_ptr());
  run_step(options_, segments_, dynamic_scale_, steps_, grad_scale, found_inf, params_[0]);
  grads_.clear();
  for (const at::Tensor& param : params_) param.unsafeGetTensorImpl()->bump_version();
  watched_.note_writes();
}

}  // namespace quantopt

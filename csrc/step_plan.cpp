// quantopt::StepPlan: what a step of one list of parameters needs, checked and laid out once. A step with the
// plan only looks up the gradients, so that lists of many small tensors do not wait for Python.
#include "step_plan.h"

#include <ATen/core/grad_mode.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/step.h"
#include "step_arguments.h"
#ifdef QUANTOPT_WITH_CUDA
#include "cuda/step_ops.h"
#endif

namespace quantopt {
namespace {

class StepPlan;

// The living plans by number.
struct Plans {
  std::mutex mutex;
  std::unordered_map<int64_t, StepPlan*> by_number;
  int64_t last = 0;
};
Plans& plans() {
  static Plans* const all = new Plans;  // never destroyed: plans may outlive static objects
  return *all;
}

class StepPlan : public torch::CustomClassHolder {
 public:
  StepPlan(std::string rule, std::vector<at::Tensor> params, std::vector<at::Tensor> left_out,
           std::vector<at::Tensor> momentums, std::vector<at::Tensor> seconds,
           std::vector<at::Tensor> latents, std::vector<at::Tensor> scales, std::vector<at::Tensor> sigmas,
           std::vector<at::Tensor> steps, at::Tensor hyper, int64_t levels, int64_t group_size,
           bool moving_levels, bool nesterov, bool maximize, bool decoupled, int64_t seed)
      : params_(std::move(params)),
        left_out_(std::move(left_out)),
        kept_{std::move(momentums), std::move(seconds), std::move(latents), std::move(scales),
              std::move(sigmas)},
        steps_(std::move(steps)),
        hyper_(std::move(hyper)),
        dtype_(params_.at(0).dtype()),
        moving_levels_(moving_levels) {
    // The parameters stand for their gradients in the checks, which are repeated for these at every step.
    const StepArguments arguments{rule,          params_,  params_,  kept_[0],  kept_[1], kept_[2],
                                  kept_[3],      kept_[4], steps_,   hyper_,    levels,   group_size,
                                  moving_levels, nesterov, maximize, decoupled, seed};
    options_ = step_options(arguments);
    sign_ = options_.gradient_factor;
    const at::Device device = params_[0].device();
#ifdef QUANTOPT_WITH_CUDA
    TORCH_CHECK_VALUE(device.is_cpu() || device.is_cuda(), "StepPlan: no kernels for ", device);
#else
    TORCH_CHECK_VALUE(device.is_cpu(), "StepPlan: this build has no kernels for ", device);
#endif
    step_segments(arguments, device, segments_);
    const std::lock_guard lock(plans().mutex);
    number_ = ++plans().last;
    plans().by_number[number_] = this;
  }
  ~StepPlan() override {
    const std::lock_guard lock(plans().mutex);
    plans().by_number.erase(number_);
  }

  int64_t number() const { return number_; }

  // Looks up the present gradients. False if the plan is out of date: a parameter or its state has moved or
  // changed, a gradient is missing or not of its parameter's dtype and layout, or a parameter left out of the
  // plan has a gradient now.
  bool ready() {
    for (const at::Tensor& param : left_out_) {
      if (param.grad().defined() && param.numel() > 0) return false;
    }
    for (StepSegment& segment : segments_) {
      const size_t i = segment.index;
      const at::Tensor& param = params_[i];
      const at::Tensor& grad = param.grad();
      if (!grad.defined() || !is_at(param, segment.param) || param.dtype() != dtype_ ||
          param.numel() != segment.numel || !fits(grad, param)) {
        return false;
      }
      if (!kept_[0].empty() && !(is_at(kept_[0][i], segment.momentum) && lies_as(kept_[0][i], param)))
        return false;
      if (!kept_[1].empty() && !(is_at(kept_[1][i], segment.second) && lies_as(kept_[1][i], param)))
        return false;
      if (!kept_[2].empty() && !(is_at(kept_[2][i], segment.latent) && lies_as(kept_[2][i], param)))
        return false;
      if (!kept_[3].empty() && !is_at(kept_[3][i], segment.scale)) return false;
      if (!kept_[4].empty() && !is_at(kept_[4][i], segment.sigma)) return false;
      segment.grad = grad.unsafeGetTensorImpl()->data();
    }
    return true;
  }

  // One step with the gradients that ready() found and the present content of hyper.
  void step(const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
    if (options_.device_hyper == nullptr)
      options_.hyper = *static_cast<const Hyper*>(hyper_.const_data_ptr());
#ifdef QUANTOPT_WITH_CUDA
    if (params_[0].is_cuda()) {
      step_on_device(options_, segments_, moving_levels_, steps_, grad_scale, found_inf, params_[0]);
      return bump_versions();
    }
#endif
    if (found_inf && *found_inf->const_data_ptr<float>() != 0.0f) return;
    options_.gradient_factor = grad_scale ? sign_ / *grad_scale->const_data_ptr<float>() : sign_;
    for (const at::Tensor& step : steps_) *static_cast<float*>(step.data_ptr()) += 1.0f;
    if (!steps_.empty()) {
      for (StepSegment& segment : segments_)
        segment.step = *static_cast<float*>(steps_[segment.index].data_ptr());
    }
    step_on_cpu(options_, segments_, moving_levels_);
    bump_versions();
  }

 private:
  void bump_versions() {
    for (const at::Tensor& param : params_) param.unsafeGetTensorImpl()->bump_version();
  }

  static bool is_at(const at::Tensor& tensor, const void* data) {
    return tensor.unsafeGetTensorImpl()->data() == data;
  }
  static bool lies_as(const at::Tensor& tensor, const at::Tensor& param) {
    return tensor.numel() == param.numel() &&
           ((tensor.is_contiguous() && param.is_contiguous()) || tensor.strides() == param.strides());
  }
  static bool fits(const at::Tensor& grad, const at::Tensor& param) {
    return grad.dtype() == param.dtype() && grad.layout() == at::kStrided &&
           grad.device() == param.device() && grad.sizes() == param.sizes() && lies_as(grad, param) &&
           !grad.is_neg();
  }

  std::vector<at::Tensor> params_;
  std::vector<at::Tensor> left_out_;
  std::vector<at::Tensor> kept_[5];  // owners of the memory that the segments point to
  std::vector<at::Tensor> steps_;
  at::Tensor hyper_;
  caffe2::TypeMeta dtype_;
  bool moving_levels_;
  StepOptions options_;
  float sign_;
  std::vector<StepSegment> segments_;
  int64_t number_ = 0;
};

StepPlan& plan_of(int64_t number) {
  const std::lock_guard lock(plans().mutex);
  return *plans().by_number.at(number);
}

}  // namespace

bool step_plan_ready(int64_t number) { return plan_of(number).ready(); }
void step_plan_step(int64_t number) { plan_of(number).step({}, {}); }

}  // namespace quantopt

TORCH_LIBRARY_FRAGMENT(quantopt, m) {
  using quantopt::StepPlan;
  using Tensors = std::vector<at::Tensor>;
  m.class_<StepPlan>("StepPlan")
      .def(torch::init<std::string, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors,
                       at::Tensor, int64_t, int64_t, bool, bool, bool, bool, int64_t>())
      .def("number", &StepPlan::number)
      .def("step", &StepPlan::step);
}

// What a step of one list of parameters needs, checked and laid out once: a step with the plan only looks up
// the gradients, so that lists of many small tensors do not wait for Python. quantopt._C.StepPlan is this
// class.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/step.h"
#include "step_record.h"
#include "tensor_watch.h"

namespace quantopt {

class StepPlan {
 public:
  // Of the arguments of fused_step but for its gradients, which valid() looks up; without any, params stand
  // for them in the checks. left_out: parameters that take no part, as they have no gradient or no elements.
  // counted: tensors that nobody else may write to between two steps; valid() tells.
  StepPlan(const StepRecord& record, at::TensorList left_out, at::TensorList counted);

  // Takes up the gradients, the parameters' own if none are given. False if the plan is out of date: a
  // parameter or its state has moved or has another dtype, shape or strides, a gradient is missing, no plain
  // strided tensor or not of its parameter's dtype and layout, a parameter left out has elements and a
  // gradient now, or a counted tensor was written to.
  bool valid(std::optional<std::vector<at::Tensor>> grads);

  // One step with the gradients of the last valid(), which must have been true, and the present content of
  // hyper.
  void step(const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf);

  TensorWatch& watched() { return watched_; }

 private:
  std::vector<at::Tensor> params_, left_out_, steps_;
  at::Tensor hyper_;
  bool dynamic_scale_;
  StepOptions options_;
  std::vector<StepSegment> segments_;
  TensorWatch watched_;            // what the segments point into
  bool has_gradients_ = false;     // whether valid() was the last call, and true
  std::vector<at::Tensor> grads_;  // of the last valid(): another thread may drop them during the step
};

}  // namespace quantopt

#include "step_arguments.h"

#include <ATen/core/TensorBody.h>
#include <c10/util/Exception.h>

#include <limits>

#include "core/levels.h"

namespace quantopt {
namespace {

Rule rule_of(std::string_view name) {
  if (name == "base") return Rule::kBase;
  if (name == "askew") return Rule::kAskew;
  if (name == "askew_gradient") return Rule::kAskewGradient;
  if (name == "askew_memory") return Rule::kAskewMemory;
  if (name == "splitting") return Rule::kSplitting;
  if (name == "alternating") return Rule::kAlternating;
  if (name == "prox") return Rule::kProx;
  TORCH_CHECK_VALUE(false, "fused_step: unknown rule '", name, "'");
}

Dtype dtype_of(const at::Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::kFloat32;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "fused_step: ", what, " has dtype ", tensor.scalar_type(),
                       "; float32, bfloat16 or float16 is needed (the reference backend takes float64)");
  }
}

bool is_latent(Rule rule) {
  return rule == Rule::kAskewMemory || rule == Rule::kSplitting || rule == Rule::kAlternating;
}

void check_count(at::TensorList list, size_t count, const char* what, bool optional) {
  TORCH_CHECK_VALUE(list.size() == count || (optional && list.empty()), "fused_step: ", what, " has ",
                    list.size(), " tensors for ", count, " parameters");
}

// A companion of the parameter: same elements in the same places.
void check_like(const at::Tensor& tensor, const at::Tensor& param, const char* what, size_t i) {
  TORCH_CHECK_VALUE(tensor.sizes() == param.sizes(), "fused_step: ", what, "[", i, "] has shape ",
                    tensor.sizes(), ", its parameter ", param.sizes());
  TORCH_CHECK_VALUE(tensor.strides() == param.strides() || param.numel() < 2 ||
                        (tensor.is_contiguous() && param.is_contiguous()),
                    "fused_step: ", what, "[", i, "] has strides ", tensor.strides(), ", its parameter ",
                    param.strides());
  TORCH_CHECK_VALUE(tensor.device() == param.device(), "fused_step: ", what, "[", i, "] is on ",
                    tensor.device(), ", its parameter on ", param.device());
}

void check_float(const at::Tensor& tensor, const at::Tensor& param, const char* what, size_t i) {
  check_like(tensor, param, what, i);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "fused_step: ", what, "[", i,
                   "] must be float32, not ", tensor.scalar_type());
}

int64_t channels_of(const at::Tensor& param) { return param.dim() > 0 ? param.size(0) : 1; }

}  // namespace

StepOptions step_options(const StepArguments& a) {
  StepOptions o{};
  o.rule = rule_of(a.rule);
  const bool on_device = !a.hyper.device().is_cpu();
  TORCH_CHECK_VALUE(a.hyper.scalar_type() == at::kDouble && a.hyper.is_contiguous() &&
                        a.hyper.numel() == kHyperCount &&
                        (!on_device || (!a.params.empty() && a.hyper.device() == a.params[0].device())),
                    "fused_step: hyper must be a contiguous float64 tensor of ", kHyperCount,
                    " numbers, on the CPU or on the device of the parameters");
  const auto* hyper = static_cast<const Hyper*>(a.hyper.const_data_ptr());
  if (on_device) {
    o.device_hyper = hyper;
  } else {
    o.hyper = *hyper;
  }
  o.levels = static_cast<int>(a.levels);
  o.level_factor = outer_level_factor(o.levels);
  TORCH_CHECK_VALUE(o.rule == Rule::kBase || o.level_factor > 0.0f,
                    "fused_step: levels must be 2, 3, 4, 8 or 16, not ", a.levels);
  o.has_momentum = !a.momentums.empty();
  o.adam = !a.seconds.empty();
  o.nesterov = a.nesterov;
  o.decoupled = a.decoupled;
  o.stochastic_rounding = a.seed >= 0;
  o.gradient_factor = a.maximize ? -1.0f : 1.0f;
  o.key = {static_cast<uint32_t>(a.seed), static_cast<uint32_t>(static_cast<uint64_t>(a.seed) >> 32), 0, 0};
  if (!a.params.empty()) o.param_dtype = dtype_of(a.params[0], "params[0]");
  if (o.has_momentum) o.momentum_dtype = dtype_of(a.momentums[0], "momentums[0]");

  TORCH_CHECK_VALUE(
      !o.adam || (o.has_momentum && (o.rule == Rule::kBase || o.rule == Rule::kAskew ||
                                     o.rule == Rule::kAskewGradient || o.rule == Rule::kAskewMemory)),
      "fused_step: rule '", a.rule, "' has no Adam form");
  TORCH_CHECK_VALUE(!a.moving_levels || o.rule == Rule::kSplitting || o.rule == Rule::kAlternating,
                    "fused_step: rule '", a.rule, "' has no moving levels");
  TORCH_CHECK_VALUE(
      !o.stochastic_rounding ||
          (o.param_dtype == Dtype::kBFloat16 && a.latents.empty() && !is_latent(o.rule)),
      "fused_step: stochastic rounding is for bfloat16 parameters without latent or master weights");
  return o;
}

void step_segments(const StepArguments& a, at::Device device, std::vector<StepSegment>& segments) {
  const Rule rule = rule_of(a.rule);
  const bool quantised = rule != Rule::kBase;
  const size_t count = a.params.size();
  check_count(a.grads, count, "grads", false);
  check_count(a.momentums, count, "momentums", true);
  check_count(a.seconds, count, "seconds", true);
  check_count(a.latents, count, "latents", !is_latent(rule));
  check_count(a.scales, quantised ? count : 0, "scales", false);
  check_count(a.sigmas, count, "sigmas", true);
  check_count(a.steps, count, "steps", a.seconds.empty() && a.seed < 0);

  segments.clear();
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& param = a.params[i];
    TORCH_CHECK_VALUE(param.device() == device, "fused_step: params[", i, "] is on ", param.device(),
                      ", not ", device);
    TORCH_CHECK_TYPE(param.scalar_type() == a.params[0].scalar_type(), "fused_step: params[", i, "] is ",
                     param.scalar_type(), ", params[0] ", a.params[0].scalar_type(),
                     "; pass one dtype at a time");
    TORCH_CHECK_VALUE(param.is_non_overlapping_and_dense(), "fused_step: params[", i,
                      "] is not dense in memory");
    check_like(a.grads[i], param, "grads", i);
    TORCH_CHECK_TYPE(a.grads[i].scalar_type() == param.scalar_type(), "fused_step: grads[", i, "] is ",
                     a.grads[i].scalar_type(), ", its parameter ", param.scalar_type());
    StepSegment s{};
    s.index = static_cast<uint32_t>(i);
    s.numel = param.numel();
    s.param = param.data_ptr();
    s.grad = a.grads[i].const_data_ptr();
    if (!a.momentums.empty()) {
      check_like(a.momentums[i], param, "momentums", i);
      TORCH_CHECK_TYPE(a.momentums[i].scalar_type() == a.momentums[0].scalar_type(), "fused_step: momentums[",
                       i, "] is ", a.momentums[i].scalar_type(), ", momentums[0] ",
                       a.momentums[0].scalar_type());
      s.momentum = a.momentums[i].data_ptr();
    }
    if (!a.seconds.empty()) {
      check_float(a.seconds[i], param, "seconds", i);
      s.second = static_cast<float*>(a.seconds[i].data_ptr());
    }
    if (!a.latents.empty()) {
      check_float(a.latents[i], param, "latents", i);
      s.latent = static_cast<float*>(a.latents[i].data_ptr());
    }
    if (!a.steps.empty()) {
      TORCH_CHECK_TYPE(a.steps[i].scalar_type() == at::kFloat && a.steps[i].numel() == 1,
                       "fused_step: steps[", i, "] must be one float32 number");
    }
    if (s.numel == 0) continue;
    const int64_t channels = channels_of(param);
    if (quantised) {
      const at::Tensor& scale = a.scales[i];
      TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat && scale.is_contiguous() && scale.device() == device,
                       "fused_step: scales[", i, "] must be contiguous float32 on ", device);
      const bool whole = scale.numel() == 1;
      s.row = whole ? s.numel : s.numel / channels;
      s.group = !whole && scale.dim() == 2 ? a.group_size : s.row;
      TORCH_CHECK_VALUE(s.group > 0, "fused_step: group_size must be positive, not ", a.group_size);
      s.scales_per_row = (s.row + s.group - 1) / s.group;
      TORCH_CHECK_VALUE(scale.numel() == s.numel / s.row * s.scales_per_row, "fused_step: scales[", i,
                        "] has shape ", scale.sizes(), " for a parameter of shape ", param.sizes());
      TORCH_CHECK_VALUE(whole || param.is_contiguous() || (scale.dim() == 1 && param.stride(0) == s.row),
                        "fused_step: params[", i, "] has strides ", param.strides(),
                        ", in which the slices of its scales are not consecutive");
      TORCH_CHECK_VALUE(!a.moving_levels || s.group == s.row,
                        "fused_step: moving levels are per channel or tensor");
      s.scale = static_cast<float*>(scale.data_ptr());
      s.next_scale = s.scale;
    }
    if (!a.sigmas.empty()) {
      const at::Tensor& sigma = a.sigmas[i];
      TORCH_CHECK_TYPE(sigma.scalar_type() == at::kFloat && sigma.is_contiguous() &&
                           sigma.device() == device && (sigma.numel() == 1 || sigma.numel() == channels),
                       "fused_step: sigmas[", i, "] must be float32, one or one per channel, on ", device);
      s.sigma = static_cast<const float*>(sigma.const_data_ptr());
      s.sigma_row = s.numel / sigma.numel();
    }
    segments.push_back(s);
  }
}

}  // namespace quantopt

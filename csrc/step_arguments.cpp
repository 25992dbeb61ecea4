#include "step_arguments.h"

#include <ATen/core/TensorBody.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>

#include "dtype.h"
#include "memory.h"

namespace quantopt {
namespace {

// The index of a name in a table whose names are name_of(0), name_of(1), ...
template <size_t Count, class Name>
size_t find(std::string_view name, const char* what, const Name& name_of) {
  std::string known;
  for (size_t i = 0; i < Count; ++i) {
    if (name == name_of(i)) return i;
    known += (i == 0 ? "" : ", ") + std::string(name_of(i));
  }
  TORCH_CHECK_VALUE(false, "fused_step: unknown ", what, " '", name, "'; use one of ", known);
}

Rule rule_of(std::string_view name) {
  return static_cast<Rule>(find<std::size(kRules)>(name, "rule", [](size_t i) { return kRules[i].name; }));
}

Base base_of(std::string_view name) {
  return static_cast<Base>(find<std::size(kBaseNames)>(name, "base", [](size_t i) { return kBaseNames[i]; }));
}

void check_count(at::TensorList list, size_t count, const char* what, bool optional) {
  TORCH_CHECK_VALUE(list.size() == count || (optional && list.empty()), "fused_step: ", what, " has ",
                    list.size(), " tensors for ", count, " parameters");
}

void check_element_memory(const at::Tensor& tensor, const char* what, size_t i) {
  TORCH_CHECK_VALUE(has_memory(tensor), "fused_step: ", what, "[", i,
                    "] has no memory: its storage was freed or resized");
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
  check_element_memory(tensor, what, i);
}

void check_float(const at::Tensor& tensor, const at::Tensor& param, const char* what, size_t i) {
  check_like(tensor, param, what, i);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "fused_step: ", what, "[", i,
                   "] must be float32, not ", tensor.scalar_type());
}

// The key of a seed, without step and tensor.
PhiloxKey key_of(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), 0, 0};
}

int64_t channels_of(const at::Tensor& param) { return param.dim() > 0 ? param.size(0) : 1; }

}  // namespace

StepOptions step_options(const StepRecord& r) {
  StepOptions o{};
  o.rule = rule_of(r.rule);
  o.base = base_of(r.base);
  const RuleFacts& facts = facts_of(o.rule);
  const bool on_device = !r.hyper.device().is_cpu();
  TORCH_CHECK_VALUE(r.hyper.scalar_type() == at::kDouble && r.hyper.is_contiguous() &&
                        r.hyper.numel() == kHyperCount &&
                        (!on_device || (!r.params.empty() && r.hyper.device() == r.params[0].device())),
                    "fused_step: hyper must be a contiguous float64 tensor of ", kHyperCount,
                    " numbers, on the CPU or on the device of params");
  check_memory(r.hyper, "fused_step", "hyper");
  const auto* hyper = static_cast<const Hyper*>(r.hyper.const_data_ptr());
  if (on_device) {
    o.device_hyper = hyper;
  } else {
    o.hyper = *hyper;
  }
  o.levels = r.levels > 0 && r.levels <= kMostLevels ? static_cast<int>(r.levels) : 0;
  o.level_factor = max_level_factor(o.levels);
  TORCH_CHECK_VALUE(!facts.quantised || o.level_factor > 0.0f,
                    "fused_step: levels must be 2, 3, 4, 8, 16 or 17, not ", r.levels);
  o.has_momentum = !r.momentum_buffers.empty();
  o.nesterov = r.nesterov;
  o.decoupled = r.decoupled;
  o.stochastic_rounding = r.seed >= 0;
  o.gradient_factor = r.maximize ? -1.0f : 1.0f;
  o.key = key_of(r.seed);
  o.state_key = key_of(r.state_seed);
  if (!r.params.empty()) o.param_dtype = dtype_of(r.params[0], "fused_step", "params[0]");
  if (!r.exp_avg_sqs.empty() && r.exp_avg_sqs[0].scalar_type() == at::kBFloat16)
    o.exp_avg_sq_dtype = Dtype::kBFloat16;
  if (o.has_momentum) o.momentum_dtype = dtype_of(r.momentum_buffers[0], "fused_step", "momentum_buffers[0]");

  TORCH_CHECK_VALUE(o.base != Base::kGiven || !o.has_momentum,
                    "fused_step: base 'given' takes grads as the direction; pass no momentum_buffers");
  TORCH_CHECK_VALUE(o.base == Base::kAdam || r.exp_avg_sqs.empty(), "fused_step: base '", r.base,
                    "' has no second moments; pass no exp_avg_sqs, or base 'adam'");
  TORCH_CHECK_VALUE(o.exp_avg_sq_dtype == Dtype::kFloat32 || r.state_seed >= 0,
                    "fused_step: exp_avg_sqs are bfloat16, which rounding to nearest would stall; pass "
                    "state_seed of at least 0, or float32");
  TORCH_CHECK_VALUE(o.exp_avg_sq_dtype == Dtype::kBFloat16 || r.state_seed < 0,
                    "fused_step: state_seed is for bfloat16 exp_avg_sqs; pass state_seed=-1");
  TORCH_CHECK_VALUE(!r.dynamic_scale || facts.dynamic_scale, "fused_step: rule '", r.rule,
                    "' has no dynamic scale; pass dynamic_scale=False");
  TORCH_CHECK_VALUE(
      !o.stochastic_rounding || (o.param_dtype == Dtype::kBFloat16 && r.latents.empty() && !facts.latent),
      "fused_step: stochastic rounding is for bfloat16 params without latents; pass seed=-1");
  return o;
}

void step_segments(const StepRecord& r, at::Device device, std::vector<StepSegment>& segments) {
  const RuleFacts& facts = facts_of(rule_of(r.rule));
  const bool adam = base_of(r.base) == Base::kAdam;
  const size_t count = r.params.size();
  check_count(r.grads, count, "grads", false);
  check_count(r.momentum_buffers, count, "momentum_buffers", !adam);
  check_count(r.exp_avg_sqs, count, "exp_avg_sqs", !adam);
  check_count(r.latents, count, "latents", !facts.latent);
  check_count(r.scales, facts.quantised ? count : 0, "scales", false);
  check_count(r.latent_bounds, count, "latent_bounds", true);
  check_count(r.steps, count, "steps", !adam && r.seed < 0);

  segments.clear();
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& param = r.params[i];
    TORCH_CHECK_VALUE(param.device() == device, "fused_step: params[", i, "] is on ", param.device(),
                      ", not ", device);
    TORCH_CHECK_TYPE(param.scalar_type() == r.params[0].scalar_type(), "fused_step: params[", i, "] is ",
                     param.scalar_type(), ", params[0] ", r.params[0].scalar_type(),
                     "; pass one dtype at a time");
    TORCH_CHECK_VALUE(param.is_non_overlapping_and_dense(), "fused_step: params[", i,
                      "] is not dense in memory");
    check_element_memory(param, "params", i);
    check_like(r.grads[i], param, "grads", i);
    TORCH_CHECK_TYPE(r.grads[i].scalar_type() == param.scalar_type(), "fused_step: grads[", i, "] is ",
                     r.grads[i].scalar_type(), ", its parameter ", param.scalar_type());
    StepSegment s{};
    s.index = static_cast<uint32_t>(i);
    s.numel = param.numel();
    s.param = param.data_ptr();
    s.grad = r.grads[i].const_data_ptr();
    if (!r.momentum_buffers.empty()) {
      const at::Tensor& momentum = r.momentum_buffers[i];
      check_like(momentum, param, "momentum_buffers", i);
      TORCH_CHECK_TYPE(momentum.scalar_type() == r.momentum_buffers[0].scalar_type(),
                       "fused_step: momentum_buffers[", i, "] is ", momentum.scalar_type(),
                       ", momentum_buffers[0] ", r.momentum_buffers[0].scalar_type());
      s.momentum = momentum.data_ptr();
    }
    if (!r.exp_avg_sqs.empty()) {
      const at::Tensor& exp_avg_sq = r.exp_avg_sqs[i];
      check_like(exp_avg_sq, param, "exp_avg_sqs", i);
      const auto dtype = exp_avg_sq.scalar_type();
      TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, "fused_step: exp_avg_sqs[", i,
                       "] must be float32 or bfloat16, not ", dtype);
      TORCH_CHECK_TYPE(dtype == r.exp_avg_sqs[0].scalar_type(), "fused_step: exp_avg_sqs[", i, "] is ", dtype,
                       ", exp_avg_sqs[0] ", r.exp_avg_sqs[0].scalar_type());
      s.exp_avg_sq = exp_avg_sq.data_ptr();
    }
    if (!r.latents.empty()) {
      check_float(r.latents[i], param, "latents", i);
      s.latent = static_cast<float*>(r.latents[i].data_ptr());
    }
    if (!r.steps.empty()) {
      const at::Tensor& step = r.steps[i];
      TORCH_CHECK_TYPE(step.scalar_type() == at::kFloat && step.numel() == 1, "fused_step: steps[", i,
                       "] must be one float32 number");
      TORCH_CHECK_VALUE(step.device() == device, "fused_step: steps[", i, "] is on ", step.device(),
                        ", not on ", device);
      check_element_memory(step, "steps", i);
    }
    if (s.numel == 0) continue;
    const int64_t channels = channels_of(param);
    if (facts.quantised) {
      const at::Tensor& scale = r.scales[i];
      TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat && scale.is_contiguous() && scale.device() == device,
                       "fused_step: scales[", i, "] must be contiguous float32 on ", device);
      check_element_memory(scale, "scales", i);
      const bool one = scale.numel() == 1;
      s.row = one ? s.numel : s.numel / channels;
      s.group = !one && scale.dim() == 2 ? std::min(r.group_size, s.row) : s.row;
      TORCH_CHECK_VALUE(s.group > 0, "fused_step: group_size must be positive, not ", r.group_size);
      s.scales_per_row = (s.row + s.group - 1) / s.group;
      TORCH_CHECK_VALUE(scale.numel() == s.numel / s.row * s.scales_per_row, "fused_step: scales[", i,
                        "] has shape ", scale.sizes(), " for a parameter of shape ", param.sizes());
      TORCH_CHECK_VALUE(one || param.is_contiguous() || (scale.dim() == 1 && param.stride(0) == s.row),
                        "fused_step: params[", i, "] has strides ", param.strides(),
                        ", in which the slices of its scales are not consecutive");
      s.scale = static_cast<float*>(scale.data_ptr());
      s.next_scale = s.scale;
    }
    if (!r.latent_bounds.empty()) {
      const at::Tensor& bound = r.latent_bounds[i];
      const bool by_row = bound.numel() == 1 || bound.numel() == channels;
      TORCH_CHECK_TYPE(bound.scalar_type() == at::kFloat && bound.is_contiguous() &&
                           bound.device() == device &&
                           (by_row || (facts.quantised && bound.sizes() == r.scales[i].sizes())),
                       "fused_step: latent_bounds[", i,
                       "] must be float32, one, one per channel or one per scale, on ", device);
      check_element_memory(bound, "latent_bounds", i);
      s.latent_bound = static_cast<const float*>(bound.const_data_ptr());
      s.bound_row = by_row ? s.numel / bound.numel() : 0;
    }
    segments.push_back(s);
  }
}

}  // namespace quantopt

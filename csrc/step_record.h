// The arguments of the op quantopt::fused_step as one value, in the order of its schema (ops.cpp). What each
// is stands at StepRecord of quantopt/rules.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace quantopt {

struct StepRecord {  // does not own the lists
  std::string_view rule, base;
  at::TensorList params, grads, momentum_buffers, exp_avg_sqs, latents, scales, latent_bounds, steps;
  at::Tensor hyper;
  int64_t levels, group_size;
  bool dynamic_scale, nesterov, maximize, decoupled;
  int64_t seed, state_seed;
  std::optional<at::Tensor> grad_scale, found_inf;
};

}  // namespace quantopt

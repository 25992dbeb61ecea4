// The CUDA step on the host, behind a C interface for ctypes.
#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "cuda_runtime.h"
// clang-format off: each file as the compiler of CUDA sees it
#include "cuda/step.cu"
#include "cuda/step_base.cu"
#include "cuda/step_prox.cu"
#include "cuda/step_askew.cu"
#include "cuda/step_askew_gradient.cu"
#include "cuda/step_askew_memory.cu"
#include "cuda/step_splitting.cu"
#include "cuda/step_alternating.cu"
// clang-format on

using quantopt::CudaStepInputs;
using quantopt::Dtype;
using quantopt::Hyper;
using quantopt::Rule;
using quantopt::StepOptions;
using quantopt::StepSegment;

namespace {

template <class T>
T* reserve(int64_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
}

}  // namespace

extern "C" {

// Mirrors HostStep in tests/test_cuda_build.py. Every array has `count` entries; a null array means that
// there is no such state.
struct HostStep {
  int32_t rule, levels, param_dtype, momentum_dtype;
  int32_t nesterov, decoupled, moving_levels, hyper_on_device, backwards;
  float gradient_factor;
  int64_t seed, count;
  const Hyper* hyper;
  const float *grad_scale, *found_inf;
  void **params, **grads, **momentums, **seconds, **latents, **scales, **sigmas;
  float** steps;
  const int64_t *numels, *rows, *groups, *sigma_rows;
};

// Returns the number of launches, or -1 on an error.
int64_t step_on_host(const HostStep* h) {
  StepOptions o{};
  o.rule = static_cast<Rule>(h->rule);
  o.param_dtype = static_cast<Dtype>(h->param_dtype);
  o.momentum_dtype = static_cast<Dtype>(h->momentum_dtype);
  if (h->hyper_on_device) {
    o.device_hyper = h->hyper;
  } else {
    o.hyper = *h->hyper;
  }
  o.levels = h->levels;
  o.level_factor = quantopt::outer_level_factor(h->levels);
  o.has_momentum = h->momentums != nullptr;
  o.adam = h->seconds != nullptr;
  o.nesterov = h->nesterov;
  o.decoupled = h->decoupled;
  o.stochastic_rounding = h->seed >= 0;
  o.gradient_factor = h->gradient_factor;
  o.key.seed_low = static_cast<uint32_t>(h->seed);
  o.key.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(h->seed) >> 32);
  std::vector<StepSegment> segments;
  for (int64_t i = 0; i < h->count; ++i) {
    StepSegment s{};
    s.index = static_cast<uint32_t>(i);
    s.numel = h->numels[i];
    if (s.numel == 0) continue;
    s.param = h->params[i];
    s.grad = h->grads[i];
    s.momentum = h->momentums ? h->momentums[i] : nullptr;
    s.second = h->seconds ? static_cast<float*>(h->seconds[i]) : nullptr;
    s.latent = h->latents ? static_cast<float*>(h->latents[i]) : nullptr;
    if (h->scales) {
      s.scale = static_cast<float*>(h->scales[i]);
      s.row = h->rows[i];
      s.group = h->groups[i];
      s.scales_per_row = (s.row + s.group - 1) / s.group;
    }
    s.sigma = h->sigmas ? static_cast<const float*>(h->sigmas[i]) : nullptr;
    s.sigma_row = h->sigma_rows[i];
    segments.push_back(s);
  }
  launches = 0;
  backwards = h->backwards;
  const auto count = static_cast<int64_t>(segments.size());
  const int64_t bytes = quantopt::cuda_step_workspace(segments.data(), count, h->moving_levels);
  std::vector<double> workspace(static_cast<size_t>(bytes / 8 + 1), -1.0);
  const CudaStepInputs inputs{h->grad_scale,         h->found_inf,     h->steps, h->steps ? h->count : 0,
                              h->moving_levels != 0, workspace.data(), 0,        nullptr};
  return quantopt::step_on_cuda(o, segments.data(), count, inputs) == nullptr ? launches : -1;
}

// Runs the last two blocks of a tensor of `numel` elements in `row`s with a scale each; its memory is
// reserved, but only what the blocks touch exists. The last gradient is large and the last scale 0.5, so that
// the last element goes to -0.5. Returns it.
float last_element_of_huge_tensor(int64_t numel, int64_t row) {
  StepOptions o{};
  o.rule = Rule::kAskew;
  o.hyper = Hyper{0.1, 0.0, 0.0, 0.0, 0.0, 1.0, 0.1, 0.25};
  o.levels = 2;
  o.level_factor = quantopt::outer_level_factor(2);
  o.gradient_factor = 1.0f;
  StepSegment s{};
  s.numel = numel;
  s.row = s.group = row;
  s.scales_per_row = 1;
  float* param = reserve<float>(numel);
  float* grad = reserve<float>(numel);
  float* scale = reserve<float>(numel / row);
  if (param == nullptr || grad == nullptr || scale == nullptr) return -1.0f;
  s.param = param;
  s.grad = grad;
  s.scale = scale;
  grad[numel - 1] = 100.0f;
  for (int64_t i = std::max<int64_t>(0, numel / row - 10000); i < numel / row; ++i) scale[i] = 0.25f;
  scale[numel / row - 1] = 0.5f;
  blocks_from_the_end = 2;
  const char* error = quantopt::step_on_cuda(o, &s, 1, CudaStepInputs{});
  blocks_from_the_end = ~0u;
  const float last = param[numel - 1];
  munmap(param, numel * sizeof(float));
  munmap(grad, numel * sizeof(float));
  munmap(scale, numel / row * sizeof(float));
  return error == nullptr ? last : -1.0f;
}

}  // extern "C"

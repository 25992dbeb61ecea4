// The CUDA step on the host, behind a C interface for ctypes.
#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "cuda/askew_step.cu"

using quantopt::CudaStepInputs;
using quantopt::Rule;
using quantopt::StepOptions;
using quantopt::StepSegment;

namespace {

StepOptions options_of(int rule, const double* hyper, int levels, bool momentum, bool adam, bool nesterov,
                       bool decoupled, float gradient_factor) {
  constexpr Rule rules[] = {Rule::kBase, Rule::kAskew, Rule::kAskewGradient, Rule::kAskewMemory};
  StepOptions o{};
  o.rule = rules[rule];
  std::memcpy(&o.hyper, hyper, sizeof(o.hyper));
  o.levels = levels;
  o.level_factor = quantopt::outer_level_factor(levels);
  o.has_momentum = momentum;
  o.adam = adam;
  o.nesterov = nesterov;
  o.decoupled = decoupled;
  o.gradient_factor = gradient_factor;
  return o;
}

template <class T>
T* reserve(int64_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
}

}  // namespace

extern "C" {

// Every array has `count` entries; a null array means that there is no such state. Returns the number of
// launches, or -1 on an error.
int64_t step_on_host(int rule, const double* hyper, int levels, bool nesterov, bool decoupled,
                     float gradient_factor, int64_t count, void** params, void** grads, void** momentums,
                     void** seconds, void** latents, void** scales, float** steps, const int64_t* numels,
                     const int64_t* rows, const int64_t* groups, const float* grad_scale,
                     const float* found_inf) {
  const StepOptions o = options_of(rule, hyper, levels, momentums != nullptr, seconds != nullptr, nesterov,
                                   decoupled, gradient_factor);
  std::vector<StepSegment> segments;
  for (int64_t i = 0; i < count; ++i) {
    StepSegment s{};
    s.index = static_cast<uint32_t>(i);
    s.numel = numels[i];
    if (s.numel == 0) continue;
    s.param = params[i];
    s.grad = grads[i];
    s.momentum = momentums ? momentums[i] : nullptr;
    s.second = seconds ? static_cast<float*>(seconds[i]) : nullptr;
    s.latent = latents ? static_cast<float*>(latents[i]) : nullptr;
    s.scale = scales ? static_cast<float*>(scales[i]) : nullptr;
    s.row = rows[i];
    s.group = groups[i];
    s.scales_per_row = s.group ? (s.row + s.group - 1) / s.group : 0;
    segments.push_back(s);
  }
  launches = 0;
  const CudaStepInputs inputs{grad_scale, found_inf, steps, steps ? count : 0};
  const char* error = quantopt::askew_step_on_cuda(o, segments.data(), static_cast<int64_t>(segments.size()),
                                                   inputs, 0, nullptr);
  return error == nullptr ? launches : -1;
}

// Runs the last two blocks of a tensor of `numel` elements in `row`s with a scale each; its memory is
// reserved, but only what the blocks touch exists. The last gradient is large and the last scale 0.5, so that
// the last element goes to -0.5. Returns it.
float last_element_of_huge_tensor(int64_t numel, int64_t row) {
  const double hyper[quantopt::kHyperCount] = {0.1, 0.0, 0.0, 0.0, 0.0, 1.0, 0.1, 0.25};
  const StepOptions o = options_of(1, hyper, 2, false, false, false, false, 1.0f);
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
  const char* error = quantopt::askew_step_on_cuda(o, &s, 1, CudaStepInputs{}, 0, nullptr);
  blocks_from_the_end = ~0u;
  const float last = param[numel - 1];
  munmap(param, numel * sizeof(float));
  munmap(grad, numel * sizeof(float));
  munmap(scale, numel / row * sizeof(float));
  return error == nullptr ? last : -1.0f;
}

}  // extern "C"

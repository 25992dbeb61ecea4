// What one fused step is told, shared by the CPU and CUDA launchers. No torch below this line.
#pragma once

#include <cstdint>

#include "base.h"
#include "hyper.h"
#include "philox.h"
#include "rules.h"

namespace quantopt {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// One tensor of the list: pointers to dense memory of the same layout, or null where there is no such state.
struct StepSegment {
  void* param;
  const void* grad;
  void* momentum;             // m of SGD or Adam
  void* exp_avg_sq;           // v of Adam
  float* latent;              // l, x or u of the rule; for the other rules the fp32 master weights
  float* scale;               // one per span of `group` elements of a row
  float* next_scale;          // the scales after the step, where they are dynamic; else equal to scale
  const float* latent_bound;  // alternating: bounds of the latent; null: not clipped
  int64_t numel;
  int64_t row;             // elements per row; a scale never spans two rows
  int64_t group;           // elements per scale inside a row
  int64_t scales_per_row;  // ceil(row / group)
  int64_t bound_row;       // elements per latent bound; 0: one for each scale
  double step;             // k of Adam
  uint32_t index;          // number of the tensor, for random numbers
};

struct StepOptions {
  Rule rule;
  Base base;
  Dtype param_dtype;
  Dtype momentum_dtype;
  Dtype exp_avg_sq_dtype;     // kFloat32, or kBFloat16, which is rounded stochastically
  Hyper hyper;                // lr = 0: weights, latents and scales stay as they are
  const Hyper* device_hyper;  // CUDA: where not null, the numbers are read there when the kernels run
  int levels;                 // K; not used by kNone
  float level_factor;         // hi = level_factor * scale
  bool has_momentum;          // of SGD; Adam always has
  bool nesterov;
  bool decoupled;
  bool stochastic_rounding;  // bfloat16 parameters without a latent or master
  bool prefetch;             // CPU: software prefetch
  bool stream;               // CPU: store weights that are not read past the caches
  float gradient_factor;     // (maximize ? -1 : 1) / grad_scale
  PhiloxKey key;             // of stochastic_rounding
  PhiloxKey state_key;       // of exp_avg_sq
};

}  // namespace quantopt

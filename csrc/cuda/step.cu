#include <algorithm>
#include <cstddef>
#include <limits>

#include "core/rules.h"
#include "cuda/step.h"
#include "cuda/step_launch.h"

// Launches the kernels of the step over tables of tensors, and holds the kernels that do not depend on the
// rule.

namespace quantopt {
namespace {

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();

// ---- counting the steps

#if CUDART_VERSION >= 12010
constexpr int kCounters = 4000;  // per launch
#else
constexpr int kCounters = 480;
#endif

struct Counters {
  float* at[kCounters];
  int count;
};

__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ Counters counters, const float* found_inf) {
  if (found_inf != nullptr && *found_inf != 0.0f) return;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i < static_cast<unsigned>(counters.count)) *counters.at[i] += 1.0f;
}

cudaError_t count_steps(const CudaStepInputs& inputs, cudaStream_t stream) {
  for (int64_t first = 0; inputs.steps != nullptr && first < inputs.step_count; first += kCounters) {
    Counters counters;
    counters.count = static_cast<int>(std::min<int64_t>(kCounters, inputs.step_count - first));
    std::copy_n(inputs.steps + first, counters.count, counters.at);
    const unsigned blocks = (static_cast<unsigned>(counters.count) + kThreads - 1) / kThreads;
    const cudaError_t error =
        launch<kStepArgumentBytes>(launch_of(blocks, stream), count_kernel, counters, inputs.found_inf);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// ---- dynamic scales of groups that are too long for a block

constexpr int kLongTensors = 64;  // per launch

struct LongTensor {
  float* scale;
  float* previous_scale;
  const double* partial;
  int64_t row, group, scales_per_row, chunks;
};

struct LongTable {
  LongTensor tensors[kLongTensors];
  uint32_t first_block[kLongTensors + 1];  // one block per scale
  int count;
};

// Copies the scale to `previous_scale` and, unless frozen (lr = 0; of `hyper` on the device, where it is not
// null), replaces it by the mean over the sums of the chunks, in an order that depends on their number alone.
__global__ void __launch_bounds__(kThreads)
    scale_epilogue_kernel(const __grid_constant__ LongTable table, const float* found_inf, const Hyper* hyper,
                          bool frozen) {
  if (found_inf != nullptr && *found_inf != 0.0f) return;
  if (hyper != nullptr) frozen = hyper->lr == 0.0;
  int at = 0;
  while (at + 1 < table.count && table.first_block[at + 1] <= blockIdx.x) ++at;
  const LongTensor& t = table.tensors[at];
  const int64_t scale = blockIdx.x - table.first_block[at];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < t.chunks; i += kThreads) sum += t.partial[scale * t.chunks + i];
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    if (static_cast<int>(threadIdx.x) < distance) sums[threadIdx.x] += sums[threadIdx.x + distance];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const int64_t left = t.row - scale % t.scales_per_row * t.group;
    t.previous_scale[scale] = t.scale[scale];
    if (!frozen)
      t.scale[scale] = static_cast<float>(sums[0] / static_cast<double>(left < t.group ? left : t.group));
  }
}

bool is_long(const StepSegment& s) { return s.group > kBlockRow; }
int64_t scales_in(const StepSegment& s) { return s.numel / s.row * s.scales_per_row; }
int64_t chunks_in(int64_t elements) { return (elements + kChunk - 1) / kChunk; }
int64_t parts_of(const StepSegment& s) { return scales_in(s) * chunks_in(s.group); }

// ---- tables

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// `by_groups`: a thread reads elements of one group.
Access access_of(const StepTensor& t, int vector, bool by_groups) {
  if (!(aligned(t.param) && aligned(t.grad) && aligned(t.momentum) && aligned(t.exp_avg_sq) &&
        aligned(t.latent))) {
    return Access::kElements;
  }
  if (t.scale == nullptr) return Access::kOneScale;
  const bool whole_rows = t.row % vector == 0, whole_groups = t.group % vector == 0;
  if (by_groups) {
    const bool aligned_groups = (whole_rows || t.row == t.numel) && (whole_groups || t.group == t.row);
    return aligned_groups ? Access::kScalePerVector : Access::kElements;
  }
  const bool one_bound = t.latent_bound == nullptr || t.bound_row == t.numel;
  if (t.row == t.numel && t.group == t.row && one_bound) return Access::kOneScale;
  const bool share = whole_rows && whole_groups && (one_bound || t.bound_row % vector == 0);
  return share ? Access::kScalePerVector : Access::kElements;
}

// `first` stands for all segments: each list of a step has one dtype and is empty or complete.
Storage storage_of(const StepOptions& o, const StepSegment& first) {
  const Dtype momentum = first.momentum != nullptr ? o.momentum_dtype : o.param_dtype;
  const bool has_master = first.latent != nullptr && !facts_of(o.rule).latent;
  if (o.param_dtype == Dtype::kFloat32 && momentum == Dtype::kFloat32 &&
      o.exp_avg_sq_dtype == Dtype::kFloat32 && !has_master)
    return Storage::kFloat32;
  if (o.param_dtype == Dtype::kBFloat16 && first.latent == nullptr) {
    if (momentum == Dtype::kBFloat16) return Storage::kBFloat16;
    if (momentum == Dtype::kFloat32) return Storage::kBFloat16Wide;
  }
  return Storage::kAny;
}

constexpr cudaError_t (*kLaunchers[])(const StepLaunch&) = {
#define QUANTOPT_ROW(rule, name, Row) &launch_rule<Rule::rule>,
    QUANTOPT_RULES(QUANTOPT_ROW)
#undef QUANTOPT_ROW
};

class Launcher {
 public:
  Launcher(const StepOptions& options, const CudaStepInputs& inputs, const StepSegment& first)
      : options_(options),
        inputs_(inputs),
        storage_(storage_of(options, first)),
        params_{options.hyper,
                options.device_hyper,
                inputs.grad_scale,
                inputs.found_inf,
                options.gradient_factor,
                options.level_factor,
                options.levels,
                options.param_dtype,
                options.momentum_dtype,
                options.exp_avg_sq_dtype,
                options.nesterov,
                options.decoupled,
                options.stochastic_rounding,
                options.key.seed_low,
                options.key.seed_high,
                options.state_key.seed_low,
                options.state_key.seed_high} {}

  cudaError_t run(const StepSegment* segments, int64_t count) {
    if (!inputs_.dynamic_scale) return launch_over(segments, count, Phase::kStep);
    cudaError_t error = launch_over(segments, count, Phase::kGroups);
    if (error == cudaSuccess) error = launch_over(segments, count, Phase::kRows);
    if (error == cudaSuccess) error = launch_over(segments, count, Phase::kMagnitude);
    if (error == cudaSuccess) error = launch_epilogue(segments, count);
    if (error == cudaSuccess) error = launch_over(segments, count, Phase::kStep);
    return error;
  }

 private:
  // Whether a phase is for this segment. Without dynamic scales the only phase is kStep, for all.
  bool takes(Phase phase, const StepSegment& s) const {
    if (!inputs_.dynamic_scale) return true;
    if (is_long(s)) return phase == Phase::kMagnitude || phase == Phase::kStep;
    return phase == (s.group <= 32 * vector_of(storage_) ? Phase::kGroups : Phase::kRows);
  }

  int64_t blocks_of(Phase phase, const StepSegment& s) const {
    const auto blocks = [&](int64_t groups_per_block) {
      return (scales_in(s) + groups_per_block - 1) / groups_per_block;
    };
    switch (phase) {
      case Phase::kGroups:
        return blocks(group_rounds(storage_, options_.base == Base::kAdam) *
                      (kThreads / lanes_of(s.group, vector_of(storage_))));
      case Phase::kRows: return blocks(s.group <= kWarpRow ? kThreads / 32 : 1);
      case Phase::kMagnitude: return parts_of(s);
      case Phase::kStep: break;
    }
    return chunks_in(s.numel);
  }

  cudaError_t launch_over(const StepSegment* segments, int64_t count, Phase phase) {
    StepTable table;
    table.count = 0;
    table.first_block[0] = 0;
    const Storage storage = phase == Phase::kMagnitude ? Storage::kAny : storage_;
    const auto flush = [&] {
      if (table.count == 0) return cudaSuccess;
      const StepLaunch step{table,
                            params_,
                            phase,
                            storage,
                            options_.levels == 2,
                            options_.base == Base::kAdam,
                            static_cast<cudaStream_t>(inputs_.stream)};
      const cudaError_t error = kLaunchers[static_cast<int>(options_.rule)](step);
      table.count = 0;
      return error;
    };
    Workspace workspace(segments, count, inputs_.workspace);
    for (int64_t i = 0; i < count; ++i) {
      const StepSegment& s = segments[i];
      if (!takes(phase, s)) continue;
      const int64_t blocks = blocks_of(phase, s);
      if (table.count == kTensors || table.first_block[table.count] + blocks > kMaxBlocks) {
        const cudaError_t error = flush();
        if (error != cudaSuccess) return error;
      }
      StepTensor& t = table.tensors[table.count];
      t.param = s.param;
      t.grad = s.grad;
      t.momentum = s.momentum;
      t.exp_avg_sq = s.exp_avg_sq;
      t.latent = s.latent;
      t.scale = s.scale;
      t.previous_scale = s.scale;
      t.latent_bound = s.latent_bound;
      t.numel = s.numel;
      t.row = s.row;
      t.group = s.group;
      t.scales_per_row = s.scales_per_row;
      t.bound_row = s.bound_row;
      t.index = s.index;
      t.access = access_of(t, vector_of(storage), phase != Phase::kStep);
      t.step = inputs_.steps != nullptr ? inputs_.steps[s.index] : nullptr;
      t.partial = nullptr;
      if (inputs_.dynamic_scale && is_long(s)) {
        if (phase == Phase::kMagnitude) t.partial = workspace.partial;
        if (phase == Phase::kStep) t.previous_scale = workspace.previous_scales;
        workspace.advance(s);
      }
      table.first_block[table.count + 1] = table.first_block[table.count] + static_cast<uint32_t>(blocks);
      ++table.count;
    }
    return flush();
  }

  cudaError_t launch_epilogue(const StepSegment* segments, int64_t count) {
    LongTable table;
    table.count = 0;
    table.first_block[0] = 0;
    const auto flush = [&] {
      if (table.count == 0) return cudaSuccess;
      const Launch how = launch_of(table.first_block[table.count], static_cast<cudaStream_t>(inputs_.stream));
      const cudaError_t error = launch(how, scale_epilogue_kernel, table, inputs_.found_inf,
                                       options_.device_hyper, options_.hyper.lr == 0.0);
      table.count = 0;
      return error;
    };
    Workspace workspace(segments, count, inputs_.workspace);
    for (int64_t i = 0; i < count; ++i) {
      const StepSegment& s = segments[i];
      if (!is_long(s)) continue;
      if (table.count == kLongTensors || table.first_block[table.count] + scales_in(s) > kMaxBlocks) {
        const cudaError_t error = flush();
        if (error != cudaSuccess) return error;
      }
      table.tensors[table.count] = {s.scale, workspace.previous_scales, workspace.partial, s.row,
                                    s.group, s.scales_per_row,          chunks_in(s.group)};
      workspace.advance(s);
      table.first_block[table.count + 1] =
          table.first_block[table.count] + static_cast<uint32_t>(scales_in(s));
      ++table.count;
    }
    return flush();
  }

  // The sums of the chunks of all long groups, then the previous scales of these, tensor by tensor.
  struct Workspace {
    double* partial;
    float* previous_scales;

    Workspace(const StepSegment* segments, int64_t count, void* memory)
        : partial(static_cast<double*>(memory)) {
      int64_t sums = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (is_long(segments[i])) sums += parts_of(segments[i]);
      }
      previous_scales = reinterpret_cast<float*>(partial + sums);
    }
    void advance(const StepSegment& s) {
      partial += parts_of(s);
      previous_scales += scales_in(s);
    }
  };

  const StepOptions& options_;
  const CudaStepInputs& inputs_;
  Storage storage_;
  StepParams params_;
};

}  // namespace

int64_t cuda_step_workspace(const StepSegment* segments, int64_t count, bool dynamic_scale) {
  int64_t bytes = 0;
  for (int64_t i = 0; dynamic_scale && i < count; ++i) {
    const StepSegment& s = segments[i];
    if (is_long(s)) {
      bytes += parts_of(s) * static_cast<int64_t>(sizeof(double)) +
               scales_in(s) * static_cast<int64_t>(sizeof(float));
    }
  }
  return bytes;
}

const char* step_on_cuda(const StepOptions& options, const StepSegment* segments, int64_t count,
                         const CudaStepInputs& inputs) {
  const auto stream = static_cast<cudaStream_t>(inputs.stream);
  cudaError_t error = cudaSetDevice(inputs.device);
  if (error == cudaSuccess) error = count_steps(inputs, stream);
  if (error == cudaSuccess && count > 0) {
    Launcher launcher(options, inputs, segments[0]);
    error = launcher.run(segments, count);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace quantopt

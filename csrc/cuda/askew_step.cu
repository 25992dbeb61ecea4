#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cstddef>

#include "core/askew.h"
#include "core/base.h"
#include "core/simple.h"
#include "cuda/askew_step.h"

// One launch serves up to kTensors tensors: the table of their pointers is a kernel argument, and a block
// finds its tensor and its chunk there. The arithmetic is that of csrc/core, compiled without contraction
// into fused multiply-add (setup.py), so that the result is that of the CPU kernels bit for bit. A thread
// reads and writes 16 bytes at a time where the pointers allow it; what is left over, or not aligned, goes
// element by element.

namespace quantopt {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;                          // floats in 16 bytes
constexpr int64_t kChunk = kThreads * kVector * 4;  // elements per block
constexpr int kTensors = 32;                        // per launch; the arguments of a kernel are at most 4 KiB

enum class Access : int {
  kOneScale,        // 16 bytes at a time, one scale for the tensor (or none)
  kScalePerVector,  // 16 bytes at a time, which share a scale
  kElements,        // element by element
};

struct Tensor {
  float* param;
  const float* grad;
  float* momentum;
  float* second;
  float* latent;
  const float* scale;
  const float* step;
  int64_t numel;
  int64_t row, group, scales_per_row;
};

struct Table {
  int64_t first_block[kTensors + 1];  // of each tensor; the last entry is the number of blocks
  Tensor tensors[kTensors];
  Access access[kTensors];
  int count;
};

struct Shared {
  const float* grad_scale;
  const float* found_inf;
  float gradient_factor;
};

// ---- rules: what is the same for all tensors travels by value, the grid follows from the scale
// ----------------

struct MakeBase {
  static constexpr bool kScaled = false;
  using Rule = BaseStep;
  BaseStep base;
  __device__ Rule operator()(float) const { return base; }
};

template <class RuleOfGrid>
struct MakeAskew {
  static constexpr bool kScaled = true;
  using Rule = RuleOfGrid;
  AskewConstants constants;
  float level_factor;
  int levels;
  __device__ Rule operator()(float scale) const {
    return {constants, make_grid(scale, level_factor, levels)};
  }
};

struct MakePlain {
  using Direction = PlainDirection;
  __device__ Direction operator()(const float*) const { return {}; }
};

struct MakeMomentum {
  using Direction = MomentumDirection;
  MomentumDirection direction;
  __device__ Direction operator()(const float*) const { return direction; }
};

struct MakeAdam {
  using Direction = AdamDirection;
  Hyper hyper;
  // The powers are costly: one thread computes them for the block.
  __device__ Direction operator()(const float* step) const {
    __shared__ AdamDirection direction;
    if (threadIdx.x == 0) direction = make_adam_direction(hyper, static_cast<double>(*step));
    __syncthreads();
    return direction;
  }
};

// ---- the kernel
// -----------------------------------------------------------------------------------------------

template <int N>
struct alignas(N * sizeof(float)) Pack {
  float at[N];
};

template <int N>
__device__ __forceinline__ Pack<N> load(const float* p) {
  return *reinterpret_cast<const Pack<N>*>(p);
}

template <int N>
__device__ __forceinline__ void store(float* p, const Pack<N>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (N == kVector) {  // said outright: the compiler splits the store where the elements' divisions
                                 // branch
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(pack.at[0]), "f"(pack.at[1]),
                 "f"(pack.at[2]), "f"(pack.at[3])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<N>*>(p) = pack;
}

// Elements i .. i + N - 1, which share a scale.
template <int N, class Rule, class Direction>
__device__ __forceinline__ void step_elements(const Tensor& t, int64_t i, float factor,
                                              const Direction& direction, const Rule& rule) {
  constexpr bool kReadsParam = !Rule::kLatent || Rule::kReadsWeight;
  const Pack<N> g = load<N>(t.grad + i);
  Pack<N> param{}, latent{}, m{}, v{};
  if constexpr (kReadsParam) param = load<N>(t.param + i);
  if constexpr (Rule::kLatent) latent = load<N>(t.latent + i);
  if constexpr (Direction::kMomentum) m = load<N>(t.momentum + i);
  if constexpr (Direction::kSecond) v = load<N>(t.second + i);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float w = Rule::kLatent ? latent.at[k] : param.at[k];
    const float d = direction(rule.gradient(g.at[k] * factor, w), m.at[k], v.at[k]);
    const float next = rule.step(w, d);
    if constexpr (Rule::kLatent) {
      latent.at[k] = next;
      param.at[k] = rule.weight(next, param.at[k]);
    } else {
      param.at[k] = next;
    }
  }
  if constexpr (Direction::kMomentum) store(t.momentum + i, m);
  if constexpr (Direction::kSecond) store(t.second + i, v);
  if constexpr (Rule::kLatent) store(t.latent + i, latent);
  store(t.param + i, param);
}

// The index of the scale of element i: scales start anew at every row.
__device__ __forceinline__ int64_t scale_index(const Tensor& t, int64_t i) {
  if (t.numel <= INT32_MAX) {  // 64-bit division takes several times as long
    const auto element = static_cast<uint32_t>(i), length = static_cast<uint32_t>(t.row);
    const uint32_t row = element / length;
    return row * t.scales_per_row + (element - row * length) / static_cast<uint32_t>(t.group);
  }
  const int64_t row = i / t.row;
  return row * t.scales_per_row + (i - row * t.row) / t.group;
}

template <class MakeRule, class MakeDirection>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Table table, const __grid_constant__ MakeRule make_rule,
                const __grid_constant__ MakeDirection make_direction, const Shared shared) {
  if (shared.found_inf != nullptr && *shared.found_inf != 0.0f) return;
  const int64_t block = blockIdx.x;
  int at = 0;
  for (int width = kTensors / 2; width > 0; width /= 2) {
    if (at + width < table.count && table.first_block[at + width] <= block) at += width;
  }
  const Tensor& t = table.tensors[at];
  const auto direction = make_direction(t.step);
  const float factor =
      shared.grad_scale != nullptr ? shared.gradient_factor / *shared.grad_scale : shared.gradient_factor;
  const int64_t begin = (block - table.first_block[at]) * kChunk;
  const int64_t end = min(begin + kChunk, t.numel);

  int64_t tail = begin;  // elements from here on go one by one
  if (table.access[at] != Access::kElements) {
    tail = end - end % kVector;
    const int64_t stride = kThreads * kVector;
    int64_t i = begin + threadIdx.x * kVector;
    if (table.access[at] == Access::kOneScale) {
      const auto rule = make_rule(MakeRule::kScaled ? *t.scale : 1.0f);
      for (; i < tail; i += stride) step_elements<kVector>(t, i, factor, direction, rule);
    } else {
      for (; i < tail; i += stride) {
        step_elements<kVector>(t, i, factor, direction, make_rule(t.scale[scale_index(t, i)]));
      }
    }
  }
  for (int64_t i = tail + threadIdx.x; i < end; i += kThreads) {
    step_elements<1>(t, i, factor, direction,
                     make_rule(MakeRule::kScaled ? t.scale[scale_index(t, i)] : 1.0f));
  }
}

// ---- counting the steps
// ---------------------------------------------------------------------------------------

constexpr int kCounters = 256;  // per launch

struct Counters {
  float* at[kCounters];
  int count;
};

__global__ void __launch_bounds__(kCounters)
    count_kernel(const __grid_constant__ Counters counters, const float* found_inf) {
  if (found_inf != nullptr && *found_inf != 0.0f) return;
  const int i = static_cast<int>(threadIdx.x);
  if (i < counters.count) *counters.at[i] += 1.0f;
}

// ---- launching
// ------------------------------------------------------------------------------------------------

// Returns the error of this launch: one left over by others is not ours to report or to clear.
template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  static_assert((sizeof(Arguments) + ...) + 16 * sizeof...(Arguments) <= 4096, "kernel arguments");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

cudaError_t count_steps(const CudaStepInputs& inputs, cudaStream_t stream) {
  for (int64_t first = 0; inputs.steps != nullptr && first < inputs.step_count; first += kCounters) {
    Counters counters;
    counters.count = static_cast<int>(std::min<int64_t>(kCounters, inputs.step_count - first));
    std::copy_n(inputs.steps + first, counters.count, counters.at);
    const cudaError_t error = launch(count_kernel, 1, kCounters, stream, counters, inputs.found_inf);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % (kVector * sizeof(float)) == 0; }

Access access_of(const Tensor& t) {
  if (!(aligned(t.param) && aligned(t.grad) && aligned(t.momentum) && aligned(t.second) &&
        aligned(t.latent))) {
    return Access::kElements;
  }
  if (t.scale == nullptr || (t.row == t.numel && t.group == t.row)) return Access::kOneScale;
  return t.row % kVector == 0 && t.group % kVector == 0 ? Access::kScalePerVector : Access::kElements;
}

template <class MakeRule, class MakeDirection>
cudaError_t launch_all(const StepSegment* segments, int64_t count, const CudaStepInputs& inputs,
                       const Shared& shared, const MakeRule& make_rule, const MakeDirection& make_direction,
                       cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = INT32_MAX;
  Table table;
  table.count = 0;
  table.first_block[0] = 0;
  const auto flush = [&] {
    if (table.count == 0) return cudaSuccess;
    const cudaError_t error = launch(step_kernel<MakeRule, MakeDirection>, table.first_block[table.count],
                                     kThreads, stream, table, make_rule, make_direction, shared);
    table.count = 0;
    return error;
  };
  for (int64_t i = 0; i < count; ++i) {
    const StepSegment& s = segments[i];
    const int64_t blocks = (s.numel + kChunk - 1) / kChunk;
    if (table.count == kTensors || table.first_block[table.count] + blocks > kMaxBlocks) {
      const cudaError_t error = flush();
      if (error != cudaSuccess) return error;
    }
    Tensor& t = table.tensors[table.count];
    t.param = static_cast<float*>(s.param);
    t.grad = static_cast<const float*>(s.grad);
    t.momentum = static_cast<float*>(s.momentum);
    t.second = s.second;
    t.latent = MakeRule::Rule::kLatent ? s.latent : nullptr;
    t.scale = s.scale;
    t.step = inputs.steps != nullptr ? inputs.steps[s.index] : nullptr;
    t.numel = s.numel;
    t.row = s.row;
    t.group = s.group;
    t.scales_per_row = s.scales_per_row;
    table.access[table.count] = access_of(t);
    table.first_block[table.count + 1] = table.first_block[table.count] + blocks;
    ++table.count;
  }
  return flush();
}

template <class Visit>
cudaError_t with_direction(const StepOptions& o, const Visit& visit) {
  if (o.adam) return visit(MakeAdam{o.hyper});
  if (o.has_momentum) return visit(MakeMomentum{{static_cast<float>(o.hyper.momentum), o.nesterov}});
  return visit(MakePlain{});
}

template <bool Binary, class Visit>
cudaError_t with_rule(const StepOptions& o, const Visit& visit) {
  const AskewConstants c = make_askew_constants(o.hyper, o.decoupled || o.rule == Rule::kAskewMemory);
  switch (o.rule) {
    case Rule::kAskew: return visit(MakeAskew<AskewVelocity<Binary>>{c, o.level_factor, o.levels});
    case Rule::kAskewGradient: return visit(MakeAskew<AskewGradient<Binary>>{c, o.level_factor, o.levels});
    case Rule::kAskewMemory:
      if (c.rate <= FLT_MAX) return visit(MakeAskew<AskewMemory<Binary, true>>{c, o.level_factor, o.levels});
      return visit(MakeAskew<AskewMemory<Binary, false>>{c, o.level_factor, o.levels});
    default: return visit(MakeBase{make_base_step(o.hyper, o.decoupled)});
  }
}

}  // namespace

const char* askew_step_unsupported_on_cuda(const StepOptions& o) {
  switch (o.rule) {
    case Rule::kBase:
    case Rule::kAskew:
    case Rule::kAskewGradient:
    case Rule::kAskewMemory: break;
    default: return "the CUDA kernels have the base and the AskewSGD rules alone";
  }
  if (o.param_dtype != Dtype::kFloat32) return "the CUDA kernels take float32 parameters alone";
  if (o.has_momentum && o.momentum_dtype != Dtype::kFloat32)
    return "the CUDA kernels take float32 momentum alone";
  return nullptr;
}

const char* askew_step_on_cuda(const StepOptions& o, const StepSegment* segments, int64_t count,
                               const CudaStepInputs& inputs, int device, void* stream_handle) {
  if (const char* reason = askew_step_unsupported_on_cuda(o)) return reason;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = count_steps(inputs, stream);
  if (error == cudaSuccess) {
    const Shared shared{inputs.grad_scale, inputs.found_inf, o.gradient_factor};
    error = with_direction(o, [&](const auto& make_direction) {
      const auto visit = [&](const auto& make_rule) {
        return launch_all(segments, count, inputs, shared, make_rule, make_direction, stream);
      };
      return o.levels == 2 ? with_rule<true>(o, visit) : with_rule<false>(o, visit);
    });
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace quantopt

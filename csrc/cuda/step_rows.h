// Dynamic scales: first the mean of |point| of a group becomes its scale, then the group is stepped. A row
// without groups is one. group_kernel and row_kernel do both for groups that fit in registers; longer ones go
// through magnitude_kernel, scale_epilogue_kernel (step.cu) and step_kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/step_launch.h"
#include "cuda/step_stepper.h"

namespace quantopt {
namespace {

// Sum over `lanes` neighbouring threads of a warp, a power of two, or over the block, the same in each of
// them and in every run. All threads of the warp or block take part.
__device__ __forceinline__ double sum_of_lanes(double x, int lanes) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    if (distance < lanes) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
  }
  return x;
}

__device__ __forceinline__ double sum_of_block(double x) {
  __shared__ double parts[kThreads / 32];
  x = sum_of_lanes(x, 32);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += parts[i];
  return total;
}

// The elements of a scale.
struct Group {
  int64_t start, length;
};

__device__ __forceinline__ Group group_of(const StepTensor& t, int64_t scale) {
  int64_t row = scale;
  if (t.scales_per_row != 1) {  // 64-bit division takes several times as long
    row = t.numel <= INT32_MAX ? static_cast<uint32_t>(scale) / static_cast<uint32_t>(t.scales_per_row)
                               : scale / t.scales_per_row;
  }
  const int64_t first = (scale - row * t.scales_per_row) * t.group, left = t.row - first;
  return {row * t.row + first, left < t.group ? left : t.group};
}

__device__ __forceinline__ int64_t scales_in(const StepTensor& t) {
  return t.numel / t.row * t.scales_per_row;
}

// Each thread of a team, neighbouring lanes of a warp or the whole block, holds up to kVectors vectors of the
// group in registers. A team without a group has the number of scales or more as `scale`.
template <class Row, class R, Storage S, int kVectors, class Direction>
__device__ __forceinline__ void step_group(const StepParams& params, const StepTensor& t, int64_t scale_at,
                                           int team, const BlockConstants<Row, Direction>& constants) {
  constexpr int kVector = vector_of(S);
  // Vectors that are loaded before the first is stepped: all of them, but one where Adam has five arrays.
  constexpr int kInFlight = Direction::kAdam ? 1 : kVectors;
  const auto stepper = make_stepper<R, S>(params, t, constants.direction, constants.frozen);

  const int lane = static_cast<int>(threadIdx.x) % team;
  const bool is_there = scale_at < scales_in(t);
  const int64_t at = is_there ? scale_at : 0;
  const Group group = group_of(t, at);
  const auto length = is_there ? static_cast<int>(group.length) : 0;

  const bool vectors = t.access != Access::kElements;
  const auto count_of = [&](int k) {  // elements of vector k of this thread
    const int left = length - (lane + k * team) * kVector;
    return left < 0 ? 0 : left < kVector ? left : kVector;
  };
  const auto element_of = [&](int k) { return group.start + (lane + k * team) * kVector; };

  Elements<kVector> e[kVectors];
  Floats<kVector> w[kVectors], d[kVectors];
  SpanLevels levels = levels_at<Row, R>(constants.bound, params, t, at, group.start);
  const R old_rule = Row::template object<R>(constants.rule, levels);
  float part = 0.0f;
#pragma unroll
  for (int first = 0; first < kVectors; first += kInFlight) {
#pragma unroll
    for (int k = first; k < first + kInFlight; ++k) {
      const int count = count_of(k);
      if (count > 0) e[k] = stepper.template load<kVector>(element_of(k), vectors && count == kVector, count);
    }
#pragma unroll
    for (int k = first; k < first + kInFlight; ++k) {
      const int count = count_of(k);
      if (count > 0) {
        w[k] = stepper.weights(e[k]);
        d[k] = stepper.directions(old_rule, e[k], w[k]);
        stepper.store_base_state(e[k], element_of(k), vectors && count == kVector, count, vectors);
        const Floats<kVector> before = stepper.ran_with(e[k]);
#pragma unroll
        for (int n = 0; n < kVector; ++n) {
          if (n < count) part += absolute(old_rule.point(w[k].at[n], d[k].at[n], before.at[n]));
        }
      }
    }
  }
  const double sum = team > 32 ? sum_of_block(part) : sum_of_lanes(part, team);
  if (!is_there) return;
  const auto scale = static_cast<float>(sum / static_cast<double>(length));
  levels.grid = make_grid(scale, params.level_factor, params.levels);
  const R rule = Row::template object<R>(constants.rule, levels);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int count = count_of(k);
    if (count > 0) {
      stepper.update_and_store(rule, e[k], w[k], d[k], element_of(k), vectors && count == kVector, count);
    }
  }
  if (lane == 0 && !constants.frozen) t.scale[at] = scale;
}

template <class Row, class Direction, Storage S>
__global__ void __launch_bounds__(kThreads, 2)
    row_kernel(const __grid_constant__ StepTable table, const __grid_constant__ StepParams params,
               const __grid_constant__ typename Row::Constants host_constants) {
  if (skipped(params)) return;
  const int tensor = tensor_of_block(table);
  const StepTensor& t = table.tensors[tensor];
  const auto constants = block_constants<Row, Direction>(params, host_constants, t);
  const int team = t.group <= kWarpRow ? 32 : kThreads;
  const int64_t block = blockIdx.x - table.first_block[tensor];
  const int64_t scale = block * (kThreads / team) + static_cast<int>(threadIdx.x) / team;
  Row::visit_object(constants.rule, is_exact<S>(params), [&](auto type) {
    step_group<Row, typename decltype(type)::type, S, static_cast<int>(kRowPerThread) / vector_of(S)>(
        params, t, scale, team, constants);
  });
}

template <class Row, class Direction, Storage S>
__global__ void __launch_bounds__(kThreads, Direction::kAdam ? 2 : blocks_per_processor(S, false))
    group_kernel(const __grid_constant__ StepTable table, const __grid_constant__ StepParams params,
                 const __grid_constant__ typename Row::Constants host_constants) {
  if (skipped(params)) return;
  const int tensor = tensor_of_block(table);
  const StepTensor& t = table.tensors[tensor];
  const auto constants = block_constants<Row, Direction>(params, host_constants, t);
  constexpr int kRounds = group_rounds(S, Direction::kAdam);
  const int team = lanes_of(t.group, vector_of(S)), teams = kThreads / team;
  const int64_t block = blockIdx.x - table.first_block[tensor];
  const int64_t first = block * kRounds * teams + static_cast<int>(threadIdx.x) / team;
  Row::visit_object(constants.rule, is_exact<S>(params), [&](auto type) {
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      step_group<Row, typename decltype(type)::type, S, 1>(params, t, first + round * teams, team, constants);
    }
  });
}

// The sum of |point| over a chunk of a group, 0 beyond its end. Nothing is changed.
template <class Row, class R, class Direction>
__device__ __forceinline__ void sum_chunk(const StepParams& params, const StepTensor& t, int64_t block,
                                          const BlockConstants<Row, Direction>& constants) {
  constexpr Storage S = Storage::kAny;
  constexpr int kVector = vector_of(S);
  const auto stepper = make_stepper<R, S>(params, t, constants.direction, constants.frozen);
  const int64_t chunks = (t.group + kChunk - 1) / kChunk, scale = block / chunks;
  const Group group = group_of(t, scale);
  const int64_t begin = group.start + (block - scale * chunks) * kChunk,
                group_end = group.start + group.length;
  const int64_t end = begin + kChunk < group_end ? begin + kChunk : group_end;
  const R rule = rule_at<Row, R>(constants, params, t, scale, group.start);
  float part = 0.0f;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x * kVector; i < end; i += kThreads * kVector) {
    const int count = end - i < kVector ? static_cast<int>(end - i) : kVector;
    auto e = stepper.template load<kVector>(i, t.access != Access::kElements && count == kVector, count);
    const Floats<kVector> w = stepper.weights(e);
    const Floats<kVector> d = stepper.directions(rule, e, w), before = stepper.ran_with(e);
#pragma unroll
    for (int n = 0; n < kVector; ++n) {
      if (n < count) part += absolute(rule.point(w.at[n], d.at[n], before.at[n]));
    }
  }
  const double sum = sum_of_block(part);
  if (threadIdx.x == 0) t.partial[block] = sum;
}

template <class Row, class Direction>
__global__ void __launch_bounds__(kThreads, 2)
    magnitude_kernel(const __grid_constant__ StepTable table, const __grid_constant__ StepParams params,
                     const __grid_constant__ typename Row::Constants host_constants) {
  if (skipped(params)) return;
  const int at = tensor_of_block(table);
  const StepTensor& t = table.tensors[at];
  const auto constants = block_constants<Row, Direction>(params, host_constants, t);
  const int64_t block = blockIdx.x - table.first_block[at];
  Row::visit_object(constants.rule, is_exact<Storage::kAny>(params), [&](auto type) {
    sum_chunk<Row, typename decltype(type)::type>(params, t, block, constants);
  });
}

}  // namespace
}  // namespace quantopt

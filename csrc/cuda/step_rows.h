// Dynamic scales: first the mean of |point| of a row becomes its scale, then the row is stepped. row_kernel
// does both for rows that fit in registers; longer rows go through magnitude_kernel, scale_epilogue_kernel
// (step.cu) and step_kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/step_launch.h"
#include "cuda/step_stepper.h"

namespace quantopt {
namespace {

// Sum over the 32 threads of a warp, or over the block, the same in each thread and in every run.
__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
  return x;
}

__device__ __forceinline__ double sum_of_block(double x) {
  __shared__ double parts[kThreads / 32];
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += parts[i];
  return total;
}

// A warp or a block holds a row in registers. `block` counts those of the tensor.
template <class Row, class R, Storage S, class Direction>
__device__ __forceinline__ void step_row(const StepParams& params, const StepTensor& t, int64_t block,
                                         const BlockConstants<Row, Direction>& constants) {
  constexpr int kVector = vector_of(S);
  constexpr int kVectors = static_cast<int>(kRowPerThread) / kVector;
  // Vectors that are loaded before the first is stepped: all of them, but one where Adam has five arrays.
  constexpr int kInFlight = Direction::kAdam ? 1 : kVectors;
  const auto stepper = make_stepper<R, S>(params, t, constants.direction, constants.frozen);

  const bool by_warp = t.row <= kWarpRow;
  const int team = by_warp ? 32 : kThreads;
  const int lane = static_cast<int>(threadIdx.x) % team;
  const int64_t row = block * (kThreads / team) + static_cast<int>(threadIdx.x) / team;
  const int64_t start = row * t.row;
  if (start >= t.numel)
    return;  // all threads of a warp or of the block: the others wait at no barrier for them

  const bool vectors = t.access != Access::kElements;
  const auto count_of = [&](int k) {  // elements of vector k of this thread
    const auto first = static_cast<int64_t>(lane + k * team) * kVector;
    const int64_t left = t.row - first;
    return static_cast<int>(left < 0 ? 0 : left < kVector ? left : kVector);
  };
  const auto element_of = [&](int k) { return start + static_cast<int64_t>(lane + k * team) * kVector; };

  Elements<kVector> e[kVectors];
  Floats<kVector> w[kVectors], d[kVectors];
  SpanLevels levels = levels_at<Row, R>(constants.bound, params, t, row, start);
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
        stepper.store_base_state(e[k], element_of(k), vectors && count == kVector, count);
        const Floats<kVector> before = stepper.ran_with(e[k]);
#pragma unroll
        for (int n = 0; n < kVector; ++n) {
          if (n < count) part += absolute(old_rule.point(w[k].at[n], d[k].at[n], before.at[n]));
        }
      }
    }
  }
  const double sum = by_warp ? sum_of_warp(part) : sum_of_block(part);
  const auto scale = static_cast<float>(sum / static_cast<double>(t.row));
  levels.grid = make_grid(scale, params.level_factor, params.levels);
  const R rule = Row::template object<R>(constants.rule, levels);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int count = count_of(k);
    if (count > 0) {
      stepper.update_and_store(rule, e[k], w[k], d[k], element_of(k), vectors && count == kVector, count);
    }
  }
  if (lane == 0 && !constants.frozen) t.scale[row] = scale;
}

template <class Row, class Direction, Storage S>
__global__ void __launch_bounds__(kThreads, 2)
    row_kernel(const __grid_constant__ StepTable table, const __grid_constant__ StepParams params,
               const __grid_constant__ typename Row::Constants host_constants) {
  if (skipped(params)) return;
  const int at = tensor_of_block(table);
  const StepTensor& t = table.tensors[at];
  const auto constants = block_constants<Row, Direction>(params, host_constants, t);
  const int64_t block = blockIdx.x - table.first_block[at];
  Row::visit_object(constants.rule, is_exact<S>(params), [&](auto type) {
    step_row<Row, typename decltype(type)::type, S>(params, t, block, constants);
  });
}

// The sum of |point| over a chunk of a row. Nothing is changed.
template <class Row, class R, class Direction>
__device__ __forceinline__ void sum_chunk(const StepParams& params, const StepTensor& t, int64_t block,
                                          const BlockConstants<Row, Direction>& constants) {
  constexpr Storage S = Storage::kAny;
  constexpr int kVector = vector_of(S);
  const auto stepper = make_stepper<R, S>(params, t, constants.direction, constants.frozen);
  const int64_t chunks = (t.row + kChunk - 1) / kChunk;
  const int64_t row = block / chunks;
  const int64_t begin = row * t.row + (block - row * chunks) * kChunk;
  const int64_t row_end = (row + 1) * t.row, end = begin + kChunk < row_end ? begin + kChunk : row_end;
  const R rule = rule_at<Row, R>(constants, params, t, row, begin);
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

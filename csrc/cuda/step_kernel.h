// step_kernel: a block steps a chunk of one tensor with the scales as they are. The arithmetic is that of
// csrc/core, compiled without contraction into fused multiply-add (setup.py), so that the result is that of
// the CPU kernels bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/step_launch.h"
#include "cuda/step_stepper.h"

namespace quantopt {
namespace {

template <class Row, class R, Storage S, class Direction>
__device__ __forceinline__ void step_chunk(const StepParams& params, const StepTensor& t, int64_t begin,
                                           const BlockConstants<Row, Direction>& constants) {
  constexpr int kVector = vector_of(S);
  // Vectors that are loaded before the first is stepped: two where that is at most three arrays of float32.
  constexpr int kInFlight = S == Storage::kFloat32 && !R::kReadsWeight && !Direction::kAdam ? 2 : 1;
  constexpr int64_t kStride = kThreads * kVector;
  const auto stepper = make_stepper<R, S>(params, t, constants.direction, constants.frozen);
  const int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
  const auto rule_of = [&](int64_t i) {
    return rule_at<Row, R>(constants, params, t, Row::kQuantised ? scale_index(t, i) : 0, i);
  };
  int64_t tail = begin;  // elements from here on go one by one
  if (t.access != Access::kElements) {
    tail = end - end % kVector;
    R rule = rule_at<Row, R>(constants, params, t, 0, 0);
#pragma unroll 1
    for (int64_t i = begin + threadIdx.x * kVector; i < tail; i += kInFlight * kStride) {
      Elements<kVector> e[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (i + k * kStride < tail) e[k] = stepper.template load<kVector>(i + k * kStride, true, kVector);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int64_t at = i + k * kStride;
        if (at < tail) {
          if (Row::kQuantised && t.access == Access::kScalePerVector) rule = rule_of(at);
          stepper.step(rule, e[k], at);
        }
      }
    }
  }
#pragma unroll 1
  for (int64_t i = tail + threadIdx.x; i < end; i += kThreads) {
    Elements<1> e = stepper.template load<1>(i, true, 1);
    stepper.step(rule_of(i), e, i);
  }
}

template <class Row, class Direction, Storage S>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(S, Direction::kAdam))
    step_kernel(const __grid_constant__ StepTable table, const __grid_constant__ StepParams params,
                const __grid_constant__ typename Row::Constants host_constants) {
  if (skipped(params)) return;
  const int at = tensor_of_block(table);
  const StepTensor& t = table.tensors[at];
  const auto constants = block_constants<Row, Direction>(params, host_constants, t);
  const int64_t begin = (blockIdx.x - table.first_block[at]) * kChunk;
  Row::visit_object(constants.rule, is_exact<S>(params), [&](auto type) {
    step_chunk<Row, typename decltype(type)::type, S>(params, t, begin, constants);
  });
}

}  // namespace
}  // namespace quantopt

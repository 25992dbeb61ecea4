// Reading and quantising rows of x, for the kernels of binary_linear.h.
#pragma once

#include "core/quantize.h"
#include "cuda/binary_linear.h"
#include "cuda/ptx.h"

namespace quantopt {

constexpr int kRun = 8;  // elements that a thread takes together

template <class X>
struct alignas(16) RunOf {
  X at[kRun];
};

// Elements [k, k + 8) of a row of x, zeros from `inputs` on. `aligned`: the row begins at a multiple of 16
// bytes.
template <class X>
__device__ __forceinline__ void load_run(const X* row, int64_t k, int64_t inputs, bool aligned,
                                         X (&x)[kRun]) {
  if (aligned && k + kRun <= inputs) {
    const RunOf<X> run = *reinterpret_cast<const RunOf<X>*>(row + k);
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = run.at[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) x[i] = k + i < inputs ? row[k + i] : X{};
}

inline bool rows_aligned(const CudaRows& x) {
  const int64_t size = x.dtype == Dtype::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(x.x) % 16 == 0 && (x.rows == 1 || x.stride * size % 16 == 0);
}

// The largest value that a thread of the block has, for all of them. Threads: a multiple of 32, at most 1024.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[32];
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  for (int mask = 16; mask > 0; mask /= 2) value = max(value, __shfl_xor_sync(~0u, value, mask));
  if (thread % 32 == 0) of_warp[thread / 32] = value;
  __syncthreads();
  for (int i = 0; i < warps; ++i) value = max(value, of_warp[i]);
  __syncthreads();
  return value;
}

// The largest magnitude as an integer: as such magnitudes order like floats, infinities and NaN last.
template <class X>
__device__ __forceinline__ uint32_t largest_of(const X (&x)[kRun]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) largest = max(largest, __float_as_uint(to_float(x[i])) & 0x7FFFFFFFu);
  return largest;
}

// s of a row, for all threads of the block.
template <class X>
__device__ __forceinline__ float block_scale(const X* row, int64_t inputs, bool aligned) {
  uint32_t largest = 0;
  for (int64_t k = int64_t{threadIdx.x} * kRun; k < inputs; k += int64_t{blockDim.x} * kRun) {
    X x[kRun];
    load_run(row, k, inputs, aligned, x);
    largest = max(largest, largest_of(x));
  }
  return quantization_scale(__uint_as_float(block_max(largest)));
}

// Eight whole numbers as bytes, in the order of the layout.
template <class X>
__device__ __forceinline__ uint2 quantize_run(const X (&x)[kRun], float s, float inverse, XLayout layout) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int q = static_cast<int>(quantized(to_float(x[i]), s, inverse));
    const int byte = layout == XLayout::kTiles ? tile_byte(i % 4) : i % 4;
    words[i / 4] |= (static_cast<uint32_t>(q) & 0xFFu) << (8 * byte);
  }
  return {words[0], words[1]};
}

// Where the eight numbers from k on stand in a row; k is a multiple of 8.
__device__ __forceinline__ int64_t run_offset(int64_t k, XLayout layout) {
  if (layout == XLayout::kPlain) return k;
  const int in_block = static_cast<int>(k % kTileDepth);
  return k - in_block + x_tile_offset(in_block / 32, in_block % 32 / 8);
}

}  // namespace quantopt

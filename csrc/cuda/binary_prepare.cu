#include "cuda/binary_epilogue.h"
#include "cuda/binary_rows.h"
#include "cuda/launch.h"

// What stands around the products: weights as tiles or expanded, x quantised or split, y from sums.

namespace quantopt {
namespace {

constexpr int kThreads = 256;

// ---- weights ----

__device__ __forceinline__ bool negative(const uint8_t* row, int64_t k) {
  return (row[k / 8] >> (k % 8) & 1) == 0;
}

// A thread makes one word.
__global__ void __launch_bounds__(kThreads)
    tiles_kernel(const uint8_t* bits, int64_t outputs, int64_t inputs, int64_t words, uint32_t* tiles) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= words) return;
  const int64_t plane_words = tile_plane_words(outputs, inputs), blocks = tile_block_count(inputs);
  const int64_t plane = i / plane_words, in_plane = i % plane_words;
  const int64_t block = in_plane / kTileWords % blocks, tile = in_plane / kTileWords / blocks;
  const int in_block = static_cast<int>(in_plane % kTileWords), lane = in_block / 4;
  const int64_t n = tile * kTileRows + lane / 4 + 8 * (in_block % 4);
  uint32_t word = 0;
  if (n < outputs) {
    const uint8_t* row = bits + (plane * outputs + n) * ceil_divide(inputs, 8);
    for (int c = 0; c < 4; ++c) {
      for (int e = 0; e < 8; ++e) {
        const int64_t k = block * kTileDepth + 32 * c + 8 * (lane % 4) + e;
        if (k < inputs && negative(row, k)) word |= 1u << tile_bit(c, e);
      }
    }
  }
  tiles[i] = word;
}

__device__ __forceinline__ void from_whole(int x, int8_t& result) { result = static_cast<int8_t>(x); }
template <class W>
__device__ __forceinline__ void from_whole(int x, W& result) {
  from_float(static_cast<float>(x), result);
}

// A thread expands eight weights, of one byte per plane.
template <class W>
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ BinaryExpansion p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, runs = p.columns / kRun;
  if (i >= p.rows * runs) return;
  const int64_t n = i / runs, k = i % runs * kRun, bytes = ceil_divide(p.inputs, 8);
  int sum[kRun] = {};
  if (n < p.outputs && k < p.inputs) {
    for (int plane = 0; plane < p.planes; ++plane) {
      const int byte = p.bits[(plane * p.outputs + n) * bytes + k / 8], weight = p.plane_weights[plane];
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum[j] += byte >> j & 1 ? weight : -weight;
    }
  }
  struct alignas(sizeof(W) * kRun) Run {
    W at[kRun];
  } run;
#pragma unroll
  for (int j = 0; j < kRun; ++j) from_whole(k + j < p.inputs ? sum[j] : 0, run.at[j]);
  *reinterpret_cast<Run*>(static_cast<W*>(p.w) + n * p.columns + k) = run;
}

// ---- rows of x ----

// A block quantises one row.
template <class X>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const X* x, int64_t inputs, int64_t stride, bool aligned, XLayout layout, int8_t* q,
                    int64_t columns, float* scale) {
  start_next_kernel();
  const int64_t m = blockIdx.x;
  const X* row = x + m * stride;
  const float s = block_scale(row, inputs, aligned), inverse = 1.0f / s;
  if (threadIdx.x == 0) scale[m] = s;
  for (int64_t k = int64_t{threadIdx.x} * kRun; k < columns; k += int64_t{kThreads} * kRun) {
    X run[kRun];
    load_run(row, k, inputs, aligned, run);
    *reinterpret_cast<uint2*>(q + m * columns + run_offset(k, layout)) =
        quantize_run(run, s, inverse, layout);
  }
}

// The part of x that bfloat16 holds, cut off, so that the rest of a number of 24 bits has 8 fewer.
__device__ __forceinline__ BFloat16 leading_part(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(nan ? 0x7FC0u : bits >> 16)};
}

// A thread takes eight elements.
template <class X>
__global__ void __launch_bounds__(kThreads)
    split_kernel(const X* x, int64_t rows, int64_t inputs, int64_t stride, bool aligned, uint16_t* parts,
                 int64_t columns) {
  start_next_kernel();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, runs = columns / kRun;
  if (i >= rows * runs) return;
  const int64_t m = i / runs, k = i % runs * kRun;
  X run[kRun];
  load_run(x + m * stride, k, inputs, aligned, run);
  constexpr int kParts = sizeof(X) == sizeof(float) ? 3 : 1;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    RunOf<uint16_t> out;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if constexpr (kParts == 1) {
        out.at[j] = run[j].bits;
      } else {
        const BFloat16 leading = leading_part(run[j]);
        out.at[j] = leading.bits;
        const float rest = run[j] - to_float(leading);
        run[j] = (__float_as_uint(run[j]) & 0x7F800000u) == 0x7F800000u ? 0.0f : rest;
      }
    }
    *reinterpret_cast<RunOf<uint16_t>*>(parts + (part * rows + m) * columns + k) = out;
  }
}

// ---- y ----

template <class Sum>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ BinarySums p, const __grid_constant__ BinaryEpilogue epilogue) {
  wait_for_previous_kernel();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.rows * p.outputs) return;
  const int64_t m = i / p.outputs, n = i % p.outputs;
  Sum sum = 0;
  for (int64_t part = 0; part < p.splits * p.parts; ++part) {
    sum += static_cast<const Sum*>(p.sums)[(part * p.rows + m) * p.stride + n];
  }
  finish(epilogue, static_cast<float>(sum), m, n, p.outputs);
}

// ---- launching ----

Launch elements(int64_t count, const CudaPlace& place, bool overlap = false) {
  return {dim3(static_cast<unsigned>(ceil_divide(count, kThreads))),
          kThreads,
          0,
          overlap && place.capability >= 90,
          1,
          static_cast<cudaStream_t>(place.stream)};
}

template <class Start>
const char* on_device(const CudaPlace& place, const Start& start) {
  cudaError_t error = cudaSetDevice(place.device);
  if (error == cudaSuccess) error = start();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// start(the rows as elements of their type)
template <class Start>
const char* with_type(const CudaRows& x, const CudaPlace& place, const Start& start) {
  return on_device(place, [&] {
    switch (x.dtype) {
      case Dtype::kBFloat16: return start(static_cast<const BFloat16*>(x.x));
      case Dtype::kFloat16: return start(static_cast<const Half*>(x.x));
      default: return start(static_cast<const float*>(x.x));
    }
  });
}

}  // namespace

const char* binary_tiles_on_cuda(const uint8_t* bits, int64_t planes, int64_t outputs, int64_t inputs,
                                 uint32_t* tiles, const CudaPlace& place) {
  const int64_t words = planes * tile_plane_words(outputs, inputs);
  return on_device(place, [&] {
    return launch(elements(words, place), tiles_kernel, bits, outputs, inputs, words, tiles);
  });
}

const char* binary_expand_on_cuda(const BinaryExpansion& p, const CudaPlace& place) {
  const Launch how = elements(p.rows * (p.columns / kRun), place);
  return on_device(place, [&] {
    switch (p.type) {
      case Expanded::kInt8: return launch(how, expand_kernel<int8_t>, p);
      case Expanded::kBFloat16: return launch(how, expand_kernel<BFloat16>, p);
      default: return launch(how, expand_kernel<Half>, p);
    }
  });
}

const char* quantize_rows_on_cuda(const CudaRows& x, XLayout layout, int8_t* q, int64_t columns, float* scale,
                                  const CudaPlace& place) {
  Launch how = elements(0, place);
  how.blocks = dim3(static_cast<unsigned>(x.rows));
  return with_type(x, place, [&](auto data) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    return launch(how, quantize_kernel<X>, data, x.inputs, x.stride, rows_aligned(x), layout, q, columns,
                  scale);
  });
}

const char* split_rows_on_cuda(const CudaRows& x, void* parts, int64_t columns, const CudaPlace& place) {
  return with_type(x, place, [&](auto data) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    return launch(elements(x.rows * (columns / kRun), place), split_kernel<X>, data, x.rows, x.inputs,
                  x.stride, rows_aligned(x), static_cast<uint16_t*>(parts), columns);
  });
}

const char* binary_finish_on_cuda(const BinarySums& sums, const BinaryEpilogue& epilogue,
                                  const CudaPlace& place) {
  const Launch how = elements(sums.rows * sums.outputs, place, sums.fresh);
  return on_device(place, [&] {
    return sums.whole ? launch(how, finish_kernel<int32_t>, sums, epilogue)
                      : launch(how, finish_kernel<float>, sums, epilogue);
  });
}

}  // namespace quantopt

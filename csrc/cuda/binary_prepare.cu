#include <algorithm>

#include "cuda/binary_epilogue.h"
#include "cuda/binary_rows.h"
#include "cuda/launch.h"

// Pre- and post-processing kernels: pack or expand weights, quantise or split x, reduce partial sums to y.

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

// A block quantises one row, which it reads once: up to kKept runs stay in each thread's registers, what is
// beyond them is read again.
template <class X>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const X* x, int64_t inputs, int64_t stride, bool aligned, XLayout layout, int8_t* q,
                    int64_t columns, float* scale) {
  start_next_kernel();
  constexpr int kKept = 4;
  constexpr int64_t kStep = int64_t{kThreads} * kRun;
  const int64_t m = blockIdx.x, first = int64_t{threadIdx.x} * kRun;
  const X* row = x + m * stride;
  X kept[kKept][kRun];
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) load_run(row, first + i * kStep, inputs, aligned, kept[i]);
#pragma unroll
  for (int i = 0; i < kKept; ++i) most = max(most, largest_of(kept[i]));
  for (int64_t k = first + kKept * kStep; k < inputs; k += kStep) {
    X run[kRun];
    load_run(row, k, inputs, aligned, run);
    most = max(most, largest_of(run));
  }
  const float s = quantization_scale(__uint_as_float(block_max(most))), inverse = 1.0f / s;
  if (threadIdx.x == 0) scale[m] = s;
  const auto store = [&](int64_t k, const X(&run)[kRun]) {
    *reinterpret_cast<uint2*>(q + m * columns + run_offset(k, layout)) =
        quantize_run(run, s, inverse, layout);
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (first + i * kStep < columns) store(first + i * kStep, kept[i]);
  }
  for (int64_t k = first + kKept * kStep; k < columns; k += kStep) {
    X run[kRun];
    load_run(row, k, inputs, aligned, run);
    store(k, run);
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

constexpr int kEpilogueThreads = 128, kOutputs = 4;  // that a thread finishes of each of its rows

template <class T>
struct alignas(sizeof(T) * kOutputs) Outputs {
  T at[kOutputs];
};

// `aligned`: the rows of sums and y begin where Outputs may.
template <class Sum, class Y>
__global__ void __launch_bounds__(kEpilogueThreads)
    epilogue_kernel(const __grid_constant__ BinarySums p, const __grid_constant__ BinaryEpilogue epilogue,
                    bool aligned) {
  const int64_t n = (int64_t{blockIdx.x} * kEpilogueThreads + threadIdx.x) * kOutputs;
  const int count = static_cast<int>(max(int64_t{0}, min(int64_t{kOutputs}, p.outputs - n)));
  const BinaryEpilogue& e = epilogue;
  float scale[kOutputs], bias[kOutputs];
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
    scale[j] = j < count && e.scale != nullptr ? e.scale[(n + j) * e.scale_stride] : 1.0f;
    bias[j] = j < count && e.bias != nullptr ? e.bias[n + j] : 0.0f;
  }
  wait_for_previous_kernel();
  if (count == 0) return;
  for (int64_t m = blockIdx.y; m < p.rows; m += gridDim.y) {
    const float x_scale = e.x_scale != nullptr ? e.x_scale[m] : 1.0f;
    Sum sum[kOutputs] = {};
#pragma unroll 2  // else a register is spilled on sm_100
    for (int64_t part = 0; part < p.splits * p.parts; ++part) {
      const Sum* const from = static_cast<const Sum*>(p.sums) + (part * p.rows + m) * p.stride + n;
      Outputs<Sum> some = {};
      if (aligned) {
        some = *reinterpret_cast<const Outputs<Sum>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) some.at[j] = j < count ? from[j] : Sum{0};
      }
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) sum[j] += some.at[j];
    }
    Outputs<Y> y;
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      from_float(with_epilogue(e, static_cast<float>(sum[j]), scale[j], x_scale, bias[j]), y.at[j]);
    }
    Y* const to = static_cast<Y*>(e.y) + m * p.outputs + n;
    if (aligned) {
      *reinterpret_cast<Outputs<Y>*>(to) = y;
    } else {
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) {
        if (j < count) to[j] = y.at[j];
      }
    }
  }
}

// ---- launching ----

Launch elements(int64_t count, const CudaContext& context, bool overlap = false) {
  return {dim3(static_cast<unsigned>(ceil_divide(count, kThreads))),
          kThreads,
          0,
          overlap && context.capability >= 90,
          1,
          static_cast<cudaStream_t>(context.stream)};
}

// start(the rows as elements of their type)
template <class Start>
const char* with_type(const CudaRows& x, const CudaContext& context, const Start& start) {
  return on_device(context.device, [&] {
    switch (x.dtype) {
      case Dtype::kBFloat16: return start(static_cast<const BFloat16*>(x.x));
      case Dtype::kFloat16: return start(static_cast<const Half*>(x.x));
      default: return start(static_cast<const float*>(x.x));
    }
  });
}

template <class Sum>
cudaError_t epilogue_rows(const BinarySums& sums, const BinaryEpilogue& epilogue,
                          const CudaContext& context) {
  // Blocks that fill the device; each takes some rows, and loads what belongs to its columns once.
  constexpr int64_t kBlocksPerProcessor = 16, kMostBlocks = 65535;
  const int64_t across = ceil_divide(sums.outputs, kEpilogueThreads * kOutputs);
  const int64_t wanted = ceil_divide(context.processors * kBlocksPerProcessor, across);
  Launch how = elements(0, context, sums.fresh);
  how.blocks =
      dim3(static_cast<unsigned>(across), static_cast<unsigned>(std::min({sums.rows, wanted, kMostBlocks})));
  how.threads = kEpilogueThreads;
  const auto start = [&](auto type) {
    using Y = decltype(type);
    const bool aligned = sums.outputs % kOutputs == 0 && sums.stride % kOutputs == 0 &&
                         reinterpret_cast<uintptr_t>(sums.sums) % alignof(Outputs<Sum>) == 0 &&
                         reinterpret_cast<uintptr_t>(epilogue.y) % alignof(Outputs<Y>) == 0;
    return launch(how, epilogue_kernel<Sum, Y>, sums, epilogue, aligned);
  };
  switch (epilogue.dtype) {
    case Dtype::kBFloat16: return start(BFloat16{});
    case Dtype::kFloat16: return start(Half{});
    default: return start(float{});
  }
}

}  // namespace

const char* binary_tiles_on_cuda(const uint8_t* bits, int64_t planes, int64_t outputs, int64_t inputs,
                                 uint32_t* tiles, const CudaContext& context) {
  const int64_t words = planes * tile_plane_words(outputs, inputs);
  return on_device(context.device, [&] {
    return launch(elements(words, context), tiles_kernel, bits, outputs, inputs, words, tiles);
  });
}

const char* binary_expand_on_cuda(const BinaryExpansion& p, const CudaContext& context) {
  const Launch how = elements(p.rows * (p.columns / kRun), context);
  return on_device(context.device, [&] {
    switch (p.type) {
      case Expanded::kInt8: return launch(how, expand_kernel<int8_t>, p);
      case Expanded::kBFloat16: return launch(how, expand_kernel<BFloat16>, p);
      default: return launch(how, expand_kernel<Half>, p);
    }
  });
}

const char* quantize_rows_on_cuda(const CudaRows& x, XLayout layout, int8_t* q, int64_t columns, float* scale,
                                  const CudaContext& context) {
  Launch how = elements(0, context);
  how.blocks = dim3(static_cast<unsigned>(x.rows));
  return with_type(x, context, [&](auto data) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    return launch(how, quantize_kernel<X>, data, x.inputs, x.stride, rows_aligned(x), layout, q, columns,
                  scale);
  });
}

const char* split_rows_on_cuda(const CudaRows& x, void* parts, int64_t columns, const CudaContext& context) {
  return with_type(x, context, [&](auto data) {
    using X = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    return launch(elements(x.rows * (columns / kRun), context), split_kernel<X>, data, x.rows, x.inputs,
                  x.stride, rows_aligned(x), static_cast<uint16_t*>(parts), columns);
  });
}

const char* binary_epilogue_on_cuda(const BinarySums& sums, const BinaryEpilogue& epilogue,
                                    const CudaContext& context) {
  return on_device(context.device, [&] {
    return sums.whole ? epilogue_rows<int32_t>(sums, epilogue, context)
                      : epilogue_rows<float>(sums, epilogue, context);
  });
}

}  // namespace quantopt

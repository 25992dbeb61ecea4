#include <climits>

#include "cuda/binary_conv.h"
#include "cuda/binary_mma_kernel.h"
#include "cuda/binary_rows.h"

namespace quantopt {
namespace {

constexpr int kThreads = 256;

// ---- tokens: output pixels, for mma_kernel ----

struct PixelTokens {
  struct Source {
    const uint8_t* x;
    ConvGeometry geometry;
    int32_t tap_bytes;      // of a position in K
    int32_t channel_bytes;  // of those, the first that are read
    int64_t pixel_bytes;
  };

  // The copies of a thread: 16 bytes from `column` of K on, at the output pixels first, first + step, ...
  template <int Count>
  class Copies {
   public:
    __device__ __forceinline__ Copies(const Source& x, int64_t first, int step, int64_t column) : x_(x) {
      const ConvGeometry& g = x.geometry;
      const auto tap = static_cast<int>(column / x.tap_bytes);
      channel_ = static_cast<int>(column - int64_t{tap} * x.tap_bytes);
      r_ = tap / g.kernel_width;
      s_ = tap - r_ * g.kernel_width;
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        const int64_t token = first + i * step, pixels = g.output_pixels(), image = token / pixels;
        const auto pixel = static_cast<int>(token - image * pixels);
        const int row = pixel / g.out_width;
        image_[i] = x.x + image * g.height * g.width * x.pixel_bytes;
        top_[i] = row * g.stride[0] - g.padding[0];
        left_[i] = (pixel - row * g.out_width) * g.stride[1] - g.padding[1];
      }
    }
    __device__ __forceinline__ void copy(int i, uint8_t* to) const {
      const ConvGeometry& g = x_.geometry;
      const int row = top_[i] + r_ * g.dilation[0], column = left_[i] + s_ * g.dilation[1];
      const bool inside = r_ < g.kernel_height && channel_ < x_.channel_bytes &&
                          static_cast<unsigned>(row) < static_cast<unsigned>(g.height) &&
                          static_cast<unsigned>(column) < static_cast<unsigned>(g.width);
      const int64_t at = (int64_t{row} * g.width + column) * x_.pixel_bytes + channel_;
      copy_async(to, inside ? image_[i] + at : x_.x, inside);
    }
    __device__ __forceinline__ void advance(int bytes) {
      channel_ += bytes;
      while (channel_ >= x_.tap_bytes) {
        channel_ -= x_.tap_bytes;
        if (++s_ == x_.geometry.kernel_width) s_ = 0, ++r_;
      }
    }

   private:
    const Source& x_;  // an argument of the kernel
    const uint8_t* image_[Count];
    int top_[Count], left_[Count];  // of the first position, where the image may not reach
    int channel_, r_, s_;
  };
};

// ---- weights ----

// A thread makes one byte.
__global__ void __launch_bounds__(kThreads)
    conv_bits_kernel(const uint8_t* bits, int64_t planes, int64_t groups, int64_t outputs, int64_t channels,
                     int64_t taps, int64_t bytes, uint8_t* result) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= bytes) return;
  const int64_t padded = conv_channels(channels), row = taps * padded / 8;
  const int64_t k = i % row * 8, n = i / row % outputs, plane = i / row / outputs % planes;
  const int64_t group = i / row / outputs / planes, tap = k / padded, channel = k % padded;
  const uint8_t* from =
      bits + (plane * groups * outputs + group * outputs + n) * ceil_divide(channels * taps, 8);
  int byte = 0;
  for (int b = 0; b < 8 && channel + b < channels; ++b) {
    const int64_t at = (channel + b) * taps + tap;
    byte |= (from[at / 8] >> (at % 8) & 1) << b;
  }
  result[i] = static_cast<uint8_t>(byte);
}

// ---- x ----

// The largest magnitude of a part of an image. As integers magnitudes order like floats, infinities and NaN
// last.
template <class X>
__global__ void __launch_bounds__(kThreads)
    largest_kernel(const X* x, int64_t elements, int parts, float* largest) {
  const int64_t image = blockIdx.x / parts, part = blockIdx.x % parts;
  const X* const from = x + image * elements;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
  uint32_t most = 0;
  for (int64_t k = (part * kThreads + threadIdx.x) * kRun; k < elements;
       k += int64_t{parts} * kThreads * kRun) {
    X run[kRun];
    load_run(from, k, elements, aligned, run);
#pragma unroll
    for (int i = 0; i < kRun; ++i) most = max(most, __float_as_uint(to_float(run[i])) & 0x7FFFFFFFu);
  }
  most = block_max(most);
  if (threadIdx.x == 0) largest[image * kConvParts + part] = __uint_as_float(most);
}

template <class X>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ ConvImages p, const float* largest, int parts, int blocks,
                    int8_t* q, float* scale, int64_t output_pixels) {
  const int64_t image = blockIdx.x / blocks, block = blockIdx.x % blocks;
  uint32_t most = 0;
  if (static_cast<int>(threadIdx.x) < parts) {
    most = __float_as_uint(largest[image * kConvParts + threadIdx.x]);
  }
  const float s = quantization_scale(__uint_as_float(block_max(most))), inverse = 1.0f / s;
  start_next_kernel();
  const int64_t first = block * kThreads + threadIdx.x, step = int64_t{blocks} * kThreads;
  for (int64_t i = first; i < output_pixels; i += step) scale[image * output_pixels + i] = s;
  const int64_t padded = conv_channels(p.channels), runs = padded / kRun;
  const X* const x = static_cast<const X*>(p.x) + image * p.pixels * p.groups * p.channels;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && p.channels * sizeof(X) % 16 == 0;
  int8_t* const to = q + image * p.pixels * p.groups * padded;
  for (int64_t i = first; i < p.pixels * p.groups * runs; i += step) {
    const int64_t slice = i / runs;  // the channels of a group in a pixel
    const auto channel = static_cast<int>(i - slice * runs) * kRun;
    X run[kRun];
    load_run(x + slice * p.channels, channel, p.channels, aligned, run);
    const int in_half = channel % kConvChannels;
    *reinterpret_cast<uint2*>(to + slice * padded + channel - in_half +
                              x_tile_offset(in_half / 32, in_half % 32 / 8)) =
        quantize_run(run, s, inverse, XLayout::kTiles);
  }
}

// ---- launching ----

Launch blocks_of(int64_t blocks, const CudaContext& context) {
  return {dim3(static_cast<unsigned>(blocks)),      kThreads, 0, false, 1,
          static_cast<cudaStream_t>(context.stream)};
}

template <class X>
cudaError_t quantize_images(const ConvImages& x, float* largest, int8_t* q, float* scale,
                            int64_t output_pixels, const CudaContext& context) {
  const int64_t elements = x.pixels * x.groups * x.channels;
  constexpr int64_t kBlock = kThreads * kRun;
  const int64_t all =
      std::min<int64_t>(INT_MAX / std::max<int64_t>(1, x.images), 4 * int64_t{context.processors});
  const int parts = static_cast<int>(std::clamp<int64_t>(ceil_divide(elements, kBlock), 1, kConvParts));
  const int blocks =
      static_cast<int>(std::clamp<int64_t>(ceil_divide(elements, kBlock), 1, std::max<int64_t>(1, all)));
  const cudaError_t error = launch(blocks_of(x.images * parts, context), largest_kernel<X>,
                                   static_cast<const X*>(x.x), elements, parts, largest);
  if (error != cudaSuccess) return error;
  return launch(blocks_of(x.images * blocks, context), quantize_kernel<X>, x,
                static_cast<const float*>(largest), parts, blocks, q, scale, output_pixels);
}

template <class Op>
cudaError_t run_shape(int shape, const Arguments<PixelTokens>& arguments, bool overlap, cudaStream_t stream) {
  switch (shape) {
    case 1: return run_mma<Op, 1>(arguments, overlap, stream);
    case 4: return run_mma<Op, 4>(arguments, overlap, stream);
    case 5: return run_mma<Op, 5>(arguments, overlap, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

const char* conv_bits_on_cuda(const uint8_t* bits, int64_t planes, int64_t groups, int64_t outputs,
                              int64_t channels, int64_t taps, uint8_t* result, const CudaContext& context) {
  const int64_t bytes = groups * planes * outputs * taps * conv_channels(channels) / 8;
  return on_device(context.device, [&] {
    return launch(blocks_of(ceil_divide(bytes, kThreads), context), conv_bits_kernel, bits, planes, groups,
                  outputs, channels, taps, bytes, result);
  });
}

const char* quantize_images_on_cuda(const ConvImages& x, float* largest, int8_t* q, float* scale,
                                    int64_t output_pixels, const CudaContext& context) {
  return on_device(context.device, [&] {
    switch (x.dtype) {
      case Dtype::kBFloat16: return quantize_images<BFloat16>(x, largest, q, scale, output_pixels, context);
      case Dtype::kFloat16: return quantize_images<Half>(x, largest, q, scale, output_pixels, context);
      case Dtype::kFloat32: break;
    }
    return quantize_images<float>(x, largest, q, scale, output_pixels, context);
  });
}

const char* binary_conv_on_cuda(const BinaryWeights& weights, const ConvTokens& tokens,
                                const ConvGeometry& geometry, const MmaPlan& plan,
                                const BinaryEpilogue& epilogue, int64_t y_stride, void* sums,
                                const CudaContext& context) {
  const int64_t size = tokens.type == MmaTokens::Type::kInt8 ? 1 : 2;
  const Arguments<PixelTokens> arguments{
      weights,
      epilogue,
      {static_cast<const uint8_t*>(tokens.x), geometry, static_cast<int32_t>(tokens.channels * size),
       static_cast<int32_t>(tokens.channel_bytes), tokens.pixel_bytes},
      tokens.parts * geometry.images * geometry.output_pixels(),
      y_stride,
      sums,
      plan.splits,
      plan.splits > 1 && mma_parts(plan, context) == 1};
  const bool overlap = tokens.fresh && context.capability >= 90;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  return on_device(context.device, [&] {
    switch (tokens.type) {
      case MmaTokens::Type::kBFloat16: return run_shape<BFloat16s>(plan.shape, arguments, overlap, stream);
      case MmaTokens::Type::kFloat16: return run_shape<Halfs>(plan.shape, arguments, overlap, stream);
      case MmaTokens::Type::kInt8: break;
    }
    return run_shape<Bytes<int32_t>>(plan.shape, arguments, overlap, stream);
  });
}

}  // namespace quantopt

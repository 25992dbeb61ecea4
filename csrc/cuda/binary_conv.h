// Convolutions with packed +-1 weights on CUDA, as products: a token is an output pixel, and K runs
// over the positions of the kernel and, fastest, the channels of x at each. No torch.
//
// x lies channels last, with its channels filled up with zeros to a multiple of kConvChannels, so that 16
// bytes that a thread copies belong to one position. Pixels beyond the border are zeros: with +-1 weights
// that is exact.
#pragma once

#include <cstdint>

#include "cuda/binary_linear.h"

namespace quantopt {

constexpr int kConvChannels = 64;  // what is neighbours in a half of XLayout::kTiles

struct ConvGeometry {
  int64_t images;
  int32_t height, width, out_height, out_width;
  int32_t kernel_height, kernel_width;
  int32_t stride[2], padding[2], dilation[2];

  QUANTOPT_HOST_DEVICE int64_t output_pixels() const { return int64_t{out_height} * out_width; }
  QUANTOPT_HOST_DEVICE int64_t taps() const { return int64_t{kernel_height} * kernel_width; }
};

QUANTOPT_HOST_DEVICE constexpr int64_t conv_channels(int64_t channels) {
  return ceil_divide(channels, kConvChannels) * kConvChannels;
}

// Bits [groups, P, N, taps * conv_channels(C) / 8] in the order of K here, from those of the checkpoint
// [P, groups * N, ceil(C * taps / 8)], in which the position runs fastest.
const char* conv_bits_on_cuda(const uint8_t* bits, int64_t planes, int64_t groups, int64_t outputs,
                              int64_t channels, int64_t taps, uint8_t* result, const CudaContext& context);

// Symmetric quantisation of each image, as quantize_rows_on_cuda of a row: q [pixels, groups,
// conv_channels(C)], each half block in the order XLayout::kTiles, and s once for each output pixel.
struct ConvImages {
  const void* x;  // [images, pixels, groups, C], dense
  Dtype dtype;
  int64_t images, pixels, groups, channels;
};
// Floats of memory that it needs for each image.
constexpr int64_t kConvParts = 64;
const char* quantize_images_on_cuda(const ConvImages& x, float* largest, int8_t* q, float* scale,
                                    int64_t output_pixels, const CudaContext& context);

// x of one group as the product reads it.
struct ConvTokens {
  const void* x;
  MmaTokens::Type type;
  int64_t parts;          // images of the geometry in parts that are to be added up, one after the other
  int64_t channels;       // filled up: of a position in K
  int64_t channel_bytes;  // that can be read of a pixel; a multiple of 16, zeros are taken for the rest
  int64_t pixel_bytes;    // from a pixel to the next
  bool fresh;             // as in MmaTokens
};
// y (elements [output pixel, y_stride]) if `sums` is null, else the sums as those of binary_mma_on_cuda.
// weights: of the group; inputs = taps * channels. The shape of the plan is one of those that
// conv_takes_shape.
constexpr bool conv_takes_shape(int shape) { return shape == 1 || shape == 4 || shape == 5; }
const char* binary_conv_on_cuda(const BinaryWeights& weights, const ConvTokens& tokens,
                                const ConvGeometry& geometry, const MmaPlan& plan,
                                const BinaryEpilogue& epilogue, int64_t y_stride, void* sums,
                                const CudaContext& context);

}  // namespace quantopt

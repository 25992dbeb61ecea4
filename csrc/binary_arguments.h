// What the products with packed weights are called with, checked: the same for every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/activation.h"

namespace quantopt {

// What binary_linear and binary_conv2d are given besides x: checked, dense and fp32.
struct BinaryArguments {
  at::Tensor bits;
  at::Tensor scale;
  at::Tensor bias;  // undefined: none
  c10::SmallVector<int32_t, 8> plane_weights;
  int64_t outputs;
  int64_t inputs;
  int64_t group_size;
  int64_t groups;
  bool quantize;  // compute = int8
  bool round;     // compute = bf16: x is rounded to bfloat16, the rest is exact
  Activation activation;

  int64_t planes() const { return static_cast<int64_t>(plane_weights.size()); }
  int64_t scale_stride() const { return group_size == 0 && scale.numel() == 1 ? 0 : groups; }
  const float* bias_or_null() const { return bias.defined() ? bias.const_data_ptr<float>() : nullptr; }
};

// The tensor in another type. `to` passes the dispatcher even where there is nothing to do.
inline at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// x as it is multiplied (or quantised).
inline at::Tensor rounded(const at::Tensor& x, const BinaryArguments& w) {
  return w.round ? as_type(x, at::kBFloat16) : x;
}

// bits [N, ceil(K / 8)] or [P, N, ceil(K / 8)], dense.
at::Tensor check_bits(const at::Tensor& bits, int64_t in_features);
inline int64_t planes_of(const at::Tensor& bits) { return bits.dim() == 2 ? 1 : bits.size(0); }

// What a layout of bits for kernels was made for: the length of a row, kernel positions and groups.
using TilesForm = std::array<int64_t, 3>;

// Lets `tiles`, which were derived from `bits`, remember that: their storage holds that of the bits, so that
// no other bits can take its place. A copy of tiles remembers nothing. `weight`: kept with them, W expanded.
void tie_tiles(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form,
               const at::Tensor& weight = {}, at::IntArrayRef plane_weights = {});

// Whether `tiles` were derived in this form from these very bits, and neither was written to since (in ways
// that torch counts). Costs some nanoseconds, on any device.
bool tiles_fit(const at::Tensor& tiles, const at::Tensor& bits, const TilesForm& form);
// The W that tiles which fit keep, if its planes weigh that much; else undefined.
at::Tensor weight_of_tiles(const at::Tensor& tiles, at::IntArrayRef plane_weights);

BinaryArguments check_binary(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                             const std::optional<at::Tensor>& bias, int64_t in_features,
                             at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                             c10::string_view activation);

// The same for a convolution of x [B, C, H, W].
struct ConvArguments {
  BinaryArguments weights;
  int64_t channels, outputs;  // of a group
  int64_t size[2];            // of y
};
ConvArguments check_conv(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, at::IntArrayRef plane_weights, int64_t group_size,
                         c10::string_view compute, c10::string_view activation);
// What binary_conv_tiles is called with.
void check_conv_form(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups);

}  // namespace quantopt

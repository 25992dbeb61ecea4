// What the products with packed weights are called with, checked: the same for every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <optional>

#include "core/activation.h"

namespace quantopt {

// The weights of binary_linear and binary_conv2d and their modes: checked, dense and fp32. The counterpart of
// quantopt.packed_weight.PackedWeight.
struct BinaryArguments {
  at::Tensor bits;
  at::Tensor scale;
  at::Tensor bias;               // undefined: none
  const at::Tensor* given_bits;  // as the caller passed them, who keeps them: those that tiles remember
  const at::Tensor* tiles;       // of the caller, or null
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

BinaryArguments check_binary(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                             const std::optional<at::Tensor>& bias, int64_t in_features,
                             at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                             const std::optional<at::Tensor>& tiles, c10::string_view activation);

// An error unless the last dimension of x is that of the weights.
void check_rows(const at::Tensor& x, const BinaryArguments& w);

// The arguments of a convolution of x [B, C, H, W].
struct ConvArguments {
  BinaryArguments weights;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;
  int64_t channels, outputs;  // of a group
  int64_t size[2];            // of y

  int64_t taps() const { return kernel[0] * kernel[1]; }
};
ConvArguments check_conv(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, at::IntArrayRef plane_weights, int64_t group_size,
                         c10::string_view compute, const std::optional<at::Tensor>& tiles,
                         c10::string_view activation);
// What binary_conv_tiles is called with.
void check_conv_form(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups,
                     int64_t group_size);

}  // namespace quantopt

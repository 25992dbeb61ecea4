// What the products with packed weights are called with, checked: the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

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
  std::vector<int32_t> plane_weights;
  int64_t outputs;
  int64_t inputs;
  int64_t group_size;
  int64_t groups;
  bool quantize;  // compute = int8
  Activation activation;

  int64_t planes() const { return static_cast<int64_t>(plane_weights.size()); }
  int64_t scale_stride() const { return group_size == 0 && scale.numel() == 1 ? 0 : groups; }
  const float* bias_or_null() const { return bias.defined() ? bias.const_data_ptr<float>() : nullptr; }
};

// bits [N, ceil(K / 8)] or [P, N, ceil(K / 8)], dense.
at::Tensor check_bits(const at::Tensor& bits, int64_t in_features);
inline int64_t planes_of(const at::Tensor& bits) { return bits.dim() == 2 ? 1 : bits.size(0); }

BinaryArguments check_binary(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                             const std::optional<at::Tensor>& bias, int64_t in_features,
                             at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                             c10::string_view activation);

}  // namespace quantopt

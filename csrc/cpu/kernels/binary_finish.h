// The end of every product: scales, bias, activation.
#pragma once

// clang-format off: the vectors come before the functions that are written in them
#include "cpu/kernels/vec.h"
#include "core/activation.h"
// clang-format on

#include <cstdint>

namespace quantopt::QUANTOPT_ISA {
namespace {

// y[n] = activation(y[n] * (scale[n] * x_scale) + bias[n]) for outputs [begin, end) of a row; a null scale is
// 1, `scale_stride` is 0 for one scale of all.
inline void finish_row(float* y, int64_t begin, int64_t end, const float* scale, int64_t scale_stride,
                       float x_scale, const float* bias, Activation activation) {
  if (scale == nullptr || scale_stride == 0) {
    const float factor = (scale == nullptr ? 1.0f : *scale) * x_scale;
    for (int64_t n = begin; n < end; ++n) y[n] *= factor;
  } else {
    for (int64_t n = begin; n < end; ++n) y[n] *= scale[n] * x_scale;
  }
  if (bias != nullptr) {
    for (int64_t n = begin; n < end; ++n) y[n] += bias[n];
  }
  if (activation == Activation::none) return;
  int64_t n = begin;
  for (; n + kWidth <= end; n += kWidth) store(y + n, activate(activation, load(y + n)));
  for (; n < end; ++n) y[n] = activate(activation, y[n]);
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

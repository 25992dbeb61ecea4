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
  const bool each = scale != nullptr && scale_stride != 0;
  const Vec all = fill<Vec>((scale == nullptr ? 1.0f : *scale) * x_scale), row = fill<Vec>(x_scale);
  const auto finish = [&](int64_t n, auto read, auto write) __attribute__((always_inline)) {
    Vec v = read(y + n) * (each ? read(scale + n) * row : all);
    if (bias != nullptr) v += read(bias + n);
    if (activation != Activation::none) v = activate(activation, v);
    write(y + n, v);
  };
  int64_t n = begin;
  for (; n + kWidth <= end; n += kWidth) {
    finish(n, [](const float* p) { return load(p); }, [](float* p, Vec v) { store(p, v); });
  }
  if (n == end) return;
  const int count = static_cast<int>(end - n);
  finish(
      n, [=](const float* p) { return load_part(p, count); },
      [=](float* p, Vec v) { store_part(p, v, count); });
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

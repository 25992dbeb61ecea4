// The end of every product: scales, bias, activation.
#pragma once

// clang-format off: the vectors come before the functions that are written in them
#include "cpu/kernels/vec.h"
#include "core/activation.h"
// clang-format on

#include <cstdint>

#include "cpu/kernels/binary_linear.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

// activation(v * (scale[n] * x_scale) + bias[n]) of outputs n, n + 1, ...; a null scale is 1, `scale_stride`
// is 0 for one scale of all.
struct Epilogue {
  Epilogue(const float* scale, int64_t scale_stride, float x_scale, const float* bias, Activation activation)
      : scale(scale != nullptr && scale_stride != 0 ? scale : nullptr),
        bias(bias),
        activation(activation),
        all(fill<Vec>((scale == nullptr ? 1.0f : *scale) * x_scale)),
        row(fill<Vec>(x_scale)) {}

  Vec operator()(Vec v, int64_t n) const {
    return apply(v, n, [](const float* p) { return load(p); });
  }
  // Of the first `count` outputs from n.
  Vec operator()(Vec v, int64_t n, int count) const {
    return apply(v, n, [=](const float* p) { return load_part(p, count); });
  }

 private:
  template <class Read>
  __attribute__((always_inline)) Vec apply(Vec v, int64_t n, const Read& read) const {
    v *= scale != nullptr ? read(scale + n) * row : all;
    if (bias != nullptr) v += read(bias + n);
    return activation == Activation::none ? v : activate(activation, v);
  }

  const float *scale, *bias;  // of each output, or null
  Activation activation;
  Vec all, row;
};

// Of row m of a product.
inline Epilogue epilogue_of(const LinearProblem& p, int64_t m) {
  return {p.scale, p.scale_stride, p.q != nullptr ? p.x_scale[m] : 1.0f, p.bias, p.activation};
}

// y[n] = epilogue(y[n]) for outputs [begin, end) of a row.
inline void epilogue_row(float* y, int64_t begin, int64_t end, const Epilogue& epilogue) {
  int64_t n = begin;
  for (; n + kWidth <= end; n += kWidth) store(y + n, epilogue(load(y + n), n));
  if (n == end) return;
  const int count = static_cast<int>(end - n);
  store_part(y + n, epilogue(load_part(y + n, count), n, count), count);
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

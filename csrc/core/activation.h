// Activations in the epilogue of the products, as functions of a scalar, or on the CPU of a vector of floats
// (include cpu/kernels/vec.h before, as for the rules). NaN propagates, infinities as in the formulas.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/scalar.h"

namespace quantopt {

enum class Activation : int32_t { none, relu, gelu, silu };

// From the name that the operators take; false if there is none of that name.
inline bool find_activation(std::string_view name, Activation& activation) {
  constexpr std::string_view kNames[] = {"none", "relu", "gelu", "silu"};
  for (int i = 0; i < 4; ++i) {
    if (name != kNames[i]) continue;
    activation = static_cast<Activation>(i);
    return true;
  }
  return false;
}

// e^x to 2 units in the last place; between 1.6e-38 and infinity.
template <class F>
QUANTOPT_HOST_DEVICE F exponential(F x) {
  x = clamp(x, -87.0f, 89.0f);
  const F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits hold round(x / log 2)
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // log 2 in two parts, the first of 17 bits
  F p = fill<F>(1.395059866e-3f);
  p = p * r + 8.368954062e-3f;
  p = p * r + 4.166620597e-2f;
  p = p * r + 1.666651815e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * power_of_two(shifted);
}

// erf(x) to 4e-7 of its size; exactly +-1 from 3.93 on, where fp32 rounds to that.
template <class F>
QUANTOPT_HOST_DEVICE F error_function(F x) {
  const F z = x * x;
  F p = fill<F>(2.042136430e-6f), q = fill<F>(3.800503328e-5f);
  p = p * z + 2.847936994e-4f;
  p = p * z + 3.778838087e-3f;
  p = p * z + 5.278788507e-2f;
  p = p * z + 1.907655001e-1f;
  p = p * z + 1.128379107f;
  q = q * z + 1.165030990e-3f;
  q = q * z + 1.499588042e-2f;
  q = q * z + 1.142499670e-1f;
  q = q * z + 5.023942590e-1f;
  q = q * z + 1.0f;
  return absolute(x) < 3.93f ? x * p / q : sign(x);
}

template <class F>
QUANTOPT_HOST_DEVICE F relu(F x) {
  return maximum(x, fill<F>(0.0f));
}
// x times the normal distribution function: the exact form, by erf, not the approximation by tanh.
template <class F>
QUANTOPT_HOST_DEVICE F gelu(F x) {
  return 0.5f * x * (1.0f + error_function(x * 0.707106781f));
}
template <class F>
QUANTOPT_HOST_DEVICE F silu(F x) {
  return x / (1.0f + exponential(-x));
}

template <class F>
QUANTOPT_HOST_DEVICE F activate(Activation activation, F x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return relu(x);
    case Activation::gelu: return gelu(x);
    case Activation::silu: return silu(x);
  }
  return x;
}

}  // namespace quantopt

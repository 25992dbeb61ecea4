// What the packed convolutions of all instruction sets are called with.
#pragma once

#include <ATen/core/Tensor.h>

#include "binary_arguments.h"
#include "cpu/kernels/binary_conv.h"

namespace quantopt {

// The convolution of group `group`, whose tiles are in `layout`, without x and y. x is channels last.
ConvProblem problem_of(const at::Tensor& x, const ConvArguments& conv, const at::Tensor& layout,
                       int64_t group);

// The product of whole rows of W, with a scale for each `group` weights of them, with gathered values,
// without x, y and scales.
LinearProblem rows_of_weights(const ConvProblem& c, int64_t group);

// The values of x that pixel `index` of y meets, in the order of a row of W: [channels, kernel positions].
template <class T>
void gather_patch(const ConvProblem& c, const T* x, int64_t index, T* patch) {
  const int64_t image = index / c.out_width / c.out_height;
  const int64_t oy = index / c.out_width % c.out_height, ox = index % c.out_width;
  const int64_t taps = c.kernel[0] * c.kernel[1];
  for (int64_t r = 0; r < c.kernel[0]; ++r) {
    const int64_t iy = oy * c.stride[0] - c.padding[0] + r * c.dilation[0];
    for (int64_t s = 0; s < c.kernel[1]; ++s, ++patch) {
      const int64_t ix = ox * c.stride[1] - c.padding[1] + s * c.dilation[1];
      if (iy < 0 || iy >= c.height || ix < 0 || ix >= c.width) {
        for (int64_t i = 0; i < c.channels; ++i) patch[i * taps] = T{0};
        continue;
      }
      const T* from = x + ((image * c.height + iy) * c.width + ix) * c.x_stride;
      for (int64_t i = 0; i < c.channels; ++i) patch[i * taps] = from[i];
    }
  }
}

}  // namespace quantopt

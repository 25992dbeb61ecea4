// conv2d with packed +-1 weights on channels-last images, compiled for every instruction set. No torch here.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/kernels/binary_linear.h"

namespace quantopt {

enum class Activation : int32_t;  // core/activation.h

// y[b,oy,ox,n] = activation(scale[n] x_scale[b] sum_{r,s,c} w[n,c,r,s] x[b,iy,ix,c] + bias[n]) with
// iy = oy S + r D - P and ix = ox S + s D - P; x is zero outside the image. With q, x is q[b] x_scale[b] and
// the sum of q is exact.
struct ConvProblem {
  int64_t images, height, width, channels;
  int64_t x_stride;  // elements of x from one pixel to the next: more than `channels` with groups
  int64_t out_height, out_width, outputs;
  int64_t y_stride;  // the same of y
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t planes;
  const uint16_t* tiles;         // binary_tiles of [planes, kernel positions] times [outputs, channels]
  const int32_t* plane_weights;  // [planes]
  const float* scale;            // [1] or [outputs]
  int64_t scale_stride;          // 0 or 1
  const float* bias;             // [outputs] or null
  const float* x;                // [images, height, width, first of x_stride], or null with q
  const int8_t* q;               // the same within +-127, or null with x
  const uint16_t* x_bf16;        // the same in bfloat16, in place of x for AMX; or null
  const float* x_scale;          // [images] with q, else null
  float* y;                      // [images, out_height, out_width, first of y_stride]
  Activation activation;
};

}  // namespace quantopt

QUANTOPT_DECLARE_PER_ISA(
    // Whether there is such a kernel.
    bool binary_conv_available();
    // Bytes of working memory, aligned to 64, for one call.
    int64_t binary_conv_memory(const ConvProblem& conv);
    // Pieces that y is computed in: of a block of pixels and a band of outputs, that go first.
    int64_t binary_conv_pieces(const ConvProblem& conv);
    // The pieces [begin, end).
    void binary_conv2d(const ConvProblem& conv, int64_t begin, int64_t end, void* memory);)

// Linear and conv2d with packed +-1 weights and int8 activations on AMX tiles. No torch here.
#pragma once

#include <cstdint>

#include "cpu/kernels/binary_conv.h"
#include "cpu/kernels/binary_linear.h"

namespace quantopt::amx {

// Rows from which tiles are faster than lookups. Measured on a processor with AMX with a prototype only,
// 4096x4096: 0.24 ms for 8 rows, 1.70 ms for 128, 6.9 ms for 512; one row by dot products took 0.09 ms.
constexpr int64_t kLeastRows = 8;

// A linear layer of M rows as the convolution of M images of one pixel with a kernel of one position.
inline BinaryConv as_conv(const BinaryLinear& p) {
  BinaryConv c{};
  c.images = p.rows;
  c.height = c.width = c.out_height = c.out_width = 1;
  c.channels = c.x_stride = p.inputs;
  c.outputs = c.y_stride = p.outputs;
  for (int i = 0; i < 2; ++i) c.kernel[i] = c.stride[i] = c.dilation[i] = 1;
  c.planes = p.planes;
  c.tiles = p.tiles;
  c.plane_weights = p.plane_weights;
  c.scale = p.scale;
  c.scale_stride = p.scale_stride;
  c.bias = p.bias;
  c.q = p.q;
  c.x_scale = p.x_scale;
  c.y = p.y;
  c.activation = p.activation;
  return c;
}

// Rows of y that share the weights that are expanded for them.
constexpr int64_t kBlockRows = 256;

// Whether the product is one for this kernel: enough rows, int8 activations, and levels that fit a signed
// byte.
bool binary_amx_covers(const BinaryConv& conv);

// Bytes of working memory, aligned to 64, for one call on `rows` rows.
int64_t binary_amx_memory(const BinaryConv& conv, int64_t rows);

// Rows [row_begin, row_end) of the images * out_height * out_width rows of y, outputs [begin, end); begin is
// a multiple of kBandRows, and so is end unless it is the last.
void binary_amx(const BinaryConv& conv, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                void* memory);

}  // namespace quantopt::amx

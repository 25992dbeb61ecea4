// What the operators on packed weights share on the CPU: the kernels of an instruction set, and products of
// rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "binary_arguments.h"
#include "cpu/isa.h"
#include "cpu/kernels/binary_conv.h"
#include "cpu/kernels/binary_linear.h"
#include "cpu/kernels/quantize.h"

namespace quantopt {

// The kernels of one instruction set.
struct BinaryKernels {
  decltype(&portable::binary_uses_tiles) uses_tiles;
  decltype(&portable::binary_tiles) tiles;
  decltype(&portable::binary_linear) linear;
  decltype(&portable::quantize_row) quantize_row;
  decltype(&portable::binary_conv_available) conv_available;
  decltype(&portable::binary_conv_memory) conv_memory;
  decltype(&portable::binary_conv_pieces) conv_pieces;
  decltype(&portable::binary_conv2d) conv2d;
};
BinaryKernels binary_kernels(Isa isa);

// Multiply-adds below which another thread takes longer to start than to do its share.
constexpr int64_t kThreadWork = 1 << 18;

// A new dense tensor; at::empty passes the dispatcher twice.
at::Tensor dense_tensor(at::IntArrayRef shape, at::ScalarType type,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous);

// x as the kernels read it, but those of AMX.
at::Tensor values_of(const at::Tensor& x, const BinaryArguments& w, at::MemoryFormat format);
const uint16_t* bf16_data(const at::Tensor& values);

// Each of `rows` rows of x as int8 in q, and their scales.
void quantize_rows(const BinaryKernels& kernels, const float* x, int64_t rows, int64_t length, int8_t* q,
                   float* scale);

// Scales [outputs, groups] of groups of weights as the kernels read them, in the order of tiles: fp32, or
// int8 levels behind a scale in fp32 for each output.
at::Tensor group_scales_of(const BinaryKernels& kernels, const float* scale, int64_t outputs, int64_t groups,
                           bool levels);
void set_group_scales(const at::Tensor& scales, LinearProblem& p);

// Tiles of so many planes of bits [outputs, inputs], in the layout of cpu/kernels/binary_linear.h.
at::Tensor derive_tiles(const BinaryKernels& kernels, const at::Tensor& bits, int64_t planes, int64_t outputs,
                        int64_t inputs);
constexpr int64_t tiles_size(int64_t planes, int64_t outputs, int64_t inputs) {
  return planes * tile_count(outputs) * tile_words(inputs) * kTileRows;
}

// The weights of a product of rows, without their tiles.
LinearProblem weights_of(const BinaryArguments& w);
// Their tiles: those that the caller has if they fit, else derived.
at::Tensor linear_tiles(const BinaryKernels& kernels, const BinaryArguments& w);
// Puts the scales of their groups, if there are any, into p. They stay with the tiles, if those are defined,
// for the next call. Returns what must outlive the use of p.
at::Tensor linear_group_scales(const BinaryKernels& kernels, const BinaryArguments& w,
                               const at::Tensor& layout, LinearProblem& p);

// Rows of x, as fp32, or int8 with a scale for each row.
struct Rows {
  int64_t count;
  const float* x;
  const int8_t* q;
  const float* scale;
};

// y = x W^T + b.
void run_linear(const BinaryKernels& kernels, const BinaryArguments& w, const Rows& rows, at::Tensor& y);

}  // namespace quantopt

// Products with packed +-1 weights on CUDA: y = x W^T + b. No torch.
//
// The kernels read the weights as tiles, derived once from the bits of the checkpoint: [plane][tile of 32
// rows] [block of 128 weights][lane][4 words], 512 bytes per tile and block, the 16 bytes of lane 4 g + t in
// one load. They are the fragment of mma.sync that this lane holds: its word i has row g + 8 i, and of the
// block's weights k = 32 c + 8 t + e (c = 0..3, e = 0..7), each at the bit of tile_bit(c, e). A bit 1 is -1
// here: a sign bit.
// - bits b and b + 16 are neighbours in k: shifted to the sign bits of a pair of 16-bit floats;
// - bits b, b + 8, b + 16, b + 24 are four in a row, in the order 0, 2, 1, 3: a mask makes them four bytes.
//   The whole numbers of x are stored in that order too (XLayout::kTiles);
// - the 32 weights of one c are neighbours in k over the four t: a group of scales of 32, 64, 128, ... ends
//   where a c ends.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/host_device.h"
#include "core/step.h"
#include "core/tile.h"
#include "cuda/device.h"

namespace quantopt {

constexpr int kTileDepth = 128;                          // weights of a row in one block
constexpr int kTileWords = kTileRows * kTileDepth / 32;  // of 32 bits
constexpr int kMaxPlanes = 8;
constexpr int kGroupUnit = 32;

QUANTOPT_HOST_DEVICE constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
QUANTOPT_HOST_DEVICE constexpr int64_t tile_row_count(int64_t outputs) {
  return ceil_divide(outputs, kTileRows);
}
QUANTOPT_HOST_DEVICE constexpr int64_t tile_block_count(int64_t inputs) {
  return ceil_divide(inputs, kTileDepth);
}
// Words of one plane.
QUANTOPT_HOST_DEVICE constexpr int64_t tile_plane_words(int64_t outputs, int64_t inputs) {
  return tile_row_count(outputs) * tile_block_count(inputs) * kTileWords;
}
// Of four neighbours in k, the byte that each has: 0, 2, 1, 3. Its own inverse.
QUANTOPT_HOST_DEVICE constexpr int tile_byte(int e) { return (e & 1) << 1 | (e & 2) >> 1; }
QUANTOPT_HOST_DEVICE constexpr int tile_bit(int c, int e) { return 8 * tile_byte(e % 4) + 2 * c + e / 4; }

// Whole numbers of x as bytes: in the order of k, or such that the bytes that lane t needs of a block for its
// words are 2 x 16 in a row, in the order of its bits.
enum class XLayout : int32_t { kPlain, kTiles };
// Where in a block the 8 numbers from 32 c + 8 t on stand, in their order tile_byte.
QUANTOPT_HOST_DEVICE constexpr int64_t x_tile_offset(int c, int t) {
  return 64 * (c / 2) + 16 * t + 8 * (c % 2);
}

// From a sum to y: y = activation(sum * scale[n] * x_scale[m] + bias[n]), rounded once to its type.
struct BinaryEpilogue {
  const float* scale;    // [N], or one with stride 0; null: 1 (the sums of grouped scales have theirs)
  int64_t scale_stride;  // 0 or 1
  const float* x_scale;  // [M]; null: 1
  const float* bias;     // [N]; null: 0
  Activation activation;
  Dtype dtype;  // of y
  void* y;      // [M, N]
};

// Weights and sizes of a product.
struct BinaryWeights {
  int64_t outputs;  // N
  int64_t inputs;   // K
  int64_t planes;   // P, at most kMaxPlanes
  int32_t plane_weights[kMaxPlanes];
  const uint32_t* tiles;
  const float* group_scale;  // [N, groups], null if not grouped
  uint32_t group_units;      // a power of two: scales are shared by kGroupUnit times so many weights
  uint32_t groups;           // of a row
};

// All start their work on the stream and return null, or the CUDA error of a launch that failed.

// Tiles of bits [P, N, ceil(K/8)] of the checkpoint.
const char* binary_tiles_on_cuda(const uint8_t* bits, int64_t planes, int64_t outputs, int64_t inputs,
                                 uint32_t* tiles, const CudaContext& context);

// W [rows, columns] = sum_i plane_weights[i] * (+-1 plane i) as int8 or 16-bit floats, from the bits;
// zero in rows from N and columns from K on.
enum class Expanded : int32_t { kInt8, kBFloat16, kFloat16 };
struct BinaryExpansion {
  const uint8_t* bits;  // [P, N, ceil(K / 8)]
  int64_t outputs, inputs, planes;
  int32_t plane_weights[kMaxPlanes];
  Expanded type;
  void* w;
  int64_t rows, columns;  // of w; columns is a multiple of 8
};
const char* binary_expand_on_cuda(const BinaryExpansion& expansion, const CudaContext& context);

// Rows of x, [rows, inputs], the elements of a row side by side.
struct CudaRows {
  const void* x;
  Dtype dtype;
  int64_t rows, inputs;
  int64_t stride;  // elements from one row to the next
};

// Symmetric quantisation of each row: s = max|x| / 127, q = x / s rounded half to even, within +-127; zeros
// in columns from `inputs` on. A row of zeros gives s = 0 and q = 0; one with an infinity or NaN s = NaN and
// q = 0.
const char* quantize_rows_on_cuda(const CudaRows& x, XLayout layout, int8_t* q, int64_t columns, float* scale,
                                  const CudaContext& context);

// x as 16-bit floats [parts, rows, columns], zero in columns from `inputs` on. 16-bit x is copied (one part);
// fp32 becomes three bfloat16 parts whose sum is x exactly, an infinity or NaN in the first alone.
const char* split_rows_on_cuda(const CudaRows& x, void* parts, int64_t columns, const CudaContext& context);

// y of one row of x with whole numbers: exact sums, x quantised on the way. No groups; K up to kGemvInputs.
constexpr int64_t kGemvInputs = 32 << 10;
const char* binary_gemv_on_cuda(const BinaryWeights& weights, const CudaRows& x,
                                const BinaryEpilogue& epilogue, const CudaContext& context);

// The tokens of x as the tensor cores read them: rows of 16-bit floats or of whole numbers (XLayout::kTiles),
// each aligned to 16 bytes and readable up to `columns`, a multiple of 8 (16-bit) or 128.
struct MmaTokens {
  enum class Type : int32_t { kBFloat16, kFloat16, kInt8 };
  const void* x;
  Type type;
  int64_t rows;     // M, times the parts of x
  int64_t columns;  // at least K, or less than K + 128 with zeros
  int64_t stride;   // bytes from one row to the next
  bool fresh;       // written by the kernel just before: the product may start while that runs
};
// How the product is divided.
struct MmaPlan {
  int shape;   // which of kMmaShapes
  int splits;  // along K
};
// Into how many parts the sums come out: blocks that are a cluster add theirs up, others leave it to
// binary_epilogue_on_cuda.
constexpr int mma_parts(const MmaPlan& plan, const CudaContext& context) {
  return context.capability >= 90 && plan.splits <= 8 ? 1 : plan.splits;
}
struct MmaShape {
  int tokens;  // of a block
  int rows;    // of W, of a block
  int depth;   // of K, of a stage
  int blocks;  // that a multiprocessor runs at least, by their registers and shared memory
};
constexpr MmaShape kMmaShapes[] = {
    {8, 32, 1024, 2},  {8, 128, 256, 2},  {16, 128, 256, 2},
    {32, 256, 128, 1}, {64, 256, 128, 1}, {64, 128, 256, 1},  // the last for convolutions alone
};
// y if `sums` is null (mma_parts is 1), else the sums [mma_parts, tokens, N] alone, for
// binary_epilogue_on_cuda: int32 of ungrouped whole numbers, else fp32.
const char* binary_mma_on_cuda(const BinaryWeights& weights, const MmaTokens& tokens, const MmaPlan& plan,
                               const BinaryEpilogue& epilogue, void* sums, const CudaContext& context);

// y from sums [splits, parts, rows, stride]: those of a row are added up in this order.
struct BinarySums {
  const void* sums;
  bool whole;  // int32, else fp32
  int64_t splits, parts, rows, outputs;
  int64_t stride;  // elements from one row to the next, at least `outputs`
  bool fresh;      // as in MmaTokens
};
const char* binary_epilogue_on_cuda(const BinarySums& sums, const BinaryEpilogue& epilogue,
                                    const CudaContext& context);

}  // namespace quantopt

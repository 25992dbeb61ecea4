// Which kernel runs a product with packed weights on CUDA, and how it is divided: the one table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "cuda/binary_linear.h"
#include "cuda/binary_wgmma.h"

namespace quantopt {

enum class BinaryKernel : int32_t {
  kGemv,    // dp4a, one row of x (binary_gemv.cu)
  kMma,     // tensor cores on the packed weights (binary_mma.cu)
  kCublas,  // W expanded into scratch memory, the product of cuBLAS, binary_epilogue_on_cuda
  kWgmma,   // Hopper's tensor cores on the packed weights (binary_wgmma.cu)
};

// From its name; false if there is none of that name.
inline bool find_binary_kernel(std::string_view name, BinaryKernel& kernel) {
  constexpr std::string_view kNames[] = {"gemv", "mma", "cublas", "wgmma"};
  for (int i = 0; i < 4; ++i) {
    if (name != kNames[i]) continue;
    kernel = static_cast<BinaryKernel>(i);
    return true;
  }
  return false;
}

// Why no kernel takes the weights, or null if one does.
inline const char* binary_linear_unsupported(int64_t planes, int64_t group_size) {
  if (planes > kMaxPlanes) return "the CUDA kernels take at most 8 planes";
  if (group_size % kGroupUnit != 0 || (group_size & (group_size - 1)) != 0) {
    return "the CUDA kernels take scales of 32, 64, 128, 256, ... weights (group_size)";
  }
  return nullptr;
}

struct BinaryDispatch {
  int capability;  // of the device, at least
  bool int8;       // the mode
  int64_t rows;    // of x, at most; fp32 counts three times, as it is multiplied in three parts
  BinaryKernel kernel;
};

constexpr int64_t kAnyRows = INT64_MAX;
// The first row that fits. The thresholds are estimates for an H200 (8192 x 8192; 4.3 TB/s, 790 TFLOP/s bf16;
// mma.sync at 60 % of that), to be set from bench/gemm.py --device cuda --only dispatch:
// - int8, 1 row: 64 issue slots of gemv against 96 of mma per 4096 weights; from 2 rows on mma has fewer.
// - int8, 256 rows: mma 28 us; cuBLAS 25 us for expanding and its product, and 7 for quantising and scaling.
// - int8, more rows: wgmma does not expand W, which saves 20-25 us.
// - exact, 512 rows: mma 115 us; cuBLAS 31 us for expanding, 87 for its product, 10 for scaling. cuBLAS keeps
// the rows
//   above: what it costs besides the product is 3 % from 4096 rows on.
constexpr BinaryDispatch kBinaryDispatch[] = {
    {80, true, 1, BinaryKernel::kGemv},         {80, true, 256, BinaryKernel::kMma},
    {90, true, kAnyRows, BinaryKernel::kWgmma}, {80, true, kAnyRows, BinaryKernel::kCublas},
    {80, false, 512, BinaryKernel::kMma},       {80, false, kAnyRows, BinaryKernel::kCublas},
};

// Whole numbers up to it are exact as int8, else as bfloat16.
constexpr int64_t most_expanded(bool int8) { return int8 ? 127 : 256; }

// What a kernel can be given.
inline bool binary_kernel_fits(BinaryKernel kernel, const BinaryWeights& w, bool int8, int64_t rows,
                               int capability) {
  int64_t total = 0, largest = 0;
  for (int64_t i = 0; i < w.planes; ++i) {
    total += w.plane_weights[i];
    largest = std::max<int64_t>(largest, w.plane_weights[i]);
  }
  switch (kernel) {
    case BinaryKernel::kGemv: return int8 && rows == 1 && w.group_scale == nullptr && w.inputs <= kGemvInputs;
    case BinaryKernel::kMma: return true;  // BinaryWeights hold no more than it can do
    case BinaryKernel::kCublas:            // W holds whole numbers up to `total`
      return w.group_scale == nullptr && total <= most_expanded(int8);
    case BinaryKernel::kWgmma:  // each plane by itself
      return binary_wgmma_available(capability) && w.group_scale == nullptr && largest <= most_expanded(int8);
  }
  return false;
}

inline BinaryKernel choose_binary_kernel(const BinaryWeights& w, bool int8, int64_t rows, int capability) {
  for (const BinaryDispatch& d : kBinaryDispatch) {
    if (capability >= d.capability && int8 == d.int8 && rows <= d.rows &&
        binary_kernel_fits(d.kernel, w, int8, rows, capability)) {
      return d.kernel;
    }
  }
  return BinaryKernel::kMma;
}

inline MmaPlan plan_mma(const BinaryWeights& w, const MmaTokens& tokens, int processors) {
  // Blocks of 32 rows need not be divided along K, which costs a second launch before sm_90 (about 2 us, in
  // which the second-level cache of an H200 gives 10 MB), but read the tokens four times as often as those of
  // 128.
  constexpr int64_t kTokenTraffic = 10 << 20;
  const int64_t bytes = tokens.rows * tokens.columns * (tokens.type == MmaTokens::Type::kInt8 ? 1 : 2);
  const int64_t narrow = ceil_divide(w.outputs, kMmaShapes[0].rows);
  MmaPlan plan{0, 1};
  if (tokens.rows > kMmaShapes[0].tokens || narrow > int64_t{processors} * kMmaShapes[0].blocks ||
      narrow * bytes > kTokenTraffic) {
    plan.shape = 1;
    while (plan.shape < 4 && tokens.rows > kMmaShapes[plan.shape].tokens) ++plan.shape;
  }
  // As many parts of K as fill the device, each of as many stages as are under way at once.
  constexpr int64_t kLeastStages = 4;
  const MmaShape& shape = kMmaShapes[plan.shape];
  const int64_t blocks = ceil_divide(w.outputs, shape.rows) * ceil_divide(tokens.rows, shape.tokens);
  const int64_t stages = ceil_divide(w.inputs, shape.depth);
  const int64_t most = std::max<int64_t>(1, stages / kLeastStages);
  const int64_t wanted = std::clamp<int64_t>(int64_t{processors} * shape.blocks / blocks, 1, most);
  plan.splits = static_cast<int>(ceil_divide(stages, ceil_divide(stages, wanted)));
  return plan;
}

inline MmaPlan plan_wgmma(const BinaryWeights& w, const MmaTokens& tokens, int processors) {
  // A block has a multiprocessor to itself. Splits are blocks of a cluster, which has to find its place among
  // 16 or 18 multiprocessors: powers of two.
  constexpr int kLeastBlocks = 4, kMostSplits = 8;
  MmaPlan plan{tokens.rows <= kWgmmaTokens[0] ? 0 : 1, 1};
  const WgmmaGrid grid = wgmma_grid(w, tokens.rows, kWgmmaTokens[plan.shape], 1);
  while (plan.splits < kMostSplits && 2 * plan.splits * grid.blocks <= processors &&
         2 * plan.splits * kLeastBlocks <= grid.depth) {
    plan.splits *= 2;
  }
  return plan;
}

// Rows of x that are multiplied at a time: a grid has 65535 blocks along y, of 8 tokens at least, and a row
// of fp32 is three tokens. So many fill any device, and bound the memory for x as whole numbers or parts.
constexpr int64_t kMostGridY = 65535;
constexpr int64_t kMmaRows = kMostGridY / 3 * kMmaShapes[0].tokens;

// x as `kernel` reads it, quantised or in parts of 16 bits.
struct BinaryProduct {
  BinaryWeights weights;
  CudaRows x;
  bool int8;
  BinaryEpilogue epilogue;  // x_scale is filled in here
};

// y of at most kMmaRows rows by the tensor cores, of Hopper (`wgmma`) or any; divided as plan_wgmma or
// plan_mma says or as `forced`. allocate(bytes) gives memory that lives until the product has been computed.
template <class Allocate>
const char* multiply_by_mma(BinaryProduct p, bool wgmma, const CudaContext& context, const Allocate& allocate,
                            const MmaPlan* forced = nullptr) {
  const CudaRows& x = p.x;
  const int64_t padded = tile_block_count(x.inputs) * kTileDepth;
  const int64_t size = x.dtype == Dtype::kFloat32 ? 4 : 2;
  MmaTokens tokens{};
  int64_t parts = 1;
  if (p.int8) {
    auto* const q = static_cast<int8_t*>(allocate(x.rows * padded));
    auto* const scale = static_cast<float*>(allocate(x.rows * sizeof(float)));
    if (const char* error = quantize_rows_on_cuda(x, XLayout::kTiles, q, padded, scale, context))
      return error;
    p.epilogue.x_scale = scale;
    tokens = {q, MmaTokens::Type::kInt8, x.rows, padded, padded, true};
  } else {
    tokens = {x.x,
              x.dtype == Dtype::kFloat16 ? MmaTokens::Type::kFloat16 : MmaTokens::Type::kBFloat16,
              x.rows,
              x.inputs,
              x.stride * size,
              false};
    const bool readable = reinterpret_cast<uintptr_t>(x.x) % 16 == 0 && x.inputs % 8 == 0 &&
                          (x.rows == 1 || tokens.stride % 16 == 0);
    if (x.dtype == Dtype::kFloat32 || !readable) {
      parts = x.dtype == Dtype::kFloat32 ? 3 : 1;
      void* const copy = allocate(parts * x.rows * padded * 2);
      if (const char* error = split_rows_on_cuda(x, copy, padded, context)) return error;
      tokens = {copy, tokens.type, parts * x.rows, padded, 2 * padded, true};
    }
  }
  const MmaPlan plan = forced != nullptr ? *forced
                       : wgmma           ? plan_wgmma(p.weights, tokens, context.processors)
                                         : plan_mma(p.weights, tokens, context.processors);
  const auto run = wgmma ? binary_wgmma_on_cuda : binary_mma_on_cuda;
  const int splits = wgmma ? 1 : mma_parts(plan, context);
  if (splits == 1 && parts == 1) return run(p.weights, tokens, plan, p.epilogue, nullptr, context);
  void* const sums = allocate(splits * tokens.rows * p.weights.outputs * 4);
  if (const char* error = run(p.weights, tokens, plan, p.epilogue, sums, context)) return error;
  const bool whole = p.int8 && p.weights.group_scale == nullptr;
  return binary_epilogue_on_cuda(
      {sums, whole, splits, parts, x.rows, p.weights.outputs, p.weights.outputs, true}, p.epilogue, context);
}

}  // namespace quantopt

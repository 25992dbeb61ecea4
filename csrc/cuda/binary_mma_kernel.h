// The product of packed weights with tokens on the tensor cores, for binary_mma.cu and binary_conv.cu.
//
// Products of few or many tokens on the tensor cores: W is the operand with 16 rows, the tokens are its
// columns, so that 1 and 8 tokens cost the same. Weights and tokens go to shared memory in stages, 16 bytes a
// thread, past the first-level cache; each lane reads back the weights that it copied itself, as they lie in
// the fragment's order (binary_linear.h). What a warp multiplies with one shift and one logical operation per
// pair of 16-bit floats, or a logical operation and a multiplication per four bytes, are +1 and -1.
//
// The tensor cores add into fp32 without rounding to nearest: sums of at most 128 products are taken there,
// and added up, times the weight of the plane or the group's scale, by the ordinary units. The warps of a
// block that share rows, and the blocks that share rows and tokens (splits), each add a part of K; parts are
// added in their order, so that a result has the same bits in every run: by the blocks themselves where they
// are a cluster and read each other's memory, else by binary_epilogue_on_cuda.
#pragma once

#include <algorithm>

#include "cuda/binary_epilogue.h"
#include "cuda/launch.h"

namespace quantopt {
namespace {

constexpr int kStages = 4;
constexpr int kSegment = 16;  // bytes in one copy
constexpr int kRowPad = 64;   // bytes between rows of tokens in shared memory, against bank conflicts
constexpr int kSumPad = 4;    // floats, the same for the sums

// ---- tokens ----

// Tokens side by side: rows of a matrix.
struct RowTokens {
  struct Source {
    const uint8_t* x;
    int64_t bytes, stride;  // of a row; from one row to the next
  };

  // The copies of a thread: 16 bytes from `column` on of the tokens first, first + step, ...
  template <int Count>
  class Copies {
   public:
    __device__ __forceinline__ Copies(const Source& x, int64_t first, int step, int64_t column)
        : row_(x.x + first * x.stride), step_(step * x.stride), column_(column), bytes_(x.bytes) {}
    __device__ __forceinline__ void copy(int i, uint8_t* to) const {
      copy_async(to, row_ + column_ + i * step_, column_ < bytes_);
    }
    __device__ __forceinline__ void advance(int bytes) { column_ += bytes; }

   private:
    const uint8_t* row_;
    int64_t step_, column_, bytes_;
  };
};

template <class Tokens>
struct Arguments {
  BinaryWeights weights;
  BinaryEpilogue epilogue;
  typename Tokens::Source x;
  int64_t tokens;
  int64_t y_stride;  // elements from a token's row of y to the next
  void* sums;
  int splits;
  bool cluster;  // the splits are one: they add up their parts
};

// ---- operands ----

// 16-bit floats: fragment j (0..7) of a block has the weights e % 8 / 4 = j % 2 of c = j / 2.
template <uint32_t kOnes, void (*Multiply)(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t)>
struct Floats {
  using Sum = float;    // of the tensor cores
  using Total = float;  // of the block's part of K
  static constexpr int kBytes = 2;
  static constexpr int kFragments = 8;
  static constexpr int kGroupFragments = 2;  // of 32 weights

  static __device__ __forceinline__ uint32_t pair(uint32_t word, int shift) {
    return and_or(word << shift, 0x80008000u, kOnes);
  }
  static __device__ __forceinline__ void fragment(const uint32_t* words, int j, uint32_t (&a)[4]) {
    a[0] = pair(words[0], 15 - j);
    a[1] = pair(words[1], 15 - j);
    a[2] = pair(words[0], 7 - j);
    a[3] = pair(words[1], 7 - j);
  }
  static __device__ __forceinline__ void multiply(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    Multiply(c, a, b0, b1);
  }
};
using BFloat16s = Floats<0x3F803F80u, mma_bf16>;
using Halfs = Floats<0x3C003C00u, mma_f16>;

// Whole numbers: fragment c has the 32 weights of c. Ungrouped, the total is a whole number too.
template <class T>
struct Bytes {
  using Sum = int32_t;
  using Total = T;
  static constexpr int kBytes = 1;
  static constexpr int kFragments = 4;
  static constexpr int kGroupFragments = 1;

  static __device__ __forceinline__ void fragment(const uint32_t* words, int j, uint32_t (&a)[4]) {
    constexpr uint32_t kOnes = 0x01010101u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = words[i] >> (2 * j);
      a[i] = (word & kOnes) * 254 + kOnes;  // 1 or 255 = -1, no byte carries into the next
      a[i + 2] = (word & (kOnes << 1)) * 127 + kOnes;
    }
  }
  static __device__ __forceinline__ void multiply(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    mma_s8(c, a, b0, b1);
  }
};

__device__ __forceinline__ void add_product(float& total, float sum, float factor) {
  total = fmaf(sum, factor, total);
}
__device__ __forceinline__ void add_product(float& total, int32_t sum, float factor) {
  total = fmaf(static_cast<float>(sum), factor, total);
}
__device__ __forceinline__ void add_product(int32_t& total, int32_t sum, int32_t factor) {
  total += sum * factor;
}

// ---- the kernel ----

template <class Op, int Shape>
struct Layout {
  static constexpr MmaShape kShape = kMmaShapes[Shape];
  static constexpr int kTokens = kShape.tokens, kRows = kShape.rows;
  static constexpr int kColumnTiles = kTokens / 8;               // of 8 tokens
  static constexpr int kRowWarps = kRows / kTileRows;            // side by side along N
  static constexpr int kDepthWarps = kShape.depth / kTileDepth;  // and along K: a block each per stage
  static constexpr int kWarps = kRowWarps * kDepthWarps, kThreads = 32 * kWarps;
  static constexpr int kWeightBytes = kThreads * kSegment;
  static constexpr int kTokenBytes = kShape.depth * Op::kBytes;  // of a token in a stage
  static constexpr int kTokenStride = kTokenBytes + kRowPad;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kTokenStride;
  static constexpr int kSumStride = kRows + kSumPad;
  static constexpr int kShared =
      std::max(kStages * kStageBytes, kDepthWarps * kTokens * kSumStride * int{sizeof(float)});
};

// Tokens: what a thread copies of x, RowTokens or ConvTokens.
template <class Op, int Shape, class Tokens>
__global__ void __launch_bounds__(Layout<Op, Shape>::kThreads, kMmaShapes[Shape].blocks)
    mma_kernel(const __grid_constant__ Arguments<Tokens> p) {
  using L = Layout<Op, Shape>;
  using Total = typename Op::Total;
  uint4* const shared = dynamic_shared();
  auto* const memory = reinterpret_cast<uint8_t*>(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int row_warp = warp % L::kRowWarps, depth_warp = warp / L::kRowWarps;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_row = int64_t{blockIdx.x} * L::kRows;
  const int64_t first_token = int64_t{blockIdx.y} * L::kTokens;
  const int tokens = static_cast<int>(min(int64_t{L::kTokens}, p.tokens - first_token));
  const BinaryWeights& w = p.weights;
  const bool grouped = w.group_scale != nullptr;
  const int group_shift = grouped ? __ffs(static_cast<int>(w.group_units)) - 1 : 0;

  // This block's part of K in stages, once for each plane.
  const int blocks = static_cast<int>(tile_block_count(w.inputs));
  const int all_stages = (blocks + L::kDepthWarps - 1) / L::kDepthWarps;
  const int stages_each = (all_stages + p.splits - 1) / p.splits;
  const int begin = min(all_stages, static_cast<int>(blockIdx.z) * stages_each);
  const int end = min(all_stages, begin + stages_each);
  const int planes = static_cast<int>(w.planes);
  const int count = (end - begin) * planes;

  // This warp's 32 rows of W, none if they lie below the last.
  const int64_t tile = first_row / kTileRows + row_warp;
  const bool has_rows = tile < tile_row_count(w.outputs);
  const auto has_block = [&](int stage) { return has_rows && stage * L::kDepthWarps + depth_warp < blocks; };

  // The copies of one stage and plane after the other. A thread copies the same columns of some tokens.
  constexpr int kSegments = L::kTokenBytes / kSegment, kTokenStep = L::kThreads / kSegments;
  static_assert(kSegments * kTokenStep == L::kThreads);
  const int64_t plane_words = tile_plane_words(w.outputs, w.inputs);
  const uint32_t* weights =
      w.tiles + (tile * blocks + begin * L::kDepthWarps + depth_warp) * kTileWords + 4 * lane;
  const int my_token = thread / kSegments, my_column = thread % kSegments * kSegment;
  constexpr int kTokenCopies = (L::kTokens + kTokenStep - 1) / kTokenStep;
  typename Tokens::template Copies<kTokenCopies> token_copies(p.x, first_token + my_token, kTokenStep,
                                                              int64_t{begin} * L::kTokenBytes + my_column);
  int weight_stage = begin, weight_plane = 0, token_plane = 0;
  const auto copy_weights = [&](int slot) {
    if (has_block(weight_stage)) copy_async(memory + slot * L::kStageBytes + thread * kSegment, weights);
    weights += plane_words;
    if (++weight_plane == planes) {
      weight_plane = 0;
      ++weight_stage;
      weights += L::kDepthWarps * kTileWords - planes * plane_words;
    }
  };
  const auto copy_tokens = [&](int slot) {
    uint8_t* to = memory + slot * L::kStageBytes + L::kWeightBytes + my_token * L::kTokenStride + my_column;
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      if (my_token + i * kTokenStep < tokens) token_copies.copy(i, to);
      to += kTokenStep * L::kTokenStride;
    }
    if (++token_plane == planes) {
      token_plane = 0;
      token_copies.advance(L::kTokenBytes);
    }
  };

  // Tokens that do not exist are zeros for good.
  for (int i = thread; i < kStages * (L::kTokens - tokens) * (L::kTokenStride / kSegment); i += L::kThreads) {
    constexpr int kRow = L::kTokenStride / kSegment;
    const int slot = i / kRow % kStages, token = tokens + i / kRow / kStages;
    *reinterpret_cast<uint4*>(memory + slot * L::kStageBytes + L::kWeightBytes + token * L::kTokenStride +
                              i % kRow * kSegment) = uint4{0, 0, 0, 0};
  }
  for (int slot = 0; slot < kStages - 1 && slot < count; ++slot) copy_weights(slot);
  wait_for_previous_kernel();  // which may have written x
  for (int slot = 0; slot < kStages - 1; ++slot) {
    if (slot < count) copy_tokens(slot);
    copy_async_commit();
  }

  Total total[2][L::kColumnTiles][4] = {};
  int stage = begin, plane = 0, slot = 0;
  for (int i = 0; i < count; ++i) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // all threads' copies for this stage are there, and all have done with the stage before
    {
      const int next = slot == 0 ? kStages - 1 : slot - 1;
      if (i + kStages - 1 < count) {
        copy_weights(next);
        copy_tokens(next);
      }
      copy_async_commit();
    }
    if (has_block(stage)) {
      const uint8_t* const at = memory + slot * L::kStageBytes;
      const uint4 loaded = *reinterpret_cast<const uint4*>(at + thread * kSegment);
      const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
      const uint8_t* const from =
          at + L::kWeightBytes + depth_warp * (kTileDepth * Op::kBytes) + g * L::kTokenStride + t * kSegment;
      const auto unit =
          static_cast<uint32_t>((stage * L::kDepthWarps + depth_warp) * (kTileDepth / kGroupUnit));
      typename Op::Sum sum[2][L::kColumnTiles][4] = {};
      uint4 b[L::kColumnTiles];
#pragma unroll
      for (int j = 0; j < Op::kFragments; ++j) {
        if (j % 2 == 0) {
#pragma unroll
          for (int n = 0; n < L::kColumnTiles; ++n) {
            b[n] = *reinterpret_cast<const uint4*>(from + n * 8 * L::kTokenStride + j / 2 * 64);
          }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          uint32_t a[4];
          Op::fragment(words + 2 * m, j, a);
#pragma unroll
          for (int n = 0; n < L::kColumnTiles; ++n) {
            Op::multiply(sum[m][n], a, j % 2 == 0 ? b[n].x : b[n].z, j % 2 == 0 ? b[n].y : b[n].w);
          }
        }
        // After the block, or after a group, whichever comes first.
        if (j % Op::kGroupFragments != Op::kGroupFragments - 1) continue;
        const uint32_t at_unit = unit + j / Op::kGroupFragments;
        if (j != Op::kFragments - 1 && !(grouped && ((at_unit + 1) & (w.group_units - 1)) == 0)) continue;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // rows g and g + 8
            Total factor = static_cast<Total>(w.plane_weights[plane]);
            if constexpr (std::is_same_v<Total, float>) {
              if (grouped) {
                const int64_t n = first_row + row_warp * kTileRows + 16 * m + 8 * half + g;
                const uint32_t group = at_unit >> group_shift;
                factor *= n < w.outputs && group < w.groups ? w.group_scale[n * w.groups + group] : 0.0f;
              }
            }
#pragma unroll
            for (int n = 0; n < L::kColumnTiles; ++n) {
#pragma unroll
              for (int i = 2 * half; i < 2 * half + 2; ++i) {
                add_product(total[m][n][i], sum[m][n][i], factor);
                sum[m][n][i] = 0;
              }
            }
          }
        }
      }
    }
    slot = slot == kStages - 1 ? 0 : slot + 1;
    if (++plane == planes) plane = 0, ++stage;
  }

  // The warps' sums meet in shared memory, where the stages were.
  copy_async_wait<0>();
  __syncthreads();
  auto* const parts = reinterpret_cast<Total*>(shared);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < L::kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row_warp * kTileRows + 16 * m + 8 * (i / 2) + g, token = 8 * n + 2 * t + i % 2;
        parts[(depth_warp * L::kTokens + token) * L::kSumStride + row] = total[m][n][i];
      }
    }
  }
  __syncthreads();
  start_next_kernel();
  if (p.cluster) cluster_barrier();
  // In a cluster every block takes some of the sums.
  const int rank = p.cluster ? static_cast<int>(blockIdx.z) : 0, takers = p.cluster ? p.splits : 1;
  const int64_t part = p.cluster ? 0 : blockIdx.z;
  for (int i = rank * L::kThreads + thread; i < tokens * L::kRows; i += takers * L::kThreads) {
    const int token = i / L::kRows, row = i % L::kRows;
    const int64_t n = first_row + row, m = first_token + token;
    if (n >= w.outputs) continue;
    const auto at = [&](int depth) { return parts + (depth * L::kTokens + token) * L::kSumStride + row; };
    Total sum = 0;
    if (p.cluster) {
      for (int block = 0; block < p.splits; ++block) {
        Total of_block = load_from_block(at(0), block);
#pragma unroll
        for (int d = 1; d < L::kDepthWarps; ++d) of_block += load_from_block(at(d), block);
        sum += of_block;
      }
    } else {
      sum = *at(0);
#pragma unroll
      for (int d = 1; d < L::kDepthWarps; ++d) sum += *at(d);
    }
    if (p.sums != nullptr) {
      static_cast<Total*>(p.sums)[(part * p.tokens + m) * w.outputs + n] = sum;
    } else {
      store_with_epilogue(p.epilogue, static_cast<float>(sum), m, n, p.y_stride);
    }
  }
  if (p.cluster) cluster_barrier();  // none leaves while another reads its sums
}

// ---- launching ----

template <class Op, int Shape, class Tokens>
cudaError_t run_mma(const Arguments<Tokens>& arguments, bool overlap, cudaStream_t stream) {
  using L = Layout<Op, Shape>;
  const dim3 blocks(static_cast<unsigned>(ceil_divide(arguments.weights.outputs, L::kRows)),
                    static_cast<unsigned>(ceil_divide(arguments.tokens, L::kTokens)),
                    static_cast<unsigned>(arguments.splits));
  const int cluster = arguments.cluster ? arguments.splits : 1;
  return launch({blocks, L::kThreads, static_cast<size_t>(L::kShared), overlap, cluster, stream},
                mma_kernel<Op, Shape, Tokens>, arguments);
}

}  // namespace
}  // namespace quantopt

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "cuda/binary_epilogue.h"
#include "cuda/binary_wgmma.h"
#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

// Products of many tokens on Hopper's tensor cores (wgmma): Y^T = W X^T, W from registers, where bits become
// +-1, X from shared memory. A block has three warpgroups. One thread of the first has the copy engine bring
// X into a ring of stages, 128 bytes of each of the block's tokens. The others multiply 128 rows of W each,
// two products of 64 rows side by side; their weights come from memory straight into registers, one block of
// K ahead, and become fragments while the products before are under way: two sets of fragments, one read, the
// other written.
//
// The tensor cores add into int32 exactly, into fp32 without rounding to nearest, over all of K, as the
// cuBLAS does. Blocks of a cluster each take a part of K (splits) and add their sums in order,
// reading each other's shared memory, as in binary_mma.cu: the result has the same bits in every run.

namespace quantopt {
namespace {

constexpr int kSumPad = 4;  // numbers between the sums of tokens in shared memory, against bank conflicts
constexpr int kSumStride = kGroupRows + kSumPad;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 65536 in all

struct Arguments {
  BinaryWeights weights;
  BinaryEpilogue epilogue;
  int64_t tokens;
  void* sums;
  WgmmaGrid grid;
};

// ---- operands ----

// Fragments 2 c and 2 c + 1 of 16-bit floats are c of whole numbers: both steps are 32 weights for floats, 64
// for whole numbers, of a row.
template <uint32_t (*Pattern)(int), class Multiply>
struct Floats {
  using Sum = float;
  using Factor = uint32_t;  // the plane's weight, twice
  static constexpr bool kBytes = false;
  static constexpr int kStagesOfBlock = 2;

  static __device__ __forceinline__ Factor factor(int weight) { return Pattern(weight) * 0x10001u; }
  static __device__ __forceinline__ void fragment(uint32_t row, uint32_t row_8, int j, Factor factor,
                                                  uint32_t (&a)[4]) {
    a[0] = and_or(row << (15 - j), 0x80008000u, factor);
    a[1] = and_or(row_8 << (15 - j), 0x80008000u, factor);
    a[2] = and_or(row << (7 - j), 0x80008000u, factor);
    a[3] = and_or(row_8 << (7 - j), 0x80008000u, factor);
  }
  template <int kCount>
  static __device__ __forceinline__ void multiply(Sum (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {
    Multiply::run(c, a, b);
  }
};
__device__ __forceinline__ uint32_t bfloat16_pattern(int weight) {
  BFloat16 x;
  from_float(static_cast<float>(weight), x);
  return x.bits;
}
__device__ __forceinline__ uint32_t half_pattern(int weight) {
  Half x;
  from_float(static_cast<float>(weight), x);
  return x.bits;
}
struct MultiplyBFloat16 {
  template <int kCount>
  static __device__ __forceinline__ void run(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {
    wgmma_bf16(c, a, b);
  }
};
struct MultiplyHalf {
  template <int kCount>
  static __device__ __forceinline__ void run(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {
    wgmma_f16(c, a, b);
  }
};
using BFloat16s = Floats<bfloat16_pattern, MultiplyBFloat16>;
using Halfs = Floats<half_pattern, MultiplyHalf>;

struct Bytes {
  using Sum = int32_t;
  struct Factor {
    uint32_t low, high, plus;
  };
  static constexpr bool kBytes = true;
  static constexpr int kStagesOfBlock = 1;

  // From a bit to a byte: w, or 256 - w = -w; no byte carries into the next.
  static __device__ __forceinline__ Factor factor(int weight) {
    const auto w = static_cast<uint32_t>(weight);
    return {256 - 2 * w, 128 - w, w * 0x01010101u};
  }
  static __device__ __forceinline__ void fragment(uint32_t row, uint32_t row_8, int j, const Factor& f,
                                                  uint32_t (&a)[4]) {
    constexpr uint32_t kOnes = 0x01010101u;
    row >>= 2 * j;
    row_8 >>= 2 * j;
    a[0] = (row & kOnes) * f.low + f.plus;
    a[1] = (row_8 & kOnes) * f.low + f.plus;
    a[2] = (row & (kOnes << 1)) * f.high + f.plus;
    a[3] = (row_8 & (kOnes << 1)) * f.high + f.plus;
  }
  template <int kCount>
  static __device__ __forceinline__ void multiply(Sum (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {
    wgmma_s8(c, a, b);
  }
};

// Bits where wgmma wants them (binary_wgmma.h).
template <bool kBytes>
__device__ __forceinline__ void exchange(int lane, uint32_t (&words)[4]) {
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    constexpr LaneSwap kSwaps[] = {lane_swap(kBytes, 0), lane_swap(kBytes, 1)};
    const LaneSwap& swap = kSwaps[which];
    const bool upper = (lane & swap.lane) != 0;
    const uint32_t keep = upper ? swap.mask : ~swap.mask;
    const auto turn = static_cast<uint32_t>(upper ? 32 - swap.distance : swap.distance);
#pragma unroll
    for (uint32_t& word : words) {
      const uint32_t other = __shfl_xor_sync(~0u, word, swap.lane);
      word = (word & keep) | (__funnelshift_l(other, other, turn) & ~keep);
    }
  }
}

// ---- the kernel ----

template <class Op, int kTokens>
struct Layout {
  static constexpr int kStages = kTokens == 128 ? 4 : 8;
  static constexpr int kStageBytes = kTokens * kBoxBytes;
  static constexpr int kRing = kStages * kStageBytes;
  static constexpr int kGroupSums = kTokens * kSumStride;
  static constexpr int kBarriers = kRing + kWgmmaGroups * kGroupSums * 4;
  static constexpr int kShared = kAtomBytes + kBarriers + 2 * kStages * int{sizeof(SharedBarrier)};
  static_assert(kStageBytes % kAtomBytes == 0 && kShared <= 227 << 10);
};

template <class Y>
struct alignas(4 * sizeof(Y)) Four {
  Y at[4];
};
// `count` of four neighbours of y, all at once if `together`.
template <class Y>
__device__ __forceinline__ void store_four(void* y, int64_t at, const float (&value)[4], int count,
                                           bool together) {
  Four<Y> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) from_float(value[i], four.at[i]);
  Y* const to = static_cast<Y*>(y) + at;
  if (together) {
    *reinterpret_cast<Four<Y>*>(to) = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) to[i] = four.at[i];
  }
}

template <class Op, int kTokens>
__device__ __forceinline__ void produce(const TensorMap& x, const Arguments& p, uint8_t* ring,
                                        SharedBarrier* full, SharedBarrier* empty) {
  using L = Layout<Op, kTokens>;
  const WgmmaGrid& grid = p.grid;
  const int begin = split_begin(grid, static_cast<int>(blockIdx.z));
  const int end = split_begin(grid, static_cast<int>(blockIdx.z) + 1);
  constexpr int kColumns = Op::kBytes ? kBoxBytes : kBoxBytes / 2;
  RingSlot at{0, 1};           // the first time round all stages are free
  wait_for_previous_kernel();  // which may have written x
  for (int64_t block = blockIdx.x; block < grid.blocks; block += gridDim.x) {
    const int row = static_cast<int>(token_block_of(grid, block) * kTokens);
    for (int plane = 0; plane < grid.planes; ++plane) {
      for (int stage = begin * Op::kStagesOfBlock; stage < end * Op::kStagesOfBlock; ++stage) {
        wait_phase(&empty[at.slot], at.parity);
        arrive_and_expect(&full[at.slot], L::kStageBytes);
        copy_box(ring + at.slot * L::kStageBytes, x, stage * kColumns, row, &full[at.slot]);
        advance<L::kStages>(at);
      }
    }
  }
}

template <class Op, int kTokens>
__device__ __forceinline__ void consume(const Arguments& p, uint8_t* ring, typename Op::Sum* all_sums,
                                        SharedBarrier* full, SharedBarrier* empty) {
  using L = Layout<Op, kTokens>;
  using Sum = typename Op::Sum;
  const WgmmaGrid& grid = p.grid;
  const BinaryWeights& w = p.weights;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32 % 4;
  const int group = thread / 128 - 1;
  const int split = static_cast<int>(blockIdx.z);
  const int begin = split_begin(grid, split), blocks = split_begin(grid, split + 1) - begin;
  const int64_t plane_words = tile_plane_words(w.outputs, w.inputs);
  Sum* const sums = all_sums + group * L::kGroupSums;
  RingSlot at{0, 0};
  bool waited = false;

  for (int64_t block = blockIdx.x; block < grid.blocks; block += gridDim.x) {
    const int64_t first_row = row_block_of(grid, block) * kWgmmaRows + group * kGroupRows;
    const int64_t first_token = token_block_of(grid, block) * kTokens;

    // This warp's 32 rows of W, zeros for those that lie below the last: their sums go nowhere.
    const int64_t rows = first_row / kTileRows + warp;
    const bool has_rows = rows < tile_row_count(w.outputs);
    const uint32_t* const tiles = w.tiles + (rows * grid.depth + begin) * kTileWords + 4 * lane;
    int next_plane = 0, next_block = 0;  // of the weights to be loaded
    const auto load = [&] {
      uint4 loaded{0, 0, 0, 0};
      if (has_rows && next_plane < grid.planes) {
        loaded = *reinterpret_cast<const uint4*>(tiles + next_plane * plane_words + next_block * kTileWords);
      }
      if (++next_block == blocks) next_block = 0, ++next_plane;
      return loaded;
    };

    Sum c[2][kTokens / 2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) c[m][i] = 0;
    }
    uint32_t words[4];
    uint32_t a[2][2][2][4];  // two sets; of each two fragments along K, of 2 x 64 rows
    typename Op::Factor factor = Op::factor(w.plane_weights[0]);
    const auto unpack = [&](int set, int step) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Op::fragment(words[2 * m], words[2 * m + 1], 2 * step + j, factor, a[set][j][m]);
        }
      }
    };
    const auto multiply = [&](int set, uint64_t descriptor) {
      products_fence();
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Op::multiply(c[m], a[set][j][m], descriptor + static_cast<uint64_t>(j * kStepBytes >> 4));
        }
      }
      products_commit();
    };
    const auto set_words = [&](const uint4& loaded) {
      words[0] = loaded.x;
      words[1] = loaded.y;
      words[2] = loaded.z;
      words[3] = loaded.w;
      exchange<Op::kBytes>(lane, words);
    };

    set_words(load());
    if (!waited)
      wait_for_previous_kernel();  // before the first use of what it may have written or may still read
    waited = true;
    unpack(0, 0);
    int previous = -1;  // the slot whose second half is being multiplied
    for (int plane = 0; plane < grid.planes; ++plane) {
      for (int step = 0; step < blocks; ++step) {
        const uint4 next = load();
#pragma unroll
        for (int stage = 0; stage < Op::kStagesOfBlock; ++stage) {
          const uint64_t descriptor = operand_descriptor(ring + at.slot * L::kStageBytes);
          wait_phase(&full[at.slot], at.parity);
          multiply(0, descriptor);
          products_wait<1>();
          if (previous >= 0 && lane == 0) arrive(&empty[previous]);
          unpack(1, 2 * stage + 1);
          multiply(1, descriptor + static_cast<uint64_t>(2 * kStepBytes >> 4));
          products_wait<1>();
          if (stage == Op::kStagesOfBlock - 1) {
            set_words(next);
            if (step == blocks - 1 && plane + 1 < grid.planes)
              factor = Op::factor(w.plane_weights[plane + 1]);
            unpack(0, 0);
          } else {
            unpack(0, 2 * stage + 2);
          }
          previous = at.slot;
          advance<L::kStages>(at);
        }
      }
    }
    products_wait<0>();
    keep_in_place(c[0]);
    keep_in_place(c[1]);
    if (lane == 0) arrive(&empty[previous]);

    // The sums, to shared memory by tokens: a lane then has four neighbours in N.
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        sums[sum_token(lane, i) * kSumStride + warp * kTileRows + 16 * m + sum_row(lane, i)] = c[m][i];
      }
    }
    if (grid.splits > 1) {
      cluster_barrier();
    } else {
      warpgroup_barrier(1 + group);
    }
    const int64_t n = first_row + 4 * lane;
    const int count = static_cast<int>(min(int64_t{4}, w.outputs - n));
    const bool together = count == 4 && w.outputs % 4 == 0;
    const BinaryEpilogue& e = p.epilogue;
    float scale[4], bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = e.scale != nullptr && i < count ? e.scale[(n + i) * e.scale_stride] : 1.0f;
      bias[i] = e.bias != nullptr && i < count ? e.bias[n + i] : 0.0f;
    }
    const int tokens = static_cast<int>(min(int64_t{kTokens}, p.tokens - first_token));
    for (int token = warp + 4 * split; token < tokens && count > 0; token += 4 * grid.splits) {
      const Sum* const from = sums + token * kSumStride + 4 * lane;
      const int64_t m = first_token + token;
      Sum sum[4];
      if (grid.splits == 1) {
        *reinterpret_cast<uint4*>(sum) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[i] = load_from_block(from + i, 0);
          for (int other = 1; other < grid.splits; ++other) sum[i] += load_from_block(from + i, other);
        }
      }
      if (p.sums != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < count) static_cast<Sum*>(p.sums)[m * w.outputs + n + i] = sum[i];
        }
        continue;
      }
      const float x_scale = e.x_scale != nullptr ? e.x_scale[m] : 1.0f;
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[i] = with_epilogue(e, static_cast<float>(sum[i]), scale[i], x_scale, bias[i]);
      }
      switch (e.dtype) {
        case Dtype::kFloat32: store_four<float>(e.y, m * w.outputs + n, y, count, together); break;
        case Dtype::kBFloat16: store_four<BFloat16>(e.y, m * w.outputs + n, y, count, together); break;
        case Dtype::kFloat16: store_four<Half>(e.y, m * w.outputs + n, y, count, together); break;
      }
    }
    if (grid.splits == 1) warpgroup_barrier(1 + group);  // before the next block's sums
  }
}

template <class Op, int kTokens>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    wgmma_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ Arguments p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<Op, kTokens>;
  auto* memory = reinterpret_cast<uint8_t*>(dynamic_shared());
  memory += (kAtomBytes - reinterpret_cast<uintptr_t>(memory) % kAtomBytes) % kAtomBytes;
  auto* const sums = reinterpret_cast<typename Op::Sum*>(memory + L::kRing);
  auto* const full = reinterpret_cast<SharedBarrier*>(memory + L::kBarriers);
  SharedBarrier* const empty = full + L::kStages;
  if (threadIdx.x == 0) {
    prefetch_map(x);
    for (int slot = 0; slot < L::kStages; ++slot) {
      make_barrier(&full[slot], 1);
      make_barrier(&empty[slot], 4 * kWgmmaGroups);
    }
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<Op, kTokens>(x, p, memory, full, empty);
    if (p.grid.splits > 1) cluster_barrier();  // where the others have put their sums
  } else {
    take_registers<kConsumerRegisters>();
    consume<Op, kTokens>(p, memory, sums, full, empty);
  }
  start_next_kernel();
  if (p.grid.splits > 1) cluster_barrier();  // none leaves while another reads its sums
#endif
}

// ---- launching ----

template <class Op, int kTokens>
cudaError_t run(const MmaTokens& x, Arguments arguments, int splits, const CudaContext& context) {
  using L = Layout<Op, kTokens>;
  arguments.grid = wgmma_grid(arguments.weights, x.rows, kTokens, splits);
  constexpr int kSize = Op::kBytes ? 1 : 2;
  const int64_t stride = x.rows > 1 ? x.stride : ceil_divide(x.columns * kSize, 16) * 16;
  TensorMap map;
  const cudaError_t error = make_tensor_map(map, x.x, Op::kBytes, x.rows, x.columns, stride, kTokens);
  if (error != cudaSuccess) return error;
  const int64_t blocks =
      splits > 1 ? arguments.grid.blocks : std::min<int64_t>(arguments.grid.blocks, context.processors);
  return launch({dim3(static_cast<unsigned>(blocks), 1, static_cast<unsigned>(splits)), kWgmmaThreads,
                 static_cast<size_t>(L::kShared), x.fresh, splits, static_cast<cudaStream_t>(context.stream)},
                wgmma_kernel<Op, kTokens>, map, arguments);
}

template <class Op>
cudaError_t run_shape(const MmaTokens& x, const Arguments& arguments, const MmaPlan& plan,
                      const CudaContext& context) {
  switch (plan.shape) {
    case 0: return run<Op, kWgmmaTokens[0]>(x, arguments, plan.splits, context);
    case 1: return run<Op, kWgmmaTokens[1]>(x, arguments, plan.splits, context);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

bool binary_wgmma_available([[maybe_unused]] int capability) {
#ifdef QUANTOPT_HAVE_SM90A
  const char* const choice = std::getenv("QUANTOPT_WGMMA");
  return capability == 90 && (choice == nullptr || std::string_view(choice) != "0");
#else
  return false;
#endif
}

const char* binary_wgmma_on_cuda(const BinaryWeights& weights, const MmaTokens& tokens, const MmaPlan& plan,
                                 const BinaryEpilogue& epilogue, void* sums, const CudaContext& context) {
  const Arguments arguments{weights, epilogue, tokens.rows, sums, {}};
  return on_device(context.device, [&] {
    switch (tokens.type) {
      case MmaTokens::Type::kBFloat16: return run_shape<BFloat16s>(tokens, arguments, plan, context);
      case MmaTokens::Type::kFloat16: return run_shape<Halfs>(tokens, arguments, plan, context);
      default: return run_shape<Bytes>(tokens, arguments, plan, context);
    }
  });
}

}  // namespace quantopt

#include <algorithm>

#include "cuda/binary_epilogue.h"
#include "cuda/binary_rows.h"
#include "cuda/launch.h"

// One row of whole numbers times W: two instructions per four weights. A mask leaves of a word of the tiles
// the four bits of one value, 2^j, in its bytes; dp4a adds up the numbers of x where they are set, that is
// where the weight is -1. Each j has a sum of its own, shifted at the end: S = sum x - 2 * sum_j (sum_j >>
// j), exactly.
//
// A block quantises x into shared memory once, while its first weights are on their way, and then takes one
// tile of 32 rows after another; its warps share K.

namespace quantopt {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kAhead = 4;               // loads of 16 bytes per lane under way
constexpr int kBlocksPerProcessor = 2;  // as registers allow

struct Arguments {
  BinaryWeights weights;
  BinaryEpilogue epilogue;
  const void* x;
  bool aligned;
};

template <class X>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    gemv_kernel(const __grid_constant__ Arguments p) {
  uint4* const shared = dynamic_shared();  // x as whole numbers, XLayout::kTiles
  __shared__ int32_t warp_sums[kWarps][kTileRows];
  __shared__ int32_t x_sums[kWarps];
  const BinaryWeights& w = p.weights;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int blocks = static_cast<int>(tile_block_count(w.inputs));
  const int64_t tiles = tile_row_count(w.outputs);

  // A warp's work is a sequence of strides: kAhead blocks of K, kWarps apart, for each plane of each tile.
  const int strides = (blocks + kWarps * kAhead - 1) / (kWarps * kAhead);
  const auto load = [&](int64_t tile, int plane, int stride, uint4(&words)[kAhead]) {
    const uint32_t* from =
        w.tiles + plane * tile_plane_words(w.outputs, w.inputs) + tile * blocks * kTileWords;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int block = (stride * kAhead + i) * kWarps + warp;
      words[i] = block < blocks ? load_streaming(from + block * kTileWords + 4 * lane) : uint4{0, 0, 0, 0};
    }
  };
  uint4 next[kAhead];
  load(blockIdx.x, 0, 0, next);

  const X* x = static_cast<const X*>(p.x);
  const float s = block_scale(x, w.inputs, p.aligned), inverse = 1.0f / s;
  int32_t x_sum = 0;
  for (int64_t k = thread * kRun; k < int64_t{blocks} * kTileDepth; k += kThreads * kRun) {
    X run[kRun];
    load_run(x, k, w.inputs, p.aligned, run);
    const uint2 q = quantize_run(run, s, inverse, XLayout::kTiles);
    *reinterpret_cast<uint2*>(reinterpret_cast<uint8_t*>(shared) + run_offset(k, XLayout::kTiles)) = q;
    x_sum = dot4(0x01010101u, q.y, dot4(0x01010101u, q.x, x_sum));
  }
  for (int mask = 16; mask > 0; mask /= 2) x_sum += __shfl_xor_sync(~0u, x_sum, mask);
  if (lane == 0) x_sums[warp] = x_sum;
  __syncthreads();
  x_sum = 0;
  for (int i = 0; i < kWarps; ++i) x_sum += x_sums[i];

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int32_t total[4] = {0, 0, 0, 0};  // of rows g + 8 i: the sum of x where the weight is -1, over the planes
    int32_t all = 0;                  // the sum of x as often as the planes weigh
    for (int plane = 0; plane < w.planes; ++plane) {
      int32_t sum[4][8] = {};
      for (int stride = 0; stride < strides; ++stride) {
        uint4 words[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) words[i] = next[i];
        const bool last_stride = stride + 1 == strides, last_plane = plane + 1 == w.planes;
        const int64_t next_tile = last_stride && last_plane ? tile + gridDim.x : tile;
        if (next_tile < tiles) {
          load(next_tile, last_stride ? (last_plane ? 0 : plane + 1) : plane, last_stride ? 0 : stride + 1,
               next);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int block = (stride * kAhead + i) * kWarps + warp;
          if (block >= blocks) continue;
          const uint4* q = shared + block * (kTileDepth / 16) + lane % 4;
          const uint4 low = q[0], high = q[4];
          const uint32_t numbers[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
          const uint32_t rows[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
          for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[r][j] = dot4(rows[r] & (0x01010101u << j), numbers[j], sum[r][j]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        int32_t negative = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) negative += sum[r][j] >> j;
        total[r] += w.plane_weights[plane] * negative;
      }
      all += w.plane_weights[plane] * x_sum;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      for (int mask = 2; mask > 0; mask /= 2) total[r] += __shfl_xor_sync(~0u, total[r], mask);
      if (lane % 4 == 0) warp_sums[warp][8 * r + lane / 4] = total[r];
    }
    __syncthreads();
    if (thread < kTileRows) {
      int32_t negative = 0;
      for (int i = 0; i < kWarps; ++i) negative += warp_sums[i][thread];
      const int64_t n = tile * kTileRows + thread;
      if (n < w.outputs)
        store_with_epilogue(p.epilogue, static_cast<float>(all - 2 * negative), s, 0, n, w.outputs);
    }
    __syncthreads();
  }
}

template <class X>
cudaError_t run(const Arguments& arguments, const CudaContext& context) {
  const int64_t blocks =
      std::min(tile_row_count(arguments.weights.outputs), int64_t{context.processors} * kBlocksPerProcessor);
  const auto shared = static_cast<size_t>(tile_block_count(arguments.weights.inputs) * kTileDepth);
  return launch({dim3(static_cast<unsigned>(blocks)), kThreads, shared, false, 1,
                 static_cast<cudaStream_t>(context.stream)},
                gemv_kernel<X>, arguments);
}

}  // namespace

const char* binary_gemv_on_cuda(const BinaryWeights& weights, const CudaRows& x,
                                const BinaryEpilogue& epilogue, const CudaContext& context) {
  const Arguments arguments{weights, epilogue, x.x, rows_aligned(x)};
  return on_device(context.device, [&] {
    switch (x.dtype) {
      case Dtype::kBFloat16: return run<BFloat16>(arguments, context);
      case Dtype::kFloat16: return run<Half>(arguments, context);
      default: return run<float>(arguments, context);
    }
  });
}

}  // namespace quantopt

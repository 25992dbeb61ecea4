// What binary_wgmma.cu divides and where it finds it: index arithmetic that the kernel, its emulation on the
// host and the tests share.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "cuda/binary_linear.h"

namespace quantopt {

// ---- shared memory ----

constexpr int kBoxBytes = 128;    // of a row of x, in one stage
constexpr int kAtomBytes = 1024;  // eight such rows: the swizzle repeats, and a stage begins at a multiple

// Where the copy engine puts a byte, and the tensor cores look for it: the 16-byte units of each row change
// places by the number of the row modulo 8.
QUANTOPT_HOST_DEVICE constexpr uint32_t swizzle_128(uint32_t address) {
  return address ^ (address >> 3 & 0x70);
}

// Descriptor of an operand of wgmma, rows of kBoxBytes swizzled so: in units of 16 bytes its address (bits
// 0..13), a distance that this form does not use (16..29), that of eight rows (32..45); the form, 1 of 128
// bytes (62..63).
QUANTOPT_HOST_DEVICE constexpr uint64_t swizzled_descriptor(uint32_t address) {
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{1} << 16 | uint64_t{kAtomBytes >> 4} << 32 |
         uint64_t{1} << 62;
}
// Bytes of a row that one wgmma multiplies; the next begin as many further.
constexpr int kStepBytes = 32;

// ---- weights ----
//
// Lane 4 g + t of a warp holds, of a tile's block, rows g + 8 i in word i and k = 32 c + 8 t + e. As words 0
// and 1 are the rows g and g + 8 of one product of 64 rows, words 2 and 3 those of a second, a warpgroup
// multiplies four tiles, one for each warp. For mma.sync every lane reads the x that its bits belong to.
// wgmma takes x in the order in which it lies in memory, and wants k = 2 t and 8 + 2 t on (16-bit floats), or
// bytes 4 t and 16 + 4 t on: two bits of the index of k change places with the two bits of t, by exchange
// among the four lanes of g.
//   16-bit floats, x in the order of k: e / 4 with t / 2, e / 2 % 2 with t % 2;
//   whole numbers, x in XLayout::kTiles: c % 2 with t / 2, e / 4 with t % 2.

// An exchange with the lane whose number differs by `lane`: bits of the word that `mask` has change places
// with those `distance` below.
struct LaneSwap {
  int lane;
  uint32_t mask;
  int distance;
};
QUANTOPT_HOST_DEVICE constexpr LaneSwap lane_swap(bool bytes, int which) {
  if (bytes) return which == 0 ? LaneSwap{2, 0xCCCCCCCCu, 2} : LaneSwap{1, 0xAAAAAAAAu, 1};
  return which == 0 ? LaneSwap{2, 0xAAAAAAAAu, 1} : LaneSwap{1, 0xFF00FF00u, 8};
}

// ---- sums ----

// Of the sums c of a product of 64 rows, c[i] of lane 4 g + t is that of this row of the warp's 16, and this
// token.
QUANTOPT_HOST_DEVICE constexpr int sum_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
QUANTOPT_HOST_DEVICE constexpr int sum_token(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

// ---- division ----

constexpr int kWgmmaGroups = 2;                        // warpgroups that multiply
constexpr int kGroupRows = 4 * kTileRows;              // of W, of each
constexpr int kWgmmaRows = kWgmmaGroups * kGroupRows;  // of a block
constexpr int kWgmmaThreads = 128 * (1 + kWgmmaGroups);

// y in blocks of rows of W and tokens; a CUDA block takes one after the other, those of the same tokens
// together, as these are what is large.
struct WgmmaGrid {
  int64_t row_blocks, blocks;
  int depth;   // tiles of weights along K
  int planes;  // one after the other
  int splits;  // of K, each a block of its own
};
QUANTOPT_HOST_DEVICE constexpr WgmmaGrid wgmma_grid(const BinaryWeights& w, int64_t tokens, int tile_tokens,
                                                    int splits) {
  const int64_t row_blocks = ceil_divide(w.outputs, kWgmmaRows);
  return {row_blocks, row_blocks * ceil_divide(tokens, tile_tokens),
          static_cast<int>(tile_block_count(w.inputs)), static_cast<int>(w.planes), splits};
}
QUANTOPT_HOST_DEVICE constexpr int64_t row_block_of(const WgmmaGrid& g, int64_t block) {
  return block % g.row_blocks;
}
QUANTOPT_HOST_DEVICE constexpr int64_t token_block_of(const WgmmaGrid& g, int64_t block) {
  return block / g.row_blocks;
}
// Tiles along K from this to the next split's.
QUANTOPT_HOST_DEVICE constexpr int split_begin(const WgmmaGrid& g, int split) {
  return static_cast<int>(int64_t{g.depth} * split / g.splits);
}

// A stage of the ring, and how often it came round.
struct RingSlot {
  int slot;
  uint32_t parity;
};
template <int kSlots>
QUANTOPT_HOST_DEVICE constexpr void advance(RingSlot& at) {
  if (++at.slot == kSlots) {
    at.slot = 0;
    at.parity ^= 1;
  }
}

// The plan is that of MmaPlan, with `shape` an index into kWgmmaTokens. K is split at most 8 times, and not
// into more parts than it has blocks.
constexpr int kWgmmaTokens[] = {64, 128};
// y, or the sums alone [tokens, N] if `sums` is not null. No grouped scales, no fp32 tokens.
const char* binary_wgmma_on_cuda(const BinaryWeights& weights, const MmaTokens& tokens, const MmaPlan& plan,
                                 const BinaryEpilogue& epilogue, void* sums, const CudaContext& context);
// Whether the kernel was compiled for devices of this compute capability, and QUANTOPT_WGMMA=0 is not set.
bool binary_wgmma_available(int capability);

}  // namespace quantopt

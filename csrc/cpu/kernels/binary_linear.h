// y = x W^T + b with W = scale * sum_i 2^i * (+-1 plane i), compiled for every instruction set. No torch
// here.
#pragma once

#include <cstdint>

#include "core/tile.h"
#include "cpu/isa.h"

namespace quantopt {

enum class Activation : int32_t;  // core/activation.h

// One product. Memory is dense unless a stride is given; all sizes are elements.
//   exact:   y[m,n] = activation(scale[n] * sum_k x[m,k] w[n,k] + bias[n])
//   grouped: y[m,n] = activation(sum_k group_scales[n, k / group] x[m,k] w[n,k] + bias[n])
// With q, x is q[m] * x_scale[m]: without groups the sum of q is exact, then multiplied by x_scale[m]. With
// levels too, the scale of a group is levels[n, k / group] * scale[n]: the sum of q times levels is exact.
struct LinearProblem {
  int64_t rows;                  // M
  int64_t outputs;               // N
  int64_t inputs;                // K
  int64_t planes;                // P
  const uint8_t* bits;           // [P, N, ceil(K / 8)], bit k % 8 of byte k / 8 is weight k: 1 = +1, 0 = -1
  const uint16_t* tiles;         // the same as tiles (see below), or null: the bits are used
  const int32_t* plane_weights;  // [P]
  const float* scale;            // [1] or [N]; with groups only where there are levels
  int64_t scale_stride;          // elements from one row's scale to the next: 0 for one scale of all
  int64_t group;                 // weights of a row that share a scale; 0: all of them
  const float* group_scales;     // with groups: their scales in the order of tiles (group_index), or null
  const int8_t* levels;          // with q, in their place: whole numbers within +-127; or null
  const float* bias;             // [N] or null
  const float* x;                // [M, K], or null with q
  const int8_t* q;               // [M, K] within +-127, or null with x
  const float* x_scale;          // [M] with q
  float* y;                      // [M, N]
  Activation activation;
};

// The largest level of a weight: the sum of the weights of its planes, each at most 128.
constexpr int32_t largest_level(const int32_t* plane_weights, int64_t planes) {
  int32_t sum = 0;
  for (int64_t plane = 0; plane < planes; ++plane) sum += plane_weights[plane];
  return sum;
}

// Whether quantised products take the scales of groups as levels: their sums fit 32 bits then, and a weight
// times its level, halved where there are two planes, fits a byte. Two planes of equal weight are ternary.
inline bool takes_levels(const int32_t* plane_weights, int64_t planes, int64_t inputs) {
  constexpr int64_t kMost = 32;  // of the weights, so that panels' sums of fp32 are whole numbers too
  const bool ternary = planes == 2 && plane_weights[0] == plane_weights[1];
  const int64_t most = largest_level(plane_weights, planes);
  return (planes == 1 || ternary) && most <= kMost && inputs <= INT32_MAX / (127 * 127 * most);
}

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Tiles: bits in 16-bit words, those of 32 rows side by side. The words of a row come in chunks of 16 (256
// weights), the last chunk shorter: [plane][chunk][tile][word of the chunk][row of the tile]; zero where
// there is no weight. Lookups take bands of 4 tiles together.
constexpr int64_t kChunkWords = 16;
constexpr int64_t kChunkWidth = 16 * kChunkWords;
constexpr int64_t kBandTiles = 4;
constexpr int64_t kBandRows = kBandTiles * kTileRows;

constexpr int64_t tile_count(int64_t outputs) { return (outputs + kTileRows - 1) / kTileRows; }
// Words that hold a row.
constexpr int64_t tile_words(int64_t inputs) { return (inputs + 15) / 16; }
// Words of the chunk whose first weight is `first`.
constexpr int64_t chunk_words(int64_t inputs, int64_t first) {
  return least(tile_words(inputs) - first / 16, kChunkWords);
}
// Tiles of the band whose first tile is `tile`.
constexpr int64_t band_tiles(int64_t outputs, int64_t tile) {
  return least(tile_count(outputs) - tile, kBandTiles);
}
constexpr int64_t group_count(const LinearProblem& p) { return (p.inputs + p.group - 1) / p.group; }
// Where the scale of a group of a row is in the order of tiles: [tile][group][row of the tile].
constexpr int64_t group_index(int64_t n, int64_t group, int64_t groups) {
  return (n / kTileRows * groups + group) * kTileRows + n % kTileRows;
}
// Where the words of a tile begin in the chunk whose first weight is `first`.
constexpr int64_t tile_offset(int64_t outputs, int64_t inputs, int64_t plane, int64_t first, int64_t tile) {
  const int64_t tiles = tile_count(outputs);
  return kTileRows *
         (plane * tiles * tile_words(inputs) + tiles * (first / 16) + tile * chunk_words(inputs, first));
}

}  // namespace quantopt

QUANTOPT_DECLARE_PER_ISA(
    // Whether the product runs on `tiles`; else they are ignored.
    bool binary_uses_tiles(const LinearProblem& product);
    // Tiles [begin, end) of one plane, in all chunks.
    void binary_tiles(const uint8_t* bits, int64_t outputs, int64_t inputs, uint16_t* tiles, int64_t begin,
                      int64_t end);
    // y for rows [row_begin, row_end) and outputs [begin, end); begin is a multiple of kBandRows, and so is
    // end unless it is the last.
    void binary_linear(const LinearProblem& product, int64_t row_begin, int64_t row_end, int64_t begin,
                       int64_t end);)

// Which kernel takes least time, by the sizes of a product: measured, with the processor that it was measured
// on. No torch here.
#pragma once

#include <cstdint>

namespace quantopt::thresholds {

// From this many rows of x on, for layers of at least so many weights.
struct LeastRows {
  int64_t weights, rows;
};
template <int count>
constexpr bool reached(const LeastRows (&table)[count], int64_t weights, int64_t rows) {
  for (const LeastRows& line : table) {
    if (weights >= line.weights) return rows >= line.rows;
  }
  return false;
}

// Registers of AMX instead of lookups in those of AVX-512 with VNNI. Intel Xeon with AMX and AVX512-FP16
// (family 6, Granite Rapids caches: 2 MB and 64 KB of instructions), one thread, November 2026; outputs and
// inputs of 16 to 4096, with and without groups of scales. Times of lookups over those of AMX, int8: 4096 x
// 4096 0.85 with 2 rows and 1.14 with 3; 512 x 512 0.98 with 4; 256 x 256 0.96 with 4 and 1.17 with 8; 128 x
// 128 0.89 with 8 and 1.11 with 16; 64 x 64 0.77 with 4 and 0.99 with 16; 32 x 64 0.90 with 32.
constexpr LeastRows kAmxInt8[] = {{1 << 20, 3},  {1 << 18, 4},  {1 << 16, 6},
                                  {1 << 14, 12}, {1 << 12, 16}, {0, 48}};
// bfloat16 x, which lookups take as fp32: 4096 x 4096 0.92 with 3 and 1.19 with 4; 512 x 512 0.94 with 3 and
// 1.9 with 4; 256 x 256 0.97 with 1 and 1.15 with 2; smaller ones above 1 with one row.
constexpr LeastRows kAmxBFloat16[] = {{1 << 18, 4}, {0, 1}};
// fp32 x in three parts: 4096 x 4096 0.86 with 6 and 1.09 with 8; 1024 x 1024 0.80 with 8 and 1.4 with 16;
// 256 x 256 0.90 with 12 and 1.14 with 16; 128 x 128 0.98 with 32.
constexpr LeastRows kAmxParts[] = {{1 << 22, 8}, {1 << 18, 12}, {1 << 16, 16}, {1 << 14, 48}};

// The same for convolutions, from so many pixels of y on: in int8 of all images together, else of each, so
// that what becomes of an image does not depend on others. Same processor; one image, kernels of 3x3, 16 to
// 512 channels. Times of lookups over those of AMX, 256 channels: int8 0.62 with 4 pixels, 1.22 with 16, 2.1
// with 64; bfloat16 x 0.65, 1.08 and 2.0; fp32 x 0.44, 0.85 and 1.18.
constexpr int64_t kAmxConvInt8 = 12, kAmxConvBFloat16 = 16, kAmxConvParts = 32;

}  // namespace quantopt::thresholds

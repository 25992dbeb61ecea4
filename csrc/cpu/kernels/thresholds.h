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

// Registers of AMX instead of lookups or products of bytes with AVX-512. Intel Xeon with AMX and AVX512-FP16
// (2 MB of second-level cache a core, 64 KB of instructions), one thread, November 2026; outputs and inputs
// of 16 to 4096, with groups of scales much the same. Times of the others over those of AMX, int8: 4096 x
// 4096 0.79 with 2 rows and 1.02 with 3; 1024 x 1024 0.77 and 1.08; 512 x 512 1.00 with 4; 256 x 256 0.98
// with 4 and 1.13 with 6; 128 x 128 0.95 with 8 and 1.01 with 12; 64 x 64 0.98 with 32 and 1.08 with 64.
constexpr LeastRows kAmxInt8[] = {{1 << 20, 3}, {1 << 18, 4}, {1 << 16, 5}, {1 << 14, 12}, {0, 48}};
// bfloat16 x, which lookups take as fp32: 4096 x 4096 0.92 with 3 and 1.19 with 4; 512 x 512 0.94 with 3 and
// 1.9 with 4; 256 x 256 0.97 with 1 and 1.15 with 2; smaller ones above 1 with one row.
constexpr LeastRows kAmxBFloat16[] = {{1 << 18, 4}, {0, 1}};
// fp32 x in three parts: 4096 x 4096 0.86 with 6 and 1.09 with 8; 1024 x 1024 0.80 with 8 and 1.4 with 16;
// 256 x 256 0.90 with 12 and 1.14 with 16; 128 x 128 0.98 with 32.
constexpr LeastRows kAmxParts[] = {{1 << 22, 8}, {1 << 18, 12}, {1 << 16, 16}, {1 << 14, 48}};

// The same for convolutions, from so many pixels of y on: of all images together where sums are whole
// numbers, else of each, so that what becomes of an image does not depend on others. Same processor; one
// image, kernels of 3x3, 16 to 512 channels. Times of lookups over those of AMX, 256 channels: int8 0.62 with
// 4 pixels, 1.22 with 16, 2.1 with 64; bfloat16 x 0.65, 1.08 and 2.0; fp32 x 0.44, 0.85 and 1.18.
constexpr int64_t kAmxConvInt8 = 12, kAmxConvBFloat16 = 16, kAmxConvParts = 32;
// Of fp32 x so many channels, and images that take no more bytes as they are laid out: 16 channels of 64x64
// 1.4, 3 channels of 224x224 with a kernel of 7x7 0.7; 64 channels of 224x224 (19 MB) 1.19, of 500x500 (96
// MB) 0.8. Other forms of x are faster at any size; their bound is one of memory.
constexpr int64_t kAmxConvPartsChannels = 16, kAmxConvPartsBytes = 32 << 20, kAmxConvBytes = 256 << 20;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

namespace {  // one for each instruction set

// Rows of x from which products of bytes are faster than lookups, whose tables take longer to make than to
// use with few outputs. Lookups over bytes in time, one thread of an Intel Xeon (AMX, so all else too),
// without and with scales of 64:
//   avx512vnni, 4096 x 4096: 8 rows 0.86, 1.02; 12 rows 1.04, 1.19; 32 rows 1.30, 1.43; 128 rows 1.31, 1.46
//     32 outputs, 512 inputs: 2 rows 1.15, 1.32; 64 outputs: 4 rows 1.19, 1.38; 256 outputs: 8
//     rows 1.02, 1.18 1024 outputs, 64 inputs: 16 rows 0.84, 0.96; 256 inputs: 0.98, 1.10
//   avxvnni, 4096 x 4096: 6 rows 0.99, 1.13; 8 rows 1.00, 1.12; 32 rows 1.34, 1.43; 128 rows 1.45, 1.68
//     64 outputs, 512 inputs: 2 rows 1.41, 1.18; 128 outputs: 4 rows 1.32, 1.13
// AMD's processors look up a vector of 16-bit numbers in one cycle, in which Intel's need two: on Zen 4 bytes
// win with few outputs alone (with 32 from 4 rows on, with 64 from 16).
inline int64_t least_byte_rows(int64_t outputs, int64_t inputs, [[maybe_unused]] bool levels) {
  constexpr int64_t kNever = INT64_MAX;
#if defined(__AVX512VNNI__)
  static const bool intel = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
  }();
  if (!intel) return outputs <= 32 ? 4 : outputs <= 64 && inputs >= 128 ? 16 : kNever;
  if (outputs <= 64) return outputs <= 32 ? 2 : 4;
  if (outputs <= 256) return 8;
  if (inputs < 256) return kNever;
  return levels ? 8 : 12;
#else
  if (outputs <= 128) return outputs <= 64 ? 2 : 4;
  return inputs < 128 ? kNever : 6;
#endif
}

}  // namespace

#endif

}  // namespace quantopt::thresholds

// The levels of the scales of groups (LinearProblem::levels) in the order in which kernels take them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/binary_linear.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

// Memory of a call. (Functions of the library's templates, compiled for this instruction set, might be linked
// in the place of others.)
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) : data_(new T[static_cast<size_t>(count)]) {}
  ~Memory() { delete[] data_; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

// to[32 c + r] = from[row r + c] for 16 rows and columns.
inline void transpose_levels(const int8_t* from, int64_t row, int8_t* to) {
  __m128i v[2][16];
  for (int r = 0; r < 16; ++r) v[0][r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * row));
  for (int stage = 0; stage < 4; ++stage) {  // four perfect shuffles
    const __m128i* const in = v[stage % 2];
    __m128i* const out = v[(stage + 1) % 2];
    for (int i = 0; i < 8; ++i) {
      out[2 * i] = _mm_unpacklo_epi8(in[i], in[i + 8]);
      out[2 * i + 1] = _mm_unpackhi_epi8(in[i], in[i + 8]);
    }
  }
  for (int c = 0; c < 16; ++c) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kTileRows * c), v[0][c]);
}

// Those of the outputs [begin, end): [tile][group][row of the tile], zero beyond the last.
class TileLevels {
 public:
  TileLevels(const LinearProblem& p, int64_t begin, int64_t end)
      : first_(begin / kTileRows),
        groups_(p.levels != nullptr ? (p.inputs + p.group - 1) / p.group : 0),
        stride_((groups_ + 15) / 16 * 16 * kTileRows),
        levels_((tile_count(end) - first_) * stride_) {
    if (groups_ == 0 || begin >= end) return;
    std::memset(levels_.data() + (tile_count(end) - 1 - first_) * stride_, 0, static_cast<size_t>(stride_));
    for (int64_t n = first_ * kTileRows; n < end; n += 16) {
      int8_t* const to = levels_.data() + (n / kTileRows - first_) * stride_ + n % kTileRows;
      for (int64_t g = 0; g < groups_; g += 16) {
        const int8_t* from = p.levels + n * groups_ + g;
        if (n + 16 <= end && g + 16 <= groups_) {
          transpose_levels(from, groups_, to + g * kTileRows);
          continue;
        }
        int8_t part[16][16] = {};
        for (int64_t r = 0; r < 16 && n + r < end; ++r) {
          std::memcpy(part[r], from + r * groups_, static_cast<size_t>(least(groups_ - g, 16)));
        }
        transpose_levels(part[0], 16, to + g * kTileRows);
      }
    }
  }
  // Of the 32 rows of a tile.
  const int8_t* operator()(int64_t tile, int64_t group) const {
    return levels_.data() + (tile - first_) * stride_ + group * kTileRows;
  }

 private:
  int64_t first_, groups_, stride_;
  Memory<int8_t> levels_;
};

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

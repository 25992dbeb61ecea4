// +-1 weights expanded to bytes, for products of bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/binary_conv.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

constexpr int64_t kStep = 64;               // weights of a row that are expanded together
constexpr int64_t kStepWords = kStep / 16;  // words that hold them
constexpr int64_t kQuarters = kStep / 4;
constexpr int64_t kHalfBytes = kQuarters * kStep;

// The activations that make up a row: the channels of each kernel position, filled up to whole words.
inline int64_t row_words(const ConvProblem& c) { return c.kernel[0] * c.kernel[1] * tile_words(c.channels); }
inline int64_t row_steps(const ConvProblem& c) { return (row_words(c) + kStepWords - 1) / kStepWords; }

// The words of weights `word` (of the row) of 32 rows; zero beyond the last.
struct Words {
  const ConvProblem& c;
  int64_t tile, per_tap, taps, tap_size;

  Words(const ConvProblem& conv, int64_t tile)
      : c(conv),
        tile(tile),
        per_tap(tile_words(conv.channels)),
        taps(conv.kernel[0] * conv.kernel[1]),
        tap_size(tile_count(conv.outputs) * kTileRows * tile_words(conv.channels)) {}

  __m512i operator()(int64_t plane, int64_t word) const {
    if (word >= taps * per_tap) return _mm512_setzero_si512();
    const int64_t tap = word / per_tap, in_tap = word % per_tap, chunk = in_tap / kChunkWords;
    return _mm512_loadu_si512(c.tiles + (plane * taps + tap) * tap_size +
                              tile_offset(c.outputs, c.channels, 0, chunk * kChunkWidth, tile) +
                              in_tap % kChunkWords * kTileRows);
  }
};

// Weights of steps [begin, begin + count) of the 32 rows of a tile as bytes: [step][half of the rows][quarter
// of a word][row][4 weights], the operand of tdpbssd and vpdpbusd. A bit 0 is minus the weight of its plane
// or, unsigned, zero.
template <bool zero>
void expand(const ConvProblem& c, const Words& words, int64_t begin, int64_t count, int8_t* panel) {
  // Quarter t of a word: its nibble t in the four bytes of each row.
  __m512i spread[2], bit[2];
  for (int i = 0; i < 2; ++i) {
    spread[i] =
        _mm512_broadcast_i32x4(_mm_setr_epi32(0x00000000 + 0x01010101 * i, 0x04040404 + 0x01010101 * i,
                                              0x08080808 + 0x01010101 * i, 0x0C0C0C0C + 0x01010101 * i));
    bit[i] = _mm512_set1_epi32(static_cast<int>(0x08040201u << (4 * i)));
  }
  for (int64_t step = 0; step < count; ++step, panel += 2 * kHalfBytes) {
    for (int64_t word = 0; word < kStepWords; ++word) {
      for (int half = 0; half < 2; ++half) {
        __m512i value[4];
        for (__m512i& v : value) v = _mm512_setzero_si512();
        for (int64_t plane = 0; plane < c.planes; ++plane) {
          const __m512i all = words(plane, (begin + step) * kStepWords + word);
          const __m512i rows = _mm512_cvtepu16_epi32(half == 0 ? _mm512_castsi512_si256(all)
                                                               : _mm512_extracti64x4_epi64(all, 1));
          const char weight = static_cast<char>(c.plane_weights[plane]);
          const __m512i plus = _mm512_set1_epi8(weight);
          const __m512i minus = _mm512_set1_epi8(zero ? 0 : static_cast<char>(-weight));
          for (int t = 0; t < 4; ++t) {
            const __mmask64 ones =
                _mm512_test_epi8_mask(_mm512_shuffle_epi8(rows, spread[t / 2]), bit[t % 2]);
            value[t] = _mm512_add_epi8(value[t], _mm512_mask_blend_epi8(ones, minus, plus));
          }
        }
        for (int t = 0; t < 4; ++t) {
          _mm512_storeu_si512(panel + half * kHalfBytes + (4 * word + t) * kStep, value[t]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

// Weights from bits to the tile registers of AMX: 32 outputs of a step of K at a time, two registers.
//
// Two words of 32 outputs, interleaved, hold 32 weights of an output in each 32 bits. Row t of a register
// then takes one instruction: bit t of each byte becomes a signed byte, or the highest bit of each half a
// bfloat16. The order of K that follows from it is that of amx_rows.h. Where weights are beyond K,
// activations are zero.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/rounding.h"
#include "cpu/kernels/amx_rows.h"
#include "cpu/kernels/binary_linear.h"

namespace quantopt::amx {
namespace {

constexpr int64_t kStepBytes = 2 * kRegisterBytes;  // of expanded weights

template <class Value>
constexpr int64_t kStepWords = kStepValues<Value> / 16;

// Tiles of [planes, kernel positions] times [outputs, channels]; a linear layer has one position.
struct TileBits {
  const uint16_t* tiles;
  int64_t planes, positions, outputs, channels;

  // Words of a position, and of a plane.
  int64_t position_size() const { return tile_count(outputs) * kTileRows * tile_words(channels); }
  int64_t plane_size() const { return positions * position_size(); }
  // Steps of a position, the last of which may be of fewer weights, and of all.
  template <class Value>
  int64_t position_steps() const {
    return (tile_words(channels) + kStepWords<Value> - 1) / kStepWords<Value>;
  }
  template <class Value>
  int64_t steps() const {
    return positions * position_steps<Value>();
  }
};

alignas(64) constexpr uint16_t kNoWords[kTileRows] = {};

// The words of one step after another, of tile after tile.
template <class Value>
class StepWords {
 public:
  StepWords(const TileBits& bits, int64_t tile) : bits_(bits), tile_(tile) { locate(); }

  // Word i of the step in a plane; zeros behind the last of a kernel position.
  const uint16_t* word(int64_t i, int64_t plane_offset = 0) const {
    return i < left_ ? at_ + plane_offset + i * kTileRows : kNoWords;
  }
  // Where the same words of the next chunk are, if there is one.
  const uint16_t* ahead() const { return at_ + ahead_; }

  int64_t tile() const { return tile_; }
  // The first weight of the step in a row of one kernel position.
  int64_t first() const { return first_ + 16 * done_; }

  void advance() {
    at_ += kStepWords<Value> * kTileRows;
    left_ -= kStepWords<Value>;
    done_ += kStepWords<Value>;
    if (left_ > 0) return;
    first_ += kChunkWidth;
    if (first_ >= bits_.channels) {
      first_ = 0;
      if (++position_ == bits_.positions) {
        position_ = 0;
        ++tile_;
      }
    }
    locate();
  }

 private:
  void locate() {
    done_ = 0;
    left_ = chunk_words(bits_.channels, first_);
    at_ = bits_.tiles + position_ * bits_.position_size() +
          tile_offset(bits_.outputs, bits_.channels, 0, first_, tile_);
    ahead_ = tile_count(bits_.outputs) * kChunkWords * kTileRows;
  }

  TileBits bits_;
  int64_t tile_, position_ = 0, first_ = 0;  // of the chunk
  int64_t done_, left_, ahead_;              // words
  const uint16_t* at_;
};

struct Interleaving {
  alignas(64) uint16_t half[2][32];   // the words of 16 outputs from both vectors
  alignas(64) uint8_t output[2][64];  // the output of each byte
};
constexpr Interleaving make_interleaving() {
  Interleaving index{};
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < 16; ++i) {
      index.half[h][2 * i] = static_cast<uint16_t>(16 * h + i);
      index.half[h][2 * i + 1] = static_cast<uint16_t>(32 + 16 * h + i);
    }
    for (int i = 0; i < 64; ++i) index.output[h][i] = static_cast<uint8_t>(16 * h + i / 4);
  }
  return index;
}
constexpr Interleaving kInterleaving = make_interleaving();

// 32 weights of 16 outputs in each of two vectors.
struct Both {
  __m512i half[2];
};
inline Both interleaved(const uint16_t* first, const uint16_t* second) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  Both both;
  for (int h = 0; h < 2; ++h) {
    both.half[h] = _mm512_permutex2var_epi16(a, _mm512_load_si512(kInterleaving.half[h]), b);
  }
  return both;
}

// Row `row` of both registers of a step.
inline void store_row(char* to, int64_t row, int half, __m512i value) {
  _mm512_store_si512(to + half * kRegisterBytes + row * kRowBytes, value);
}

// The kinds of weights. Each expands one step of the words it is at to `to`.

// One plane of weight 1, as bytes: the matrix puts bit t in all bits of a byte but the lowest, then all are
// inverted.
class SignBytes {
 public:
  using Value = int8_t;
  SignBytes(const TileBits&, const int32_t*) {}
  __attribute__((always_inline)) void operator()(const StepWords<int8_t>& words, char* to) const {
    for (int pair = 0; pair < 2; ++pair) {
      const Both d = interleaved(words.word(2 * pair), words.word(2 * pair + 1));
      QUANTOPT_UNROLL for (int t = 0; t < 8; ++t) {
        const __m512i matrix = _mm512_set1_epi64(0x0001010101010101ll << t);
        for (int h = 0; h < 2; ++h) {
          store_row(to, 8 * pair + t, h, _mm512_gf2p8affine_epi64_epi8(d.half[h], matrix, 0xFF));
        }
      }
    }
  }
};

// Some planes as bytes: bit t of each becomes twice the weight of its plane or zero; from their sum that of
// the weights is taken.
class PlaneBytes {
 public:
  using Value = int8_t;
  PlaneBytes(const TileBits& bits, const int32_t* weights)
      : planes_(bits.planes), plane_size_(bits.plane_size()), all_(largest_level(weights, bits.planes)) {
    for (int64_t p = 0; p < planes_; ++p) {
      matrix_[p] = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if ((2 * weights[p]) >> bit & 1) matrix_[p] |= uint64_t{1} << (8 * (7 - bit));
      }
    }
  }
  void operator()(const StepWords<int8_t>& words, char* to) const {
    const __m512i all = _mm512_set1_epi8(static_cast<char>(-all_));
    for (int pair = 0; pair < 2; ++pair) {
      for (int64_t p = 0; p < planes_; ++p) {
        const int64_t offset = p * plane_size_;
        const Both d = interleaved(words.word(2 * pair, offset), words.word(2 * pair + 1, offset));
        QUANTOPT_UNROLL for (int t = 0; t < 8; ++t) {
          const __m512i matrix = _mm512_set1_epi64(static_cast<int64_t>(matrix_[p] << t));
          for (int h = 0; h < 2; ++h) {
            const char* at = to + h * kRegisterBytes + (8 * pair + t) * kRowBytes;
            const __m512i before = p == 0 ? all : _mm512_load_si512(at);
            const __m512i more = _mm512_gf2p8affine_epi64_epi8(d.half[h], matrix, 0);
            store_row(to, 8 * pair + t, h, _mm512_add_epi8(before, more));
          }
        }
      }
    }
  }
  static bool covers(const int32_t* weights, int64_t planes) {
    return planes <= kMost && largest_level(weights, planes) <= 127;
  }

 private:
  static constexpr int64_t kMost = 8;
  int64_t planes_, plane_size_;
  int32_t all_;
  uint64_t matrix_[kMost];
};

// One plane, or two of the same weight, times the level of a group's scale, as bytes: +-u, or u, 0 and -u.
template <int planes>
class LevelBytes {
 public:
  using Value = int8_t;
  // levels: [tile][group][32 outputs]; groups of a multiple of 32 weights.
  LevelBytes(const TileBits& bits, const int8_t* levels, int64_t group)
      : plane_size_(bits.plane_size()),
        levels_(levels),
        group_(static_cast<uint32_t>(group)),
        groups_(static_cast<uint32_t>((bits.channels + group - 1) / group)) {}

  __attribute__((always_inline)) void operator()(const StepWords<int8_t>& words, char* to) const {
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t met = (static_cast<uint32_t>(words.first()) + 32 * pair) / group_;
      const int64_t group = words.tile() * groups_ + (met < groups_ ? met : groups_ - 1);
      const __m512i u = _mm512_castsi256_si512(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels_ + group * kTileRows)));
      Both d[planes];
      for (int p = 0; p < planes; ++p) {
        d[p] = interleaved(words.word(2 * pair, p * plane_size_), words.word(2 * pair + 1, p * plane_size_));
      }
      for (int h = 0; h < 2; ++h) {
        const __m512i plus = _mm512_permutexvar_epi8(_mm512_load_si512(kInterleaving.output[h]), u);
        const __m512i minus = _mm512_sub_epi8(_mm512_setzero_si512(), plus);
        QUANTOPT_UNROLL for (int t = 0; t < 8; ++t) {
          const __m512i bit = _mm512_set1_epi8(static_cast<char>(1 << t));
          __m512i value = _mm512_mask_blend_epi8(_mm512_test_epi8_mask(d[0].half[h], bit), minus,
                                                 planes == 1 ? plus : _mm512_setzero_si512());
          if constexpr (planes == 2) {
            value = _mm512_mask_add_epi8(value, _mm512_test_epi8_mask(d[1].half[h], bit), value, plus);
          }
          store_row(to, 8 * pair + t, h, value);
        }
      }
    }
  }

 private:
  int64_t plane_size_;
  const int8_t* levels_;
  uint32_t group_, groups_;
};

// One plane as bfloat16: its highest bit turns the sign of the weight.
class SignHalves {
 public:
  using Value = uint16_t;
  SignHalves(const TileBits&, const int32_t*) {}
  __attribute__((always_inline)) void operator()(const StepWords<uint16_t>& words, char* to) const {
    const __m512i sign = _mm512_set1_epi16(static_cast<short>(0x8000));
    const __m512i minus_one = _mm512_set1_epi16(static_cast<short>(0xBF80));
    Both d = interleaved(words.word(0), words.word(1));
    QUANTOPT_UNROLL for (int t = 0; t < 16; ++t) {
      for (int h = 0; h < 2; ++h) {
        constexpr int kAndXor = 0x6A;
        store_row(to, t, h, _mm512_ternarylogic_epi32(d.half[h], sign, minus_one, kAndXor));
        d.half[h] = _mm512_add_epi16(d.half[h], d.half[h]);
      }
    }
  }
};

// Some planes as the bfloat16 levels that they make up, found in a table by the bits of all planes.
class PlaneHalves {
 public:
  using Value = uint16_t;
  PlaneHalves(const TileBits& bits, const int32_t* weights)
      : planes_(bits.planes), plane_size_(bits.plane_size()) {
    for (int i = 0; i < 32; ++i) {
      float level = 0.0f;
      for (int64_t p = 0; p < planes_; ++p)
        level += static_cast<float>(i >> p & 1 ? weights[p] : -weights[p]);
      uint32_t of;
      std::memcpy(&of, &level, sizeof of);
      table_[i] = static_cast<uint16_t>(of >> 16);
    }
  }
  void operator()(const StepWords<uint16_t>& words, char* to) const {
    Both d[kMost];
    for (int64_t p = 0; p < planes_; ++p) {
      d[p] = interleaved(words.word(0, p * plane_size_), words.word(1, p * plane_size_));
    }
    const __m512i table = _mm512_load_si512(table_);
    for (int t = 0; t < 16; ++t) {
      for (int h = 0; h < 2; ++h) {
        __m512i index = _mm512_setzero_si512();
        for (int64_t p = 0; p < planes_; ++p) {
          const __mmask32 set = _mm512_movepi16_mask(d[p].half[h]);
          index = _mm512_mask_add_epi16(index, set, index, _mm512_set1_epi16(static_cast<short>(1 << p)));
          d[p].half[h] = _mm512_add_epi16(d[p].half[h], d[p].half[h]);
        }
        store_row(to, t, h, _mm512_permutexvar_epi16(index, table));
      }
    }
  }
  static bool covers(const int32_t* weights, int64_t planes) {
    return planes <= kMost && largest_level(weights, planes) <= 256;
  }

 private:
  static constexpr int64_t kMost = 5;
  int64_t planes_, plane_size_;
  alignas(64) uint16_t table_[32];
};

}  // namespace
}  // namespace quantopt::amx

// Products of int8 or bfloat16 activations with +-1 weights on AMX.
//
// The weights are expanded on the fly, 32 outputs and 8 registers' worth of each at a time, to signed bytes
// or bfloat16 that serve a block of rows of x. The rows of the block are gathered once in the layout of
// registers: 16 rows of 64 bytes each, for a convolution those that the kernel meets, position after
// position, zero outside the image. Two by two registers of sums, so that each register that is loaded is
// used twice. Sums of bytes are whole numbers: no order changes them. Those of bfloat16 are fp32, register
// after register of K: several planes are multiplied as the levels that they make up, so that infinities and
// NaN propagate as in a dense product.
#include "cpu/kernels/binary_amx.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu/kernels/amx_registers.h"
#include "cpu/kernels/binary_epilogue.h"
#include "cpu/kernels/binary_expand.h"

namespace quantopt::amx {
namespace {

constexpr int64_t kRegisterRows = 16;  // of a register
constexpr int64_t kRowBytes = 64;
constexpr int64_t kRegisterBytes = kRegisterRows * kRowBytes;
constexpr int64_t kPanelSteps = 8;  // steps, of a register's width each, that are expanded together

// As many bytes of each: what is gathered of 4096 inputs takes half of a second-level cache of 2 MB.
template <class Value>
constexpr int64_t kBlockRows = 256 / static_cast<int64_t>(sizeof(Value));

template <class Value>
constexpr int64_t kWordBytes = 16 * static_cast<int64_t>(sizeof(Value));  // of the activations of a word
template <class Value>
constexpr int64_t kWords = kRowBytes / kWordBytes<Value>;  // of a register's row
static_assert(kWords<int8_t> == kStepWords && kRegisterRows == kQuarters);

template <class Value>
using Sum = std::conditional_t<std::is_same_v<Value, int8_t>, int32_t, float>;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

template <class Value>
int64_t row_registers(const ConvProblem& c) {
  return (row_words(c) + kWords<Value> - 1) / kWords<Value>;
}

template <class Value>
struct Memory {
  Value* rows;       // [16 rows][step][row][64 bytes]
  Value* panel;      // [step][half of the outputs][row of the register][output][4 bytes]
  Sum<Value>* sums;  // [row][output]
};

inline int64_t all_rows(const ConvProblem& c) { return c.images * c.out_height * c.out_width; }
inline int64_t band_count(const ConvProblem& c) { return (c.outputs + kBandRows - 1) / kBandRows; }

template <class Value>
int64_t lay_out(const ConvProblem& c, char* base, Memory<Value>* memory) {
  const int64_t block = up(least(all_rows(c), kBlockRows<Value>), kRegisterRows);
  const int64_t row_bytes = block * row_registers<Value>(c) * kRowBytes;
  const int64_t panel_bytes = kPanelSteps * 2 * kRegisterBytes;
  if (memory != nullptr) {
    memory->rows = reinterpret_cast<Value*>(base);
    memory->panel = reinterpret_cast<Value*>(base + row_bytes);
    memory->sums = reinterpret_cast<Sum<Value>*>(base + row_bytes + panel_bytes);
  }
  return row_bytes + panel_bytes + block * kTileRows * static_cast<int64_t>(sizeof(Sum<Value>));
}

inline const int8_t* values_of(const ConvProblem& c, int8_t) { return c.q; }
inline const uint16_t* values_of(const ConvProblem& c, uint16_t) { return c.x_bf16; }

// Where the kernel position `tap` meets the image for row `row` of y, or null outside.
template <class Value>
const Value* pixel_at(const ConvProblem& c, int64_t row, int64_t tap) {
  const int64_t image = row / (c.out_height * c.out_width), pixel = row % (c.out_height * c.out_width);
  const int64_t iy = pixel / c.out_width * c.stride[0] - c.padding[0] + tap / c.kernel[1] * c.dilation[0];
  const int64_t ix = pixel % c.out_width * c.stride[1] - c.padding[1] + tap % c.kernel[1] * c.dilation[1];
  if (iy < 0 || iy >= c.height || ix < 0 || ix >= c.width) return nullptr;
  return values_of(c, Value{}) + ((image * c.height + iy) * c.width + ix) * c.x_stride;
}

// `size` bytes, of which `bytes` are read and the rest is zero.
template <int64_t size>
inline void copy(const void* from, int64_t bytes, char* to) {
  static_assert(size == 16 || size == 32 || size == 64);
  uint64_t mask = bytes >= 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
  if (from == nullptr) mask = 0;
  if constexpr (size == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), from));
  } else if constexpr (size == 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_maskz_loadu_epi8(static_cast<__mmask32>(mask), from));
  } else {
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(mask, from));
  }
}

// Rows [begin, end) of y: what they are products of, as registers are loaded. `words` are copied at a time.
template <class Value, int64_t words>
void gather(const ConvProblem& c, int64_t begin, int64_t end, Value* out) {
  constexpr int64_t kBytes = words * kWordBytes<Value>;
  const int64_t steps = row_registers<Value>(c), taps = c.kernel[0] * c.kernel[1];
  for (int64_t row = begin; row < end; ++row) {
    char* to = reinterpret_cast<char*>(out) + (row - begin) / kRegisterRows * steps * kRegisterBytes +
               (row - begin) % kRegisterRows * kRowBytes;
    int64_t word = 0;  // of the row
    const auto place = [&] {
      return to + word / kWords<Value> * kRegisterBytes + word % kWords<Value> * kWordBytes<Value>;
    };
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Value* from = pixel_at<Value>(c, row, tap);
      for (int64_t k = 0; k < c.channels; k += 16 * words, word += words) {
        const int64_t bytes = (c.channels - k) * static_cast<int64_t>(sizeof(Value));
        copy<kBytes>(from == nullptr ? nullptr : from + k, bytes, place());
      }
    }
    for (; word < steps * kWords<Value>; word += words) copy<kBytes>(nullptr, 0, place());
  }
}

// Weights of the steps [begin, begin + count) of K of 32 outputs.
void expand_steps(const ConvProblem& c, const Words& words, int64_t begin, int64_t count, int8_t* panel) {
  expand<false>(c, words, begin, count, panel);
}

// Whole numbers within +-256 as bfloat16, exactly.
inline __m512i whole_bfloat16(__m512i v) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_srai_epi32(v, 16));
  return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                 _mm512_castps_si512(high));
}

// The operand of tdpbf16ps: [step][half of the outputs][pair of weights][output][2 weights].
template <bool one>
void expand_halves(const ConvProblem& c, const Words& words, int64_t begin, int64_t count, uint16_t* panel) {
  constexpr int kPairs = 8;  // of a word
  for (int64_t word = 0; word < count * kWords<uint16_t>; ++word) {
    for (int half = 0; half < 2; ++half) {
      __m512i value[kPairs];
      for (__m512i& v : value) v = _mm512_setzero_si512();
      for (int64_t plane = 0; plane < c.planes; ++plane) {
        const __m512i all = words(plane, begin * kWords<uint16_t> + word);
        const __m512i rows = _mm512_cvtepu16_epi32(half == 0 ? _mm512_castsi512_si256(all)
                                                             : _mm512_extracti64x4_epi64(all, 1));
        const __m512i twice = _mm512_or_si512(rows, _mm512_slli_epi32(rows, 16));
        const int weight = c.plane_weights[plane];
        __m512i plus = _mm512_set1_epi16(static_cast<short>(weight));
        __m512i minus = _mm512_set1_epi16(static_cast<short>(-weight));
        if constexpr (one) {
          plus = whole_bfloat16(plus);
          minus = whole_bfloat16(minus);
        }
        for (int pair = 0; pair < kPairs; ++pair) {
          const __m512i bits = _mm512_set1_epi32(static_cast<int>(0x00020001u << (2 * pair)));
          const __m512i signed_weight =
              _mm512_mask_blend_epi16(_mm512_test_epi16_mask(twice, bits), minus, plus);
          value[pair] = one ? signed_weight : _mm512_add_epi16(value[pair], signed_weight);
        }
      }
      char* to = reinterpret_cast<char*>(panel) + (word / kWords<uint16_t> * 2 + half) * kRegisterBytes +
                 word % kWords<uint16_t> * kPairs * kRowBytes;
      for (int pair = 0; pair < kPairs; ++pair) {
        _mm512_storeu_si512(to + pair * kRowBytes, one ? value[pair] : whole_bfloat16(value[pair]));
      }
    }
  }
}
void expand_steps(const ConvProblem& c, const Words& words, int64_t begin, int64_t count, uint16_t* panel) {
  if (c.planes == 1) {
    expand_halves<true>(c, words, begin, count, panel);
  } else {
    expand_halves<false>(c, words, begin, count, panel);
  }
}

// Registers: sums 0 to 3 (rows x outputs), rows 4 and 5, weights 6 and 7.
AmxConfig config_of(int64_t rows0, int64_t rows1) {
  AmxConfig config;
  for (int half = 0; half < 2; ++half) {
    config.shape(half, rows0, kRowBytes);
    config.shape(2 + half, rows1, kRowBytes);
    config.shape(6 + half, kRegisterRows, kRowBytes);
  }
  config.shape(4, rows0, kRowBytes);
  config.shape(5, rows1, kRowBytes);
  return config;
}

// sums += rows * panel over `steps` steps, for 16 rows or 32; they begin at zero if `fresh`.
template <class Value, bool two>
void multiply(const Value* rows, int64_t next_rows, const Value* panel, int64_t steps, bool fresh,
              Sum<Value>* sums) {
  constexpr int64_t kStride = kTileRows * sizeof(Sum<Value>);
  constexpr int64_t kRegisterValues = kRegisterBytes / static_cast<int64_t>(sizeof(Value));
  Sum<Value>* below = sums + kRegisterRows * kTileRows;
  if (fresh) {
    amx_zero<0>();
    amx_zero<1>();
    if constexpr (two) {
      amx_zero<2>();
      amx_zero<3>();
    }
  } else {
    amx_load<0>(sums, kStride);
    amx_load<1>(sums + kRegisterRows, kStride);
    if constexpr (two) {
      amx_load<2>(below, kStride);
      amx_load<3>(below + kRegisterRows, kStride);
    }
  }
  for (int64_t step = 0; step < steps; ++step, rows += kRegisterValues, panel += 2 * kRegisterValues) {
    amx_load<4>(rows, kRowBytes);
    amx_load<6>(panel, kRowBytes);
    amx_load<7>(panel + kRegisterValues, kRowBytes);
    amx_multiply<Value, 0, 4, 6>();
    amx_multiply<Value, 1, 4, 7>();
    if constexpr (two) {
      amx_load<5>(rows + next_rows, kRowBytes);
      amx_multiply<Value, 2, 5, 6>();
      amx_multiply<Value, 3, 5, 7>();
    }
  }
  amx_store<0>(sums, kStride);
  amx_store<1>(sums + kRegisterRows, kStride);
  if constexpr (two) {
    amx_store<2>(below, kStride);
    amx_store<3>(below + kRegisterRows, kStride);
  }
}

// One tile of outputs for a block of gathered rows.
template <class Value>
void tile_of_outputs(const ConvProblem& c, int64_t row, int64_t rows, int64_t tile,
                     const Memory<Value>& memory) {
  constexpr int64_t kRegisterValues = kRegisterBytes / static_cast<int64_t>(sizeof(Value));
  const int64_t steps = row_registers<Value>(c), pairs = rows / (2 * kRegisterRows) * (2 * kRegisterRows),
                rest = rows - pairs;
  const Words words(c, tile);
  const AmxConfig full = config_of(kRegisterRows, kRegisterRows);
  const AmxConfig last =
      config_of(least(rest, kRegisterRows), rest > kRegisterRows ? rest - kRegisterRows : 0);
  for (int64_t step = 0; step < steps; step += kPanelSteps) {
    const int64_t count = least(kPanelSteps, steps - step);
    expand_steps(c, words, step, count, memory.panel);
    for (int64_t m = 0; m < rows; m += 2 * kRegisterRows) {
      if (m == 0 && pairs > 0) amx_configure(full);
      if (m == pairs) amx_configure(last);
      const Value* from = memory.rows + (m / kRegisterRows * steps + step) * kRegisterValues;
      Sum<Value>* sums = memory.sums + m * kTileRows;
      if (rows - m > kRegisterRows) {
        multiply<Value, true>(from, steps * kRegisterValues, memory.panel, count, step == 0, sums);
      } else {
        multiply<Value, false>(from, steps * kRegisterValues, memory.panel, count, step == 0, sums);
      }
    }
  }
  const int64_t pixels = c.out_height * c.out_width;
  const int64_t first = tile * kTileRows, count = least(kTileRows, c.outputs - first);
  for (int64_t m = 0; m < rows; ++m) {
    const Sum<Value>* sums = memory.sums + m * kTileRows;
    float* y = c.y + (row + m) * c.y_stride;
    for (int64_t n = 0; n < count; ++n) y[first + n] = static_cast<float>(sums[n]);
    const float x_scale = c.x_scale != nullptr ? c.x_scale[(row + m) / pixels] : 1.0f;
    epilogue_row(y, first, first + count, {c.scale, c.scale_stride, x_scale, c.bias, c.activation});
  }
}

template <class Value>
int64_t count_parts(const ConvProblem& c) {
  return (all_rows(c) + kBlockRows<Value> - 1) / kBlockRows<Value> * band_count(c);
}

template <class Value>
void multiply_parts(const ConvProblem& c, int64_t begin, int64_t end, void* base) {
  Memory<Value> memory;
  lay_out(c, static_cast<char*>(base), &memory);
  const int64_t bands = band_count(c);
  while (begin < end) {  // block after block
    const int64_t row = begin / bands * kBlockRows<Value>, rows = least(kBlockRows<Value>, all_rows(c) - row);
    const int64_t band = begin % bands, last = least(bands, band + end - begin);
    if (c.channels % (16 * kWords<Value>) == 0) {
      gather<Value, kWords<Value>>(c, row, row + rows, memory.rows);
    } else {
      gather<Value, 1>(c, row, row + rows, memory.rows);
    }
    const int64_t last_tile = least(last * kBandTiles, tile_count(c.outputs));
    for (int64_t tile = band * kBandTiles; tile < last_tile; ++tile) {
      tile_of_outputs(c, row, rows, tile, memory);
    }
    begin += last - band;
  }
  amx_release();
}

}  // namespace

bool binary_amx_covers(bool int8, const int32_t* plane_weights, int64_t planes) {
  int64_t most = 0;
  for (int64_t plane = 0; plane < planes; ++plane) most += plane_weights[plane];
  return most <= (int8 ? 127 : 256);
}

int64_t binary_amx_parts(const ConvProblem& c) {
  return c.q != nullptr ? count_parts<int8_t>(c) : count_parts<uint16_t>(c);
}

int64_t binary_amx_memory(const ConvProblem& c) {
  return c.q != nullptr ? lay_out<int8_t>(c, nullptr, nullptr) : lay_out<uint16_t>(c, nullptr, nullptr);
}

void binary_amx(const ConvProblem& c, int64_t begin, int64_t end, void* memory) {
  if (c.q != nullptr) {
    multiply_parts<int8_t>(c, begin, end, memory);
  } else {
    multiply_parts<uint16_t>(c, begin, end, memory);
  }
}

}  // namespace quantopt::amx

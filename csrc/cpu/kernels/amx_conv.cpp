// conv2d with +-1 weights on AMX.
//
// 32 pixels times 32 outputs at a time, whose sums stay in registers over all kernel positions and channels.
// Pixels are loaded from their slots, 16 rows some bytes apart: nothing is gathered. The weights of 32
// outputs are expanded once for all pixels, while the first are multiplied, to a panel that stays in the
// second-level cache; its loads pass by the first-level cache, where pixels are that several kernel positions
// meet.
#include "cpu/kernels/amx_conv.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels/amx_block.h"
#include "cpu/kernels/amx_expand.h"

namespace quantopt::amx {
namespace {

constexpr int64_t kAhead = 4;  // steps between the expansion of weights and their first use
constexpr int64_t kWord = 16;  // values

inline int64_t parts_of(Form form) { return form == Form::parts ? kParts : 1; }
inline int64_t value_bytes(Form form) { return form == Form::int8 ? 1 : 2; }
inline int64_t taps_of(const ConvProblem& p) { return p.kernel[0] * p.kernel[1]; }
inline bool unit_plane(const ConvProblem& p) { return p.planes == 1 && p.plane_weights[0] == 1; }

// Values of a slot.
inline int64_t slot_values(const ConvProblem& p, bool side_by_side) {
  return side_by_side ? p.kernel[1] * tile_words(p.channels) * kWord : p.channels;
}
inline TileBits bits_of(const Convolution& a, bool side_by_side) {
  const ConvProblem& p = a.p;
  return {p.tiles, p.planes, side_by_side ? p.kernel[0] : taps_of(p), p.outputs,
          slot_values(p, side_by_side)};
}
inline int64_t slot_steps(const Convolution& a, bool side_by_side) {
  const TileBits bits = bits_of(a, side_by_side);
  return a.form == Form::int8 ? bits.position_steps<int8_t>() : bits.position_steps<uint16_t>();
}

// ---- the product ----

// sums += 16 or 32 pixels times the 32 outputs of a step.
template <class Value, int parts, bool two>
inline __attribute__((always_inline)) void multiply_step(const char* first, const char* second,
                                                         int64_t stride, const char* weights) {
  amx_load_once<6>(weights, kRowBytes);
  amx_load_once<7>(weights + kRegisterBytes, kRowBytes);
  QUANTOPT_UNROLL for (int part = 0; part < parts; ++part) {
    amx_load<4>(first + part * kRowBytes, stride);
    amx_multiply<Value, 0, 4, 6>();
    amx_multiply<Value, 1, 4, 7>();
    if constexpr (two) {
      amx_load<5>(second + part * kRowBytes, stride);
      amx_multiply<Value, 2, 5, 6>();
      amx_multiply<Value, 3, 5, 7>();
    }
  }
}

// Pixels of a block as rows of y: anywhere, or one behind the other in one image.
struct BlockRows {
  static constexpr bool kAll = false, kOneFactor = false;
  const ConvPlace* places;
  int64_t first_pixel;
  const ImageFactor* factors;  // of the first image
  int64_t row(int64_t m) const { return places[m].pixel < 0 ? -1 : first_pixel + places[m].pixel; }
  float factor(int64_t m) const { return factors[places[m].image].of_y; }
};
struct NextRows {
  static constexpr bool kAll = true, kOneFactor = true;
  int64_t first;
  float of_all;
  int64_t row(int64_t m) const { return first + m; }
  float factor(int64_t) const { return of_all; }
};

// Expands steps of taps, from tiles of each kernel position.
template <class Weights>
class TapWeights {
 public:
  using Value = typename Weights::Value;
  TapWeights(const Convolution& a, bool side_by_side)
      : bits_(bits_of(a, side_by_side)), weights_(bits_, a.p.plane_weights), words_(bits_, 0) {}

  // Step `step` of position `number`; but the first, right after the one before.
  __attribute__((always_inline)) void operator()(int64_t number, int64_t step, int64_t tile, char* to) {
    if (step == 0) {
      TileBits one = bits_;
      one.tiles += number * bits_.position_size();
      one.positions = 1;
      words_ = StepWords<Value>(one, tile);
    } else {
      words_.advance();
    }
    weights_(words_, to);
  }

 private:
  const TileBits bits_;
  const Weights weights_;
  StepWords<Value> words_;
};

// The same from tiles of whole rows of W, [channels, kernel positions], times the levels of groups along
// them:
// +-u with one plane, u, 0 and -u with two of the same weight. Weights that are neighbours in a register are
// far from each other here.
template <int planes>
class LevelWeights {
 public:
  using Value = int8_t;
  LevelWeights(const Convolution& a, bool)
      : a_(a),
        taps_(taps_of(a.p)),
        inputs_(taps_ * a.p.channels),
        groups_((inputs_ + a.group - 1) / a.group) {}

  void operator()(int64_t number, int64_t step, int64_t tile, char* to) const {
    for (int64_t row = 0; row < kRegisterRows; ++row) {
      __m256i value[4];
      for (int64_t j = 0; j < 4; ++j) {  // the order of K: amx_rows.h
        const int64_t channel = step * kRowBytes + row / 8 * 32 + 8 * j + row % 8;
        value[j] = channel < a_.p.channels ? weights(channel * taps_ + number, tile) : _mm256_setzero_si256();
      }
      const __m256i low[2] = {_mm256_unpacklo_epi8(value[0], value[1]),
                              _mm256_unpacklo_epi8(value[2], value[3])};
      const __m256i high[2] = {_mm256_unpackhi_epi8(value[0], value[1]),
                               _mm256_unpackhi_epi8(value[2], value[3])};
      const __m256i fours[4] = {_mm256_unpacklo_epi16(low[0], low[1]), _mm256_unpackhi_epi16(low[0], low[1]),
                                _mm256_unpacklo_epi16(high[0], high[1]),
                                _mm256_unpackhi_epi16(high[0], high[1])};
      for (int i = 0; i < 4; ++i) {
        char* const at = to + row * kRowBytes + 16 * i;
        _mm_store_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(fours[i]));
        _mm_store_si128(reinterpret_cast<__m128i*>(at + kRegisterBytes),
                        _mm256_extracti128_si256(fours[i], 1));
      }
    }
  }

 private:
  // Weight k of the 32 rows of a tile.
  __m256i weights(int64_t k, int64_t tile) const {
    const ConvProblem& p = a_.p;
    const int64_t first = k / kChunkWidth * kChunkWidth,
                  group = static_cast<uint32_t>(k) / static_cast<uint32_t>(a_.group);
    const uint16_t* const words =
        p.tiles + tile_offset(p.outputs, inputs_, 0, first, tile) + (k - first) / kWord * kTileRows;
    const __m512i bit = _mm512_set1_epi16(static_cast<short>(1 << k % kWord));
    const __m256i plus = _mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(a_.levels + group_index(tile * kTileRows, group, groups_)));
    const __m256i zero = _mm256_setzero_si256(), minus = _mm256_sub_epi8(zero, plus);
    const __mmask32 set = _mm512_test_epi16_mask(_mm512_loadu_si512(words), bit);
    if constexpr (planes == 1) return _mm256_mask_blend_epi8(set, minus, plus);
    const int64_t plane = tile_count(p.outputs) * kTileRows * tile_words(inputs_);
    const __mmask32 other = _mm512_test_epi16_mask(_mm512_loadu_si512(words + plane), bit);
    const __m256i value = _mm256_mask_blend_epi8(set, minus, zero);
    return _mm256_mask_add_epi8(value, other, value, plus);
  }

  const Convolution& a_;
  const int64_t taps_, inputs_, groups_;
};

// The weights of some tiles of outputs, one after the other, in the order of taps.
template <class Source>
class Panel {
 public:
  Panel(const Source& source, const ConvSlots& slots, int64_t steps, char* memory)
      : source_(source),
        taps_(slots.taps),
        steps_(steps),
        count_(slots.tap_rows * slots.tap_columns * steps_),
        memory_(memory) {}

  // Begins tile `tile` in place `place`.
  void begin(int64_t tile, int64_t place) {
    tile_ = tile;
    done_ = tap_ = step_ = 0;
    to_ = memory_ + place * count_ * kStepBytes;
  }
  // Expands steps until `end` are there.
  __attribute__((always_inline)) void expand_to(int64_t end) {
    for (end = std::min(end, count_); done_ < end; ++done_) {
      source_(taps_[tap_].number, step_, tile_, to_ + done_ * kStepBytes);
      if (++step_ < steps_) continue;
      step_ = 0;
      ++tap_;
    }
  }
  void expand_all() { expand_to(count_); }
  const char* at(int64_t place) const { return memory_ + place * count_ * kStepBytes; }

 private:
  Source source_;
  const ConvTap* const taps_;
  const int64_t steps_, count_;
  char* const memory_;
  char* to_ = nullptr;
  int64_t tile_ = 0, done_ = 0, tap_ = 0, step_ = 0;
};

// Tiles whose weights are expanded together.
inline int64_t panel_tiles(const ConvSlots& slots, int64_t steps, int64_t outputs) {
  constexpr int64_t kBytes = 256 << 10;  // of the second-level cache
  const int64_t bytes = slots.tap_rows * slots.tap_columns * steps * kStepBytes;
  return std::clamp<int64_t>(kBytes / std::max<int64_t>(bytes, 1), 1, tile_count(outputs));
}

struct Call {
  const Convolution& a;
  const ConvSlots& slots;
  const ImageFactor* factors;
  int64_t image, groups, block_begin, block_end, begin, end;
  const char* from;
  char* memory;
};

// The end of a block, some rows of which become y with each step of the next block.
template <class Sums>
class Ending {
 public:
  explicit Ending(const Finish& finish) : finish_(finish) {}

  void begin(const ConvBlock& block, const BlockRows& rows, int64_t tile, const char* sums) {
    rows_ = rows;
    next_ = {rows.row(0), rows.factor(0)};
    consecutive_ = block.consecutive != 0;
    done_ = 0;
    count_ = block.registers * kRegisterRows;
    tile_ = finish_.tile(tile);
    sums_ = reinterpret_cast<const Sums*>(sums);
  }
  __attribute__((always_inline)) void some(int64_t rows) {
    if (done_ == count_) return;
    const int64_t end = std::min(done_ + rows, count_);
    if (consecutive_) {
      finish_(next_, done_, end, tile_, sums_);
    } else {
      finish_(rows_, done_, end, tile_, sums_);
    }
    done_ = end;
  }
  void rest() { some(kBlockRows); }

 private:
  const Finish& finish_;
  BlockRows rows_{};
  NextRows next_{};
  bool consecutive_ = false;
  int64_t done_ = 0, count_ = 0;
  OutputTile tile_{};
  const Sums* sums_ = nullptr;
};

template <int parts, bool two, class Source>
inline void multiply_block(const Call& call, const char* slots, const ConvBlock& block, int64_t steps,
                           Panel<Source>& panel, int64_t place, bool fresh, const Finish& finish,
                           const BlockRows& rows, int64_t tile, Ending<Sum<typename Source::Value>>& before) {
  using Value = typename Source::Value;
  const int64_t stride = steps * parts * kRowBytes;
  const char* const first = slots + block.slot[0] * stride;
  const char* const second = slots + block.slot[1] * stride;
  const char* const weights = panel.at(place);
  const int64_t all = (block.row_end - block.row_begin) * (block.column_end - block.column_begin) * steps;
  const int64_t count = two ? kBlockRows : kRegisterRows,
                per_step = 1 + (kBlockRows - 1) / std::max<int64_t>(all, 1);
  const NextRows next{rows.row(0), 1.0f};
  int64_t fetched = 0;
  zero_sums<two>();
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    for (int64_t c = block.column_begin; c < block.column_end; ++c) {
      const int64_t tap = r * call.slots.tap_columns + c, at = call.slots.taps[tap].slots * stride;
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t number = tap * steps + step;
        if (fresh) panel.expand_to(number + kAhead);
        multiply_step<Value, parts, two>(first + at + step * parts * kRowBytes,
                                         second + at + step * parts * kRowBytes, stride,
                                         weights + number * kStepBytes);
        before.some(per_step);
        for (const int64_t last = std::min(fetched + per_step, count); fetched < last; ++fetched) {
          block.consecutive ? finish.prefetch(next, fetched, tile) : finish.prefetch(rows, fetched, tile);
        }
      }
    }
  }
  before.rest();
  if (fresh) panel.expand_all();
}

template <int parts, class Source>
void run(const Call& call) {
  using Value = typename Source::Value;
  const Convolution& a = call.a;
  const ConvProblem& p = a.p;
  const int64_t steps = slot_steps(a, call.slots.side_by_side);
  const int64_t group_bytes = call.slots.count * steps * parts * kRowBytes;
  const int64_t image_pixels = p.out_height * p.out_width;
  const int32_t times = a.group > 0 ? largest_level(p.plane_weights, p.planes) : 1;
  const Finish finish(
      {p.outputs, p.scale, p.scale_stride, p.bias, p.activation, times, p.y, a.y_bf16, p.y_stride});
  Ending<Sum<Value>> ending(finish);
  Panel<Source> panel(Source(a, call.slots.side_by_side), call.slots, steps, call.memory + 2 * kSumBytes);
  char *sums = call.memory, *other = call.memory + kSumBytes;
  configure(kBlockRows);
  const int64_t most = panel_tiles(call.slots, steps, p.outputs);
  for (int64_t tile = call.begin; tile < call.end; tile += most) {
    const int64_t tiles = std::min(most, call.end - tile);
    bool fresh = true;
    for (int64_t group = 0; group < call.groups; ++group) {
      const int64_t image = call.image + group * call.slots.images;
      const char* const slots = call.from + group * group_bytes;
      for (int64_t i = call.block_begin; i < call.block_end; ++i) {
        const ConvBlock& block = call.slots.blocks[i];
        const BlockRows rows{block.places, image * image_pixels, call.factors + image};
        for (int64_t t = 0; t < tiles; ++t) {
          if (fresh) panel.begin(tile + t, t);
          if (block.registers == 2) {
            multiply_block<parts, true>(call, slots, block, steps, panel, t, fresh, finish, rows, tile + t,
                                        ending);
            store_sums<true>(sums);
          } else {
            multiply_block<parts, false>(call, slots, block, steps, panel, t, fresh, finish, rows, tile + t,
                                         ending);
            store_sums<false>(sums);
          }
          ending.begin(block, rows, tile + t, sums);
          std::swap(sums, other);
        }
        fresh = false;
      }
    }
  }
  ending.rest();
  amx_release();
}

// ---- images into slots ----

// Values of x as they are multiplied, and where those of a step go.
class Putter {
 public:
  Putter(const Convolution& a, const ImageFactor& factor)
      : form_(a.form), quantizer_(factor.of_x), times_(factor.of_x) {}

  // In the order of registers.
  void operator()(const float* x, int64_t count, char* to) const {
    if (form_ == Form::int8) {
      put_quantized(x, count, quantizer_, to, kRowBytes);
    } else {
      put_parts(x, count, times_, to, kParts * kRowBytes, kRowBytes);
    }
  }
  void operator()(const uint16_t* x, int64_t count, char* to) const {
    if (form_ == Form::int8) {
      put_quantized(x, count, quantizer_, to, kRowBytes);
    } else {
      put_halves(x, count, times_, to, kRowBytes);
    }
  }

 private:
  Form form_;
  Quantizer quantizer_;
  float times_;
};

// `count` values, and zeros up to a multiple of 16.
inline void copy_words(const float* from, int64_t count, float* to) {
  for (int64_t k = 0; k < count; k += kWord) {
    _mm512_storeu_ps(to + k, _mm512_maskz_loadu_ps(lanes_of(count - k), from + k));
  }
}
inline void copy_words(const uint16_t* from, int64_t count, uint16_t* to) {
  for (int64_t k = 0; k < count; k += kWord) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k),
                        _mm256_maskz_loadu_epi16(lanes_of(count - k), from + k));
  }
}

// The values of pixel (row, column) of an image and, with columns of the kernel side by side, its neighbours.
template <class X>
class Pixels {
 public:
  Pixels(const ConvProblem& p, const X* x, int64_t image, int64_t row, X* memory)
      : p_(p), line_(x + (image * p.height + row) * p.width * p.x_stride), memory_(memory) {}

  const X* at(int64_t column) const { return line_ + column * p_.x_stride; }
  const X* side_by_side(int64_t column) const {
    const int64_t words = tile_words(p_.channels) * kWord;
    X* to = memory_;
    for (int64_t s = 0; s < p_.kernel[1]; ++s, column += p_.dilation[1], to += words) {
      if (column < 0 || column >= p_.width) {
        std::memset(to, 0, static_cast<size_t>(words) * sizeof(X));
      } else {
        copy_words(at(column), p_.channels, to);
      }
    }
    return memory_;
  }

 private:
  const ConvProblem& p_;
  const X* line_;
  X* memory_;
};

template <class X>
void put_line(const Convolution& a, const ConvSlots& slots, const ImageFactor* factors, int64_t image,
              const ConvLine& line, const X* x, char* to, void* memory) {
  const ConvProblem& p = a.p;
  const int64_t bytes = slot_bytes(a, slots), values = slot_values(p, slots.side_by_side);
  const int64_t begin = line.row < 0 ? slots.width : line.begin, end = line.row < 0 ? slots.width : line.end;
  const int64_t together = slots.images;
  std::memset(to, 0, static_cast<size_t>(begin * together * bytes));
  std::memset(to + end * together * bytes, 0, static_cast<size_t>((slots.width - end) * together * bytes));
  if (begin >= end) return;
  const bool dense = !slots.side_by_side && p.stride[1] == 1 && p.x_stride == p.channels &&
                     p.channels * value_bytes(a.form) % kRowBytes == 0;
  for (int64_t i = 0; i < together; ++i) {
    const Putter put(a, factors[image + i]);
    const Pixels<X> pixels(p, x, image + i, line.row, static_cast<X*>(memory));
    char* at = to + (begin * together + i) * bytes;
    if (dense && together == 1) {  // the pixels are one row of values
      put(pixels.at(line.column), (end - begin) * values, at);
      continue;
    }
    int64_t column = line.column;
    for (int64_t u = begin; u < end; ++u, column += p.stride[1], at += together * bytes) {
      put(slots.side_by_side ? pixels.side_by_side(column) : pixels.at(column), values, at);
    }
  }
}

// Where words of a position begin in tiles of so many channels.
inline int64_t word_offset(const ConvProblem& p, int64_t channels, int64_t position, int64_t tile,
                           int64_t word) {
  const int64_t first = word / kChunkWords * kChunkWidth;
  return position * tile_count(p.outputs) * kTileRows * tile_words(channels) +
         tile_offset(p.outputs, channels, 0, first, tile) + word % kChunkWords * kTileRows;
}

}  // namespace

bool takes(const Convolution& a) {
  const ConvProblem& p = a.p;
  if (a.group > 0) {
    return a.form == Form::int8 && takes_levels(p.plane_weights, p.planes, taps_of(p) * p.channels);
  }
  return a.form == Form::int8 ? PlaneBytes::covers(p.plane_weights, p.planes)
                              : PlaneHalves::covers(p.plane_weights, p.planes);
}

int64_t side_by_side_words(const Convolution& a) {
  const ConvProblem& p = a.p;
  return p.planes * taps_of(p) * tile_count(p.outputs) * kTileRows * tile_words(p.channels);
}

void put_side_by_side(const Convolution& a, uint16_t* tiles) {
  const ConvProblem& p = a.p;
  const int64_t words = tile_words(p.channels), channels = slot_values(p, true);
  for (int64_t row = 0; row < p.planes * p.kernel[0]; ++row) {
    for (int64_t tile = 0; tile < tile_count(p.outputs); ++tile) {
      for (int64_t s = 0; s < p.kernel[1]; ++s) {
        for (int64_t word = 0; word < words; ++word) {
          std::memcpy(tiles + word_offset(p, channels, row, tile, s * words + word),
                      p.tiles + word_offset(p, p.channels, row * p.kernel[1] + s, tile, word),
                      kTileRows * sizeof(uint16_t));
        }
      }
    }
  }
}

float largest_value(const Convolution& a, int64_t image, int64_t row_begin, int64_t row_end) {
  const ConvProblem& p = a.p;
  const int64_t line = p.width * p.x_stride, first = (image * p.height + row_begin) * line,
                count = (row_end - row_begin) * line;
  return p.x != nullptr ? largest_of(p.x + first, count) : largest_of(p.x_bf16 + first, count);
}

ImageFactor factor_for(Form form, float largest) {
  if (form == Form::int8) {
    const float scale = quantization_scale(largest);
    return {scale, scale};
  }
  const PowerOfTwo power = power_for(largest);
  return {power.times, power.back};
}

int64_t slot_bytes(const Convolution& a, const ConvSlots& slots) {
  return slot_steps(a, slots.side_by_side) * parts_of(a.form) * kRowBytes;
}

int64_t putting_memory(const Convolution& a, const ConvSlots& slots) {
  return slots.side_by_side ? slot_values(a.p, true) * static_cast<int64_t>(sizeof(float)) : 0;
}

int64_t working_memory(const Convolution& a, const ConvSlots& slots) {
  const int64_t steps = slot_steps(a, slots.side_by_side);
  return 2 * kSumBytes +
         panel_tiles(slots, steps, a.p.outputs) * slots.tap_rows * slots.tap_columns * steps * kStepBytes;
}

void put_lines(const Convolution& a, const ConvSlots& slots, const ImageFactor* factors, int64_t image,
               int64_t begin, int64_t end, char* to, void* memory) {
  const int64_t slot = slot_bytes(a, slots), line_bytes = slots.width * slots.images * slot;
  for (int64_t i = begin; i < end; ++i) {
    const auto put = [&](const auto* x) {
      put_line(a, slots, factors, image, slots.lines[i], x, to + i * line_bytes, memory);
    };
    if (a.p.x != nullptr) {
      put(a.p.x);
    } else {
      put(a.p.x_bf16);
    }
  }
  if (end == slots.line_count) {
    const int64_t done = end * line_bytes;
    std::memset(to + done, 0, static_cast<size_t>(slots.count * slot - done));
  }
}

void multiply(const Convolution& a, const ConvSlots& slots, const ImageFactor* factors, int64_t image,
              int64_t groups, int64_t block_begin, int64_t block_end, int64_t begin, int64_t end,
              const char* from, void* memory) {
  const Call call{
      a, slots, factors, image, groups, block_begin, block_end, begin, end, from, static_cast<char*>(memory)};
  if (a.form == Form::int8) {
    if (a.group > 0) {
      a.p.planes == 1 ? run<1, LevelWeights<1>>(call) : run<1, LevelWeights<2>>(call);
    } else if (unit_plane(a.p)) {
      run<1, TapWeights<SignBytes>>(call);
    } else {
      run<1, TapWeights<PlaneBytes>>(call);
    }
  } else if (a.form == Form::bfloat16) {
    unit_plane(a.p) ? run<1, TapWeights<SignHalves>>(call) : run<1, TapWeights<PlaneHalves>>(call);
  } else {
    unit_plane(a.p) ? run<kParts, TapWeights<SignHalves>>(call) : run<kParts, TapWeights<PlaneHalves>>(call);
  }
}

}  // namespace quantopt::amx

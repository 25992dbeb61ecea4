// Products with +-1 weights on AMX.
//
// 32 rows of x times 32 outputs at a time: four registers of sums that stay where they are over the whole of
// K. The weights of a step are expanded (amx_expand.h) into a ring in the first-level cache some steps ahead,
// while the registers multiply. Expanding again for each 32 rows takes less time than sharing would. Loads of
// x pass by the first-level cache, so that the ring stays there.
#include "cpu/kernels/amx_linear.h"

// clang-format off: the vectors come before the functions that are written in them
#include "cpu/kernels/binary_epilogue.h"
// clang-format on

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/amx_expand.h"
#include "cpu/kernels/amx_registers.h"
#include "cpu/kernels/amx_rows.h"

namespace quantopt::amx {
namespace {

constexpr int64_t kAhead = 4;  // steps between the expansion of weights and their use
constexpr uint64_t kRing = 8;  // steps
constexpr int64_t kSumBytes = kRowsTogether * kTileRows * 4;  // of a block

template <class Value>
using Sum = std::conditional_t<std::is_same_v<Value, int8_t>, int32_t, float>;

inline int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }
inline int64_t group_count(const LinearProblem& p) { return (p.inputs + p.group - 1) / p.group; }
inline TileBits bits_of(const LinearProblem& p) { return {p.tiles, p.planes, 1, p.outputs, p.inputs}; }
inline int64_t steps_of(const Product& a) {
  const TileBits bits = bits_of(a.p);
  return a.form == Form::int8 ? bits.steps<int8_t>() : bits.steps<uint16_t>();
}
inline int64_t parts_of(Form form) { return form == Form::parts ? kParts : 1; }
inline bool unit_plane(const LinearProblem& p) { return p.planes == 1 && p.plane_weights[0] == 1; }

// Where row `row` of x begins in registers: [16 rows][step][part][row][64 bytes].
inline int64_t row_offset(const Product& a, int64_t row) {
  const int64_t step = parts_of(a.form) * kRegisterBytes;
  return row / kRegisterRows * steps_of(a) * step + row % kRegisterRows * kRowBytes;
}
inline int64_t factors_offset(const Product& a) { return row_offset(a, up(a.p.rows, kRegisterRows)); }

// ---- the product ----

// sums += 16 or 32 rows times the 32 outputs of a step: registers 0 to 3 (rows x outputs), rows 4 and 5,
// weights 6 and 7.
template <class Value, int parts, bool two>
inline __attribute__((always_inline)) void multiply_step(const char* rows, int64_t next_rows,
                                                         const char* weights) {
  amx_load<6>(weights, kRowBytes);
  amx_load<7>(weights + kRegisterBytes, kRowBytes);
  QUANTOPT_UNROLL for (int part = 0; part < parts; ++part) {
    const char* from = rows + part * kRegisterBytes;
    amx_load_once<4>(from, kRowBytes);
    amx_multiply<Value, 0, 4, 6>();
    amx_multiply<Value, 1, 4, 7>();
    if constexpr (two) {
      amx_load_once<5>(from + next_rows, kRowBytes);
      amx_multiply<Value, 2, 5, 6>();
      amx_multiply<Value, 3, 5, 7>();
    }
  }
}

template <bool two>
inline void zero_sums() {
  amx_zero<0>();
  amx_zero<1>();
  if constexpr (two) {
    amx_zero<2>();
    amx_zero<3>();
  }
}

// To [row][output].
template <bool two>
inline void store_sums(char* to) {
  constexpr int64_t kStride = kTileRows * 4;
  amx_store<0>(to, kStride);
  amx_store<1>(to + kStride / 2, kStride);
  if constexpr (two) {
    amx_store<2>(to + kRegisterRows * kStride, kStride);
    amx_store<3>(to + kRegisterRows * kStride + kStride / 2, kStride);
  }
}

inline __m512 as_floats(const int32_t* sums) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums)); }
inline __m512 as_floats(const float* sums) { return _mm512_load_ps(sums); }

// The end of a block: y from the sums of 32 outputs.
class Finish {
 public:
  Finish(const Product& a, const float* factors) : a_(a), factors_(factors) {
    if (a.p.levels != nullptr) {
      times_ = 0;
      for (int64_t p = 0; p < a.p.planes; ++p) times_ += a.p.plane_weights[p];
    }
  }

  // Brings a line of y into the cache, where it is written soon: `line` of the block's.
  __attribute__((always_inline)) void prefetch(int64_t row, int64_t tile, int64_t line) const {
    if (a_.y_bf16 != nullptr) {
      __builtin_prefetch(a_.y_bf16 + (row + line) * a_.y_stride + tile * kTileRows, 1);
    } else {
      __builtin_prefetch(a_.y + (row + line / 2) * a_.y_stride + tile * kTileRows + line % 2 * 16, 1);
    }
  }
  int64_t lines(int64_t rows) const { return a_.y_bf16 != nullptr ? rows : 2 * rows; }

  template <class Sums>
  void operator()(int64_t row, int64_t rows, int64_t tile, const Sums* sums) const {
    const LinearProblem& p = a_.p;
    const bool grouped = p.group_scales != nullptr;  // scaled before
    for (int half = 0; half < 2; ++half) {
      const int64_t n = tile * kTileRows + 16 * half;
      const __mmask16 mask = lanes_of(p.outputs - n);
      if (mask == 0) return;
      Vec scale = fill<Vec>(1.0f), bias = fill<Vec>(0.0f);
      if (!grouped) {
        scale = p.scale_stride == 0 ? fill<Vec>(*p.scale) : (Vec)_mm512_maskz_loadu_ps(mask, p.scale + n);
      }
      if (p.bias != nullptr) bias = (Vec)_mm512_maskz_loadu_ps(mask, p.bias + n);
      for (int64_t m = 0; m < rows; ++m) {
        const Sums* from = sums + m * kTileRows + 16 * half;
        const Vec factor = fill<Vec>(factors_[row + m]);
        Vec v;
        if constexpr (std::is_same_v<Sums, int32_t>) {
          __m512i whole = _mm512_load_si512(from);
          if (times_ != 1) whole = _mm512_mullo_epi32(whole, _mm512_set1_epi32(times_));
          v = (Vec)_mm512_cvtepi32_ps(whole) * (scale * factor);
        } else if (a_.form == Form::int8) {
          v = (Vec)_mm512_load_ps(from) * factor;
        } else {  // a power of two first, which loses nothing
          v = (Vec)_mm512_load_ps(from) * factor * scale;
        }
        if (p.bias != nullptr) v += bias;
        if (p.activation != Activation::none) v = activate(p.activation, v);
        put(v, mask, row + m, n);
      }
    }
  }

 private:
  void put(Vec v, __mmask16 mask, int64_t row, int64_t n) const {
    if (a_.y_bf16 != nullptr) {
      _mm512_mask_cvtepi32_storeu_epi16(a_.y_bf16 + row * a_.y_stride + n, mask,
                                        (__m512i)bfloat16_nearest((VecBits)v));
    } else {
      _mm512_mask_storeu_ps(a_.y + row * a_.y_stride + n, mask, (__m512)v);
    }
  }

  const Product& a_;
  const float* factors_;
  int32_t times_ = 1;  // what sums of levels are multiplied by
};

// Sums of one group after another, each times the scales of its outputs.
class GroupSums {
 public:
  GroupSums(char* memory, const float* scales) : sums_(memory), scales_(scales) {
    total_ = reinterpret_cast<float*>(memory + 2 * kSumBytes);
  }
  void begin(int64_t rows) {
    std::memset(total_, 0, static_cast<size_t>(rows * kTileRows) * sizeof(float));
    waiting_ = nullptr;
  }
  // Where the sums of the group that ended are stored; those of the one before are added up meanwhile.
  char* place() {
    at_ = at_ == 0 ? kSumBytes : 0;
    return sums_ + at_;
  }
  template <class Sums>
  void add_before(int64_t rows) {
    if (waiting_ != nullptr) add<Sums>(rows, waiting_);
    waiting_ = sums_ + at_;
  }
  template <class Sums>
  const float* end(int64_t rows) {
    add<Sums>(rows, waiting_);
    return total_;
  }

 private:
  template <class Sums>
  void add(int64_t rows, const char* from) {
    const auto* sums = reinterpret_cast<const Sums*>(from);
    for (int half = 0; half < 2; ++half) {
      const __m512 scale = _mm512_load_ps(scales_ + 16 * half);
      for (int64_t m = 0; m < rows; ++m) {
        float* total = total_ + m * kTileRows + 16 * half;
        _mm512_store_ps(total, _mm512_fmadd_ps(as_floats(sums + m * kTileRows + 16 * half), scale,
                                               _mm512_load_ps(total)));
      }
    }
    scales_ += kTileRows;
  }

  char *sums_, *waiting_ = nullptr;
  const float* scales_;
  float* total_;
  int64_t at_ = 0;
};

// Registers of a block of `rows` rows.
inline void configure(int64_t rows) {
  AmxConfig config;
  const int64_t first = std::min(rows, kRegisterRows), second = rows - first;
  for (int half = 0; half < 2; ++half) {
    config.shape(half, first, kRowBytes);
    config.shape(2 + half, second, kRowBytes);
    config.shape(6 + half, kRegisterRows, kRowBytes);
  }
  config.shape(4, first, kRowBytes);
  config.shape(5, second, kRowBytes);
  amx_configure(config);
}

// What a call works with.
struct Call {
  const Product& a;
  const char* rows;
  const float* factors;
  int64_t begin, end;  // tiles
  char* memory;
};

// 16 or 32 rows from `row`. steps_per_group: 0 without groups whose sums are scaled apart.
template <int parts, bool two, bool grouped, class Weights>
void block(const Call& call, Weights weights, int64_t row, int64_t rows) {
  using Value = typename Weights::Value;
  const Product& a = call.a;
  const TileBits bits = bits_of(a.p);
  const int64_t steps = bits.steps<Value>(), next_rows = steps * parts * kRegisterBytes;
  const int64_t group_steps = grouped ? a.p.group / kStepValues<Value> : steps;
  const char* const x = call.rows + row / kRegisterRows * next_rows;
  char* const ring = call.memory;
  char* const sums = ring + kRing * kStepBytes;
  const Finish finish(a, call.factors);
  const int64_t lines = two ? finish.lines(rows) : 0;
  StepWords<Value> words(bits, call.begin);
  int64_t left = (call.end - call.begin) * steps;
  uint64_t written = 0, read = 0;
  const auto expand = [&]() __attribute__((always_inline)) {
    if (left == 0) return;
    --left;
    if constexpr (!two) {
      for (int64_t i = 0; i < kStepWords<Value>; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(words.ahead() + i * kTileRows), _MM_HINT_T0);
      }
    }
    weights(words, ring + written++ % kRing * kStepBytes);
    words.advance();
  };
  configure(rows);
  for (int64_t i = 0; i < kAhead; ++i) expand();
  for (int64_t tile = call.begin; tile < call.end; ++tile) {
    GroupSums groups(sums, grouped ? a.p.group_scales + tile * group_count(a.p) * kTileRows : nullptr);
    if constexpr (grouped) groups.begin(rows);
    zero_sums<two>();
    int64_t line = 0, group_left = group_steps;
    for (int64_t step = 0; step < steps; ++step) {
      multiply_step<Value, parts, two>(x + step * parts * kRegisterBytes, next_rows,
                                       ring + read++ % kRing * kStepBytes);
      if (line < lines) finish.prefetch(row, tile, line++);
      if constexpr (grouped) {
        if (--group_left == 0 || step + 1 == steps) {
          store_sums<two>(groups.place());
          zero_sums<two>();
          group_left = group_steps;
          expand();
          groups.template add_before<Sum<Value>>(rows);
          continue;
        }
      }
      expand();
    }
    if constexpr (grouped) {
      finish(row, rows, tile, groups.template end<Sum<Value>>(rows));
    } else {
      store_sums<two>(sums);
      finish(row, rows, tile, reinterpret_cast<const Sum<Value>*>(sums));
    }
  }
}

template <int parts, bool grouped, class Weights>
void blocks(const Call& call, const Weights& weights, int64_t row, int64_t end) {
  for (; row < end; row += kRowsTogether) {
    const int64_t rows = std::min(kRowsTogether, end - row);
    if (rows > kRegisterRows) {
      block<parts, true, grouped>(call, weights, row, rows);
    } else {
      block<parts, false, grouped>(call, weights, row, rows);
    }
  }
  amx_release();
}

template <int parts, class Weights>
void with_groups(const Call& call, const Weights& weights, int64_t row, int64_t end) {
  if (call.a.p.group_scales != nullptr) {
    blocks<parts, true>(call, weights, row, end);
  } else {
    blocks<parts, false>(call, weights, row, end);
  }
}

}  // namespace

bool takes(const LinearProblem& p, Form form, bool levels) {
  if (p.inputs == 0) return false;
  if (levels && p.group != 0) return p.group % 32 == 0;
  const bool int8 = form == Form::int8;
  if (p.group % (int8 ? 64 : 32) != 0) return false;
  return int8 ? PlaneBytes::covers(p.plane_weights, p.planes)
              : PlaneHalves::covers(p.plane_weights, p.planes);
}

int64_t rows_memory(const Product& a) {
  return factors_offset(a) + up(a.p.rows * static_cast<int64_t>(sizeof(float)), 64);
}

int64_t working_memory(const Product&) { return static_cast<int64_t>(kRing) * kStepBytes + 3 * kSumBytes; }

void put_rows(const Product& a, int64_t begin, int64_t end, void* memory) {
  const int64_t pitch = parts_of(a.form) * kRegisterBytes, count = a.p.inputs;
  auto* const base = static_cast<char*>(memory);
  auto* const factors = reinterpret_cast<float*>(base + factors_offset(a));
  for (int64_t m = begin; m < end; ++m) {
    char* const to = base + row_offset(a, m);
    const auto each = [&](const auto* x) {
      if (a.form == Form::int8) {
        factors[m] = a.x_scale != nullptr ? a.x_scale[m] : quantization_scale(largest_of(x, count));
        put_quantized(x, count, Quantizer(factors[m]), to, pitch);
        return;
      }
      const PowerOfTwo power = power_for(largest_of(x, count));
      factors[m] = power.back;
      if constexpr (std::is_same_v<decltype(x), const float*>) {
        put_parts(x, count, power.times, to, pitch, kRegisterBytes);
      } else {
        put_halves(x, count, power.times, to, pitch);
      }
    };
    if (a.x != nullptr) {
      each(a.x + m * count);
    } else {
      each(a.x_bf16 + m * count);
    }
  }
}

void multiply(const Product& a, const void* rows, int64_t row_begin, int64_t row_end, int64_t begin,
              int64_t end, void* memory) {
  const LinearProblem& p = a.p;
  const auto* const base = static_cast<const char*>(rows);
  const Call call{a,     base, reinterpret_cast<const float*>(base + factors_offset(a)),
                  begin, end,  static_cast<char*>(memory)};
  const TileBits bits = bits_of(p);
  const int32_t* const w = p.plane_weights;
  if (a.form == Form::int8) {
    if (a.p.levels != nullptr && p.planes == 1) {
      blocks<1, false>(call, LevelBytes<1>(bits, a.p.levels, p.group), row_begin, row_end);
    } else if (a.p.levels != nullptr) {
      blocks<1, false>(call, LevelBytes<2>(bits, a.p.levels, p.group), row_begin, row_end);
    } else if (unit_plane(p)) {
      with_groups<1>(call, SignBytes(bits, w), row_begin, row_end);
    } else {
      with_groups<1>(call, PlaneBytes(bits, w), row_begin, row_end);
    }
  } else if (a.form == Form::bfloat16) {
    if (unit_plane(p)) {
      with_groups<1>(call, SignHalves(bits, w), row_begin, row_end);
    } else {
      with_groups<1>(call, PlaneHalves(bits, w), row_begin, row_end);
    }
  } else if (unit_plane(p)) {
    with_groups<kParts>(call, SignHalves(bits, w), row_begin, row_end);
  } else {
    with_groups<kParts>(call, PlaneHalves(bits, w), row_begin, row_end);
  }
}

}  // namespace quantopt::amx

// Products with +-1 weights on AMX.
//
// 32 rows of x times 32 outputs at a time: four registers of sums that stay where they are over the whole of
// K. The weights of a step are expanded (amx_expand.h) into a ring in the first-level cache some steps ahead,
// while the registers multiply. Expanding again for each 32 rows takes less time than sharing would. Loads of
// x pass by the first-level cache, so that the ring stays there.
#include "cpu/kernels/amx_linear.h"

#include <cstring>

#include "cpu/kernels/amx_block.h"
#include "cpu/kernels/amx_expand.h"
#include "cpu/kernels/amx_rows.h"

namespace quantopt::amx {
namespace {

constexpr int64_t kAhead = 4;  // steps between the expansion of weights and their use
constexpr uint64_t kRing = 8;  // steps
static_assert(kRowsTogether == kBlockRows);

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

// What becomes of the sums. Scales of groups are multiplied in before.
Output output_of(const Product& a) {
  const LinearProblem& p = a.p;
  const int32_t times = p.levels != nullptr ? largest_level(p.plane_weights, p.planes) : 1;
  return {p.outputs, p.scale, p.scale_stride, p.bias, p.activation, times, a.y, a.y_bf16, a.y_stride};
}

// Rows of x and y from one on.
struct RowsFrom {
  static constexpr bool kAll = true, kOneFactor = false;
  int64_t first;
  const float* factors;
  int64_t row(int64_t m) const { return first + m; }
  float factor(int64_t m) const { return factors[first + m]; }
};

// Sums of one group after another, each times the scales of its outputs, added up a few groups at a time.
template <class Sums>
class GroupSums {
 public:
  static constexpr int64_t kMost = 4;
  static constexpr int64_t kBytes = (kMost + 1) * kSumBytes;

  // scales: [group][output] of a tile.
  GroupSums(char* memory, const float* scales, int64_t rows)
      : sums_(memory),
        total_(reinterpret_cast<float*>(memory + kMost * kSumBytes)),
        scales_(scales),
        rows_(rows) {
    std::memset(total_, 0, static_cast<size_t>(rows * kTileRows) * sizeof(float));
  }
  // Where the sums of the group that ended are stored.
  char* place() { return sums_ + waiting_++ * kSumBytes; }
  void add_if_full() {
    if (waiting_ == kMost) add<true>();
  }
  const float* total() {
    if (waiting_ > 0) add<false>();
    return total_;
  }

 private:
  template <bool full>
  __attribute__((noinline)) void add() {
    const int64_t count = full ? kMost : waiting_;
    for (int half = 0; half < 2; ++half) {
      __m512 scale[kMost];
      for (int64_t g = 0; g < count; ++g) scale[g] = _mm512_load_ps(scales_ + g * kTileRows + 16 * half);
      for (int64_t m = 0; m < rows_; ++m) {
        const int64_t at = m * kTileRows + 16 * half;
        __m512 total = _mm512_load_ps(total_ + at);
        for (int64_t g = 0; g < count; ++g) {
          const auto* const sums = reinterpret_cast<const Sums*>(sums_ + g * kSumBytes) + at;
          total = _mm512_fmadd_ps(as_floats(sums), scale[g], total);
        }
        _mm512_store_ps(total_ + at, total);
      }
    }
    scales_ += count * kTileRows;
    waiting_ = 0;
  }

  char* const sums_;
  float* const total_;
  const float* scales_;
  const int64_t rows_;
  int64_t waiting_ = 0;
};

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
  const Finish finish(output_of(a));
  const RowsFrom y_rows{row, call.factors};
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
    GroupSums<Sum<Value>> groups(
        sums, grouped ? a.p.group_scales + group_index(tile * kTileRows, 0, group_count(a.p)) : nullptr,
        grouped ? rows : 0);
    zero_sums<two>();
    int64_t fetched = 0, group_left = group_steps;
    for (int64_t step = 0; step < steps; ++step) {
      multiply_step<Value, parts, two>(x + step * parts * kRegisterBytes, next_rows,
                                       ring + read++ % kRing * kStepBytes);
      if (two && fetched < rows) finish.prefetch(y_rows, fetched++, tile);
      if constexpr (grouped) {
        if (--group_left == 0 || step + 1 == steps) {
          store_sums<two>(groups.place());
          zero_sums<two>();
          group_left = group_steps;
          expand();
          groups.add_if_full();
          continue;
        }
      }
      expand();
    }
    if constexpr (grouped) {
      finish(y_rows, 0, rows, finish.tile(tile), groups.total());
    } else {
      store_sums<two>(sums);
      finish(y_rows, 0, rows, finish.tile(tile), reinterpret_cast<const Sum<Value>*>(sums));
    }
  }
}

template <int parts, bool grouped, class Weights>
void blocks(const Call& call, const Weights& weights, int64_t row, int64_t end) {
  for (; row < end; row += kRowsTogether) {
    const int64_t rows = least(kRowsTogether, end - row);
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

int64_t working_memory(const Product&) {
  return static_cast<int64_t>(kRing) * kStepBytes + GroupSums<float>::kBytes;
}

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

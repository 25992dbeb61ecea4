#include <algorithm>
#include <limits>

#include "cpu/kernels/step_span.h"

namespace quantopt::QUANTOPT_ISA {
namespace {

// ---- 16-bit types, a stage at a time

template <class T>
void widen(const void* from, int64_t at, float* to, int64_t n) {
  const T* source = static_cast<const T*>(from) + at;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) store_pair(to + i, load_pair(source + i));
  if (i == n) return;
  const Pair rest = load_some(source + i, n - i);
  std::memcpy(to + i, &rest, static_cast<size_t>(n - i) * sizeof(float));
}

template <class T>
void narrow(const float* from, void* to, int64_t at, int64_t n) {
  T* target = static_cast<T*>(to) + at;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) store_pair(target + i, load_pair(from + i));
  if (i == n) return;
  T rest[kPair];
  store_pair(rest, load_some(from + i, n - i));
  std::memcpy(target + i, rest, static_cast<size_t>(n - i) * sizeof(T));
}

void read_as_float(Dtype dtype, const void* from, int64_t at, float* to, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat32: return widen<float>(from, at, to, n);
    case Dtype::kBFloat16: return widen<BFloat16>(from, at, to, n);
    case Dtype::kFloat16: return widen<Float16>(from, at, to, n);
  }
}

void write_from_float(Dtype dtype, const float* from, void* to, int64_t at, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat32: return narrow<float>(from, to, at, n);
    case Dtype::kBFloat16: return narrow<BFloat16>(from, to, at, n);
    case Dtype::kFloat16: return narrow<Float16>(from, to, at, n);
  }
}

constexpr int64_t kRandomBlock = 128;  // elements whose random bits are made together; a multiple of 8 kWidth

// Sixteen random bits for each of kRandomBlock elements from `first`, a multiple of 8. Little endian: the low
// half of a word comes first.
inline void random_halves(const PhiloxKey& key, int64_t first, uint16_t* out) {
  constexpr int kQuarter = kWidth / 4;
  VecBits lane{};
  for (uint32_t k = 0; k < kWidth; ++k)
    lane[k] = kQuarter * (k % 4) + k / 4;  // so that 4x4 transposes give order
  const auto start = static_cast<uint64_t>(first / 8);
  for (int64_t b = 0; b < kRandomBlock / 8; b += kWidth) {
    const uint64_t block = start + static_cast<uint64_t>(b);
    const VecBits low = lane + static_cast<uint32_t>(block);
    const auto high = static_cast<uint32_t>(block >> 32);
    VecBits words[4];
    if (static_cast<uint32_t>(block) <= UINT32_MAX - kWidth) {
      philox(key, low, high, words);
    } else {
      const auto carry =
          (VecBits)(low < static_cast<uint32_t>(block));  // all ones, -1, where the low word wraps
      philox(key, low, high - carry, words);
    }
    transpose_quads(words);
    std::memcpy(out + 8 * b, words, sizeof(words));
  }
}

// Rounds elements [at, at + n) of a tensor of bfloat16, which stand in `wide`, stochastically.
void round_randomly(PhiloxKey key, uint32_t tensor, int64_t step, const float* wide, void* target, int64_t at,
                    int64_t n) {
  key.tensor = tensor;
  key.step = static_cast<uint32_t>(step);
  BFloat16* const to = static_cast<BFloat16*>(target) + at;
  uint16_t halves[kRandomBlock];
  for (int64_t i = 0; i < n;) {
    const int64_t lead = (at + i) % 8, end = std::min(n, i + kRandomBlock - lead);
    random_halves(key, at + i - lead, halves);
    const uint16_t* random = halves + lead - i;
    for (; i + kPair <= end; i += kPair)
      store_line(to + i, rounded_stochastically(load_pair(wide + i), random + i));
    if (i == end) continue;
    const auto rest = static_cast<size_t>(end - i);
    uint16_t last[kPair] = {};
    BFloat16 rounded[kPair];
    std::memcpy(last, random + i, rest * sizeof(*last));
    store_line(rounded, rounded_stochastically(load_some(wide + i, end - i), last));
    std::memcpy(to + i, rounded, rest * sizeof(*rounded));
    i = end;
  }
}

// The second moments of at most kStage elements from `at`, as float32: those of the segment itself, or
// `wide`, in which bfloat16 is widened.
QUANTOPT_INLINE float* read_exp_avg_sq(const StepContext& o, const StepSegment& s, int64_t at, int64_t n,
                                       float* wide) {
  if (o.exp_avg_sq_dtype == Dtype::kFloat32) return static_cast<float*>(s.exp_avg_sq) + at;
  widen<BFloat16>(s.exp_avg_sq, at, wide, n);
  return wide;
}

// float16, or bfloat16 momentum of float weights: everything that is not float is converted to float arrays
// that stay in the first cache. The float kernel then does the work. Weights and latents that stay as they
// are, are stepped there too, of all types.
struct Stage {
  static constexpr int64_t kMost = 2 * kStage;  // where the weights alone are converted
  alignas(64) float param[kMost];
  alignas(64) float grad[kStage];
  alignas(64) float momentum[kStage];
  alignas(64) float latent[kStage];
};

Span<float> fill_stage(const StepContext& o, const StepSegment& s, float* exp_avg_sq, Stage& stage,
                       int64_t at, int64_t n, bool latent_rule, bool reads_weight) {
  Span<float> span{};
  read_as_float(o.param_dtype, s.grad, at, stage.grad, n);
  span.grad = stage.grad;
  if (s.momentum != nullptr) {
    read_as_float(o.momentum_dtype, s.momentum, at, stage.momentum, n);
    span.momentum = stage.momentum;
  }
  span.exp_avg_sq = exp_avg_sq;
  float* latent = s.latent != nullptr ? s.latent + at : nullptr;
  if (o.frozen && latent != nullptr) {
    std::memcpy(stage.latent, latent, static_cast<size_t>(n) * sizeof(float));
    latent = stage.latent;
  }
  if (latent_rule) {
    span.latent = latent;
    span.param = stage.param;
    if (reads_weight) read_as_float(o.param_dtype, s.param, at, stage.param, n);
  } else if (latent != nullptr) {
    span.param = latent;  // master weights are stepped in place
  } else {
    span.param = stage.param;
    read_as_float(o.param_dtype, s.param, at, stage.param, n);
  }
  return span;
}

// ---- choosing the instantiation

// `exp_avg_sq`: of the elements from `begin` on, as read_exp_avg_sq gives it.
Span<float> float_span(const StepSegment& s, float* exp_avg_sq, int64_t begin) {
  return {static_cast<float*>(s.param) + begin, static_cast<const float*>(s.grad) + begin,
          static_cast<float*>(s.momentum) + (s.momentum ? begin : 0), exp_avg_sq,
          s.latent + (s.latent ? begin : 0)};
}

Span<BFloat16> bfloat16_span(const StepContext& o, const StepSegment& s, float* exp_avg_sq, int64_t begin) {
  const bool narrow = o.momentum_dtype == Dtype::kBFloat16;
  const int64_t bytes = narrow ? sizeof(BFloat16) : sizeof(float);
  return {static_cast<BFloat16*>(s.param) + begin,
          static_cast<const BFloat16*>(s.grad) + begin,
          {static_cast<char*>(s.momentum) + (s.momentum ? begin * bytes : 0), narrow},
          exp_avg_sq,
          s.latent + (s.latent ? begin : 0)};
}

// Whether all that is read is float32.
bool all_float(const StepContext& o, const StepSegment& s) {
  return o.param_dtype == Dtype::kFloat32 && (s.momentum == nullptr || o.momentum_dtype == Dtype::kFloat32);
}

// What a chunk of a step reads and writes.
struct Kinds {
  bool exp_avg_sq, latent, reads_weight;
};
template <class Direction, class R>
constexpr Kinds kKinds{Direction::kExpAvgSq, R::kLatent, R::kReadsWeight};

// A step of elements [begin, end), of which `chunk` has all. A pointer and not a template, so that in_chunks
// is compiled once.
struct ChunkStep {
  template <class P>
  using Function = void(const void* step, const Span<P>& chunk, int64_t begin, int64_t end, Writing writing,
                        bool prefetch);
  const void* step;
  Function<float>* floats;
  Function<BFloat16>* bfloat16;

  // Step(chunk, begin, end, writing, prefetch), which has to outlive this. OfFloats: it is not called for
  // others.
  template <bool OfFloats, class Step>
  static ChunkStep of(const Step& step) {
    const auto call = [](const void* s, const auto& chunk, int64_t a, int64_t b, Writing writing,
                         bool prefetch) { (*static_cast<const Step*>(s))(chunk, a, b, writing, prefetch); };
    if constexpr (OfFloats) {
      return {&step, call, nullptr};
    } else {
      return {&step, call, call};
    }
  }
};

// Calls step for the elements [begin, end) in chunks: all at once where they are stepped where they are, else
// at most kStage, or Stage::kMost; next(begin, most) is where a chunk of so many may end.
void in_chunks(const StepContext& o, const StepSegment& s, const Kinds& kinds, int64_t begin, int64_t end,
               int64_t (*next)(const StepSegment&, int64_t, int64_t), const ChunkStep& step) {
  const bool floats = all_float(o, s);
  const bool staged = o.frozen || (!floats && o.param_dtype != Dtype::kBFloat16);
  const bool wide_v = kinds.exp_avg_sq && o.exp_avg_sq_dtype != Dtype::kFloat32;
  // bfloat16 that is rounded at random: the chunk is stepped as master weights are, and rounded after it.
  const bool rounds = o.stochastic_rounding && !staged && s.latent == nullptr;
  const bool at_once = !staged && !rounds && !wide_v;
  const Writing writing = o.stream ? Writing::kStreamed : Writing::kStored;
  const int64_t most = staged || wide_v ? kStage : Stage::kMost;
  Stage stage;
  alignas(64) float wide[kStage];
  for (int64_t stop; begin < end; begin = stop) {
    stop = at_once ? end : std::min(end, next(s, begin, most));
    const int64_t n = stop - begin;
    float* const v = kinds.exp_avg_sq ? read_exp_avg_sq(o, s, begin, n, wide) : nullptr;
    if (staged) {
      const auto span = fill_stage(o, s, v, stage, begin, n, kinds.latent, kinds.reads_weight);
      step.floats(step.step, span, begin, stop, Writing::kStored, false);
      if (s.momentum != nullptr) write_from_float(o.momentum_dtype, stage.momentum, s.momentum, begin, n);
      if (!o.frozen) write_from_float(o.param_dtype, span.param, s.param, begin, n);
    } else if (floats) {
      step.floats(step.step, float_span(s, v, begin), begin, stop, writing, o.prefetch);
    } else {
      auto span = bfloat16_span(o, s, v, begin);
      if (rounds) {
        widen<BFloat16>(s.param, begin, stage.param, n);
        span.latent = stage.param;
      }
      step.bfloat16(step.step, span, begin, stop, rounds ? Writing::kNot : writing, o.prefetch);
      if (rounds) round_randomly(o.key, s.index, s.step, stage.param, s.param, begin, n);
    }
    if (wide_v) round_randomly(o.state_key, s.index + kStateTensor, s.step, wide, s.exp_avg_sq, begin, n);
  }
}

// The levels of a scale before the step, without a bound of the latent.
SpanLevels levels_before(const StepContext& o, const StepSegment& s, int64_t scale) {
  const Grid grid = make_grid(s.scale[scale], o.level_factor, o.levels);
  return {grid, grid, std::numeric_limits<float>::infinity()};
}

template <class Row>
const auto& constants_of(const StepContext& o) {
  return *std::get_if<static_cast<size_t>(Row::kRule)>(&o.constants);
}

float latent_limit(const StepContext& o, const StepSegment& s, int64_t bound) {
  return static_cast<float>(o.hyper.bound) * s.latent_bound[bound];
}

// Tensors of one scale are many: their spans need no division.
QUANTOPT_INLINE int64_t quotient(int64_t x, int64_t by) { return x < by ? 0 : x / by; }

// Calls visit(begin, end, levels) for every run of elements that share a scale and, with a latent, a bound.
template <bool Quantised, bool Latent, class Visit>
QUANTOPT_INLINE void for_each_span(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                                   const Visit& visit) {
  if constexpr (!Quantised) return visit(begin, end, SpanLevels{});
  while (begin < end) {
    const int64_t row = quotient(begin, s.row);
    const int64_t group = quotient(begin - row * s.row, s.group);
    const int64_t at = row * s.scales_per_row + group;
    int64_t stop = std::min({end, row * s.row + (group + 1) * s.group, (row + 1) * s.row});
    SpanLevels levels = levels_before(o, s, at);
    if (s.next_scale != s.scale) levels.grid = make_grid(s.next_scale[at], o.level_factor, o.levels);
    if (Latent && s.latent_bound != nullptr) {
      const int64_t bound = s.bound_row == 0 ? at : begin / s.bound_row;
      if (s.bound_row != 0) stop = std::min(stop, (bound + 1) * s.bound_row);
      levels.latent_limit = latent_limit(o, s, bound);
    }
    visit(begin, stop, levels);
    begin = stop;
  }
}

template <class Visit>
void visit_direction(const StepContext& o, double step, const Visit& visit) {
  if (o.base == Base::kAdam) return visit(make_adam_direction(o.hyper, step));
  visit(SgdDirection(o.has_momentum, static_cast<float>(o.hyper.momentum), o.nesterov));
}

// Calls visit(row, Type<R>, direction) for the rule and the base of a step.
template <bool Binary, class Visit>
void visit_kinds(const StepContext& o, const StepSegment& s, const Visit& visit) {
  visit_rule<Binary>(o.rule, [&](auto of_levels) {
    using Row =
        std::conditional_t<decltype(of_levels)::kQuantised, decltype(of_levels), RowOf<Rule::kNone, true>>;
    Row::visit_object(constants_of<Row>(o), o.param_dtype == Dtype::kFloat32, [&](auto type) {
      visit_direction(o, s.step, [&](const auto& direction) { visit(Row{}, type, direction); });
    });
  });
}

// Elements [begin, end), of which `chunk` has all; instantiated for every rule, base and type.
template <class Row, class R, class P, class Direction>
__attribute__((noinline, noclone)) void step_chunk(const StepContext& o, const StepSegment& s,
                                                   const typename Row::Constants& constants,
                                                   const Span<P>& chunk, int64_t begin, int64_t end,
                                                   const Direction& direction, Writing writing,
                                                   bool prefetch) {
  for_each_span<Row::kQuantised, R::kLatent>(
      o, s, begin, end, [&](int64_t a, int64_t b, const auto& levels) __attribute__((always_inline)) {
        const auto make_rule = [&](const auto& c) __attribute__((always_inline)) {
          return Row::template object<R>(c, levels);
        };
        step_span(from_element(chunk, a - begin), b - a, o.gradient_factor, direction, constants, make_rule,
                  writing, prefetch);
      });
}

template <class Row, class R, class Direction>
void step_elements(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                   const Direction& direction) {
  const auto& constants = constants_of<Row>(o);
  const auto next = [](const StepSegment&, int64_t at, int64_t most) { return at + most; };
  const auto step = [&](const auto& chunk, int64_t a, int64_t b, const auto&... how) {
    step_chunk<Row, R>(o, s, constants, chunk, a, b, direction, how...);
  };
  in_chunks(o, s, kKinds<Direction, R>, begin, end, next, ChunkStep::of<kExactAlone<R>>(step));
}

template <bool Binary>
void step_piece_of(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end) {
  visit_kinds<Binary>(o, s, [&](auto row, auto type, const auto& direction) {
    step_elements<decltype(row), typename decltype(type)::type>(o, s, begin, end, direction);
  });
}

// The same of a range that shares a scale.
template <class Direction, class R>
double magnitude_of_range(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                          const Direction& direction, const R& rule) {
  const bool at_once = all_float(o, s) && o.exp_avg_sq_dtype == Dtype::kFloat32;
  const int64_t length = at_once ? end - begin : kStage;
  double total = 0.0;
  Stage stage;
  alignas(64) float wide[kStage];
  for (int64_t at = begin; at < end; at += length) {
    const int64_t n = std::min(length, end - at);
    float* const v = Direction::kExpAvgSq ? read_exp_avg_sq(o, s, at, n, wide) : nullptr;
    const auto span =
        all_float(o, s) ? float_span(s, v, at) : fill_stage(o, s, v, stage, at, n, true, R::kReadsWeight);
    total += magnitude_of_span(span, n, o.gradient_factor, direction, rule);
  }
  return total;
}

template <class Row, class R, class Direction>
double magnitude_of_elements(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                             const Direction& direction) {
  double total = 0.0;
  for_each_span<true, true>(o, s, begin, end, [&](int64_t a, int64_t b, const SpanLevels& levels) {
    const R rule = Row::template object<R>(constants_of<Row>(o), levels);
    total += magnitude_of_range(o, s, a, b, direction, rule);
  });
  return total;
}

template <bool Binary>
double magnitude_of_piece_of(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end) {
  double total = 0.0;
  visit_kinds<Binary>(o, s, [&](auto row, auto type, const auto& direction) {
    using Row = decltype(row);
    if constexpr (Row::kDynamicScale)
      total = magnitude_of_elements<Row, typename decltype(type)::type>(o, s, begin, end, direction);
  });
  return total;
}

// Groups of one row that follow each other, of `length` elements each.
struct Groups {
  int64_t begin;  // element
  int64_t count;  // 0: no more
  int64_t length, scale;
  bool short_pairs;  // whole pairs, at most kShort elements each
};

// The groups of [begin, end), which are whole ones: short ones of whole pairs kAtOnce together, as long as a
// row has so many, others alone.
class GroupsOf {
 public:
  GroupsOf(const StepSegment& s, int64_t begin, int64_t end)
      : group_(s.group), row_(s.row), begin_(begin), end_(end) {
    const int64_t row = begin / s.row;
    at_ = row * s.scales_per_row + (begin - row * s.row) / s.group;
    row_end_ = std::min(end, (row + 1) * s.row);
    short_ = s.group % kPair == 0 && s.group <= kShort;
  }
  Groups next() {
    if (begin_ == row_end_) row_end_ = std::min(end_, row_end_ + row_);
    if (begin_ == end_) return {};
    const int64_t left = row_end_ - begin_;
    Groups groups{begin_, 1, std::min(group_, left), at_, short_ && left >= group_};
    if (groups.short_pairs) groups.count = left >= kAtOnce * group_ ? kAtOnce : left / group_;
    begin_ += groups.count * groups.length;
    at_ += groups.count;
    return groups;
  }

 private:
  int64_t group_, row_, begin_, end_, at_, row_end_;
  bool short_;
};

// Groups [begin, end) of at most kKept elements each, of which `chunk` has all; instantiated as step_chunk.
// The second half of short groups comes after the first half of the next, so that it need not wait for its
// scales.
template <class Row, class R, class P, class Direction>
__attribute__((noinline, noclone)) void step_groups_of_chunk(const StepContext& o, const StepSegment& s,
                                                             const typename Row::Constants& constants_in,
                                                             const Span<P>& chunk, int64_t begin, int64_t end,
                                                             const Direction& direction_in, Writing writing,
                                                             bool prefetch) {
  const auto constants = constants_in;
  const Direction direction = direction_in;
  static_assert(kKept % kPair == 0 && kKept <= MagnitudeSum::kCarry && kShort <= kKept);
  alignas(64) float kept[2][kAtOnce * kShort], kept_of_one[kKept];
  float means[2][kAtOnce];
  const auto rule_of = [&](const Groups& groups, int64_t k, float scale) __attribute__((always_inline)) {
    SpanLevels levels = levels_before(o, s, groups.scale + k);
    levels.grid = make_grid(scale, o.level_factor, o.levels);
    if (s.latent_bound != nullptr)
      levels.latent_limit =
          latent_limit(o, s, s.bound_row == 0 ? groups.scale + k : groups.begin / s.bound_row);
    return Row::template object<R>(constants, levels);
  };
  const auto span_of = [&](const Groups& groups) __attribute__((always_inline)) {
    return from_element(chunk, groups.begin - begin);
  };
  GroupsOf walk(s, begin, end);
  Groups half{};  // whose second half is to come
  for (int slot = 0;; slot ^= 1) {
    const Groups now = walk.next();
    if (now.short_pairs) {
      const auto make_rule = [&](int64_t k) __attribute__((always_inline)) {
        return rule_of(now, k, s.scale[now.scale + k]);
      };
      move_groups(span_of(now), now.count, now.length, o.gradient_factor, direction, make_rule, prefetch,
                  kept[slot], means[slot]);
    }
    if (half.short_pairs) {
      const auto make_rule = [&](int64_t k) __attribute__((always_inline)) {
        const float scale = means[slot ^ 1][k];
        const auto rule = rule_of(half, k, scale);
        s.scale[half.scale + k] = scale;
        return rule;
      };
      const Span<P> span = span_of(half);
      finish_groups(span, half.count, half.length, make_rule, where_aligned(writing, span.param),
                    kept[slot ^ 1]);
    }
    if (now.count == 0) break;
    if (!now.short_pairs) {
      const auto make_rule = [&](float scale)
                                 __attribute__((always_inline)) { return rule_of(now, 0, scale); };
      const Span<P> span = span_of(now);
      s.scale[now.scale] =
          step_group(span, now.length, o.gradient_factor, direction, make_rule,
                     where_aligned(writing, span.param), prefetch, s.scale[now.scale], kept_of_one);
    }
    half = now;
  }
}

template <class Row, class R, class Direction>
void step_groups_of_elements(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                             const Direction& direction) {
  if (s.group <= kKept && (s.latent_bound == nullptr || s.bound_row == 0 || s.bound_row >= s.row)) {
    const auto& constants = constants_of<Row>(o);
    const auto next = [](const StepSegment& of, int64_t at, int64_t most) {
      return std::min((at / of.row + 1) * of.row, at + most / of.group * of.group);
    };
    const auto step = [&](const auto& chunk, int64_t a, int64_t b, const auto&... how) {
      step_groups_of_chunk<Row, R>(o, s, constants, chunk, a, b, direction, how...);
    };
    return in_chunks(o, s, kKinds<Direction, R>, begin, end, next, ChunkStep::of<kExactAlone<R>>(step));
  }
  GroupsOf walk(s, begin, end);
  for (Groups now = walk.next(); now.count != 0; now = walk.next()) {
    for (int64_t k = 0, a = now.begin; k < now.count; ++k, a += now.length) {
      const int64_t at = now.scale + k, b = a + now.length;
      const double sum = magnitude_of_elements<Row, R>(o, s, a, b, direction);
      s.next_scale[at] = static_cast<float>(sum / static_cast<double>(now.length));
      step_elements<Row, R>(o, s, a, b, direction);
      s.scale[at] = s.next_scale[at];
    }
  }
}

template <bool Binary>
void step_groups_of(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end) {
  visit_kinds<Binary>(o, s, [&](auto row, auto type, const auto& direction) {
    using Row = decltype(row);
    if constexpr (Row::kDynamicScale)
      step_groups_of_elements<Row, typename decltype(type)::type>(o, s, begin, end, direction);
  });
}

}  // namespace

void step_groups(const StepContext& context, const StepSegment& segment, int64_t begin, int64_t end) {
  const bool binary = context.levels == 2;
  binary ? step_groups_of<true>(context, segment, begin, end)
         : step_groups_of<false>(context, segment, begin, end);
  if (context.stream) finish_stores();
}

void step_piece(const StepContext& context, const StepSegment& segment, int64_t begin, int64_t end) {
  const bool binary = context.levels == 2;
  binary ? step_piece_of<true>(context, segment, begin, end)
         : step_piece_of<false>(context, segment, begin, end);
  if (context.stream) finish_stores();
}

double magnitude_of_piece(const StepContext& context, const StepSegment& segment, int64_t begin,
                          int64_t end) {
  const bool binary = context.levels == 2;
  return binary ? magnitude_of_piece_of<true>(context, segment, begin, end)
                : magnitude_of_piece_of<false>(context, segment, begin, end);
}

}  // namespace quantopt::QUANTOPT_ISA

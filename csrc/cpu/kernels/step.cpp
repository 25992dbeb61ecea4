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

// The second moments of at most kStage elements from `at`, as float32: those of the segment itself, or
// `wide`, in which bfloat16 is widened.
QUANTOPT_INLINE float* read_exp_avg_sq(const StepContext& o, const StepSegment& s, int64_t at, int64_t n,
                                       float* wide) {
  if (o.exp_avg_sq_dtype == Dtype::kFloat32) return static_cast<float*>(s.exp_avg_sq) + at;
  widen<BFloat16>(s.exp_avg_sq, at, wide, n);
  return wide;
}

void round_exp_avg_sq(const StepContext& o, const StepSegment& s, int64_t at, int64_t n, const float* wide) {
  PhiloxKey key = o.state_key;
  key.tensor = s.index + kStateTensor;
  key.step = static_cast<uint32_t>(s.step);
  BFloat16* const to = static_cast<BFloat16*>(s.exp_avg_sq) + at;
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

// Rounds `wide` stochastically into the segment, where that is bfloat16.
QUANTOPT_INLINE void write_exp_avg_sq(const StepContext& o, const StepSegment& s, int64_t at, int64_t n,
                                      const float* wide) {
  if (o.exp_avg_sq_dtype != Dtype::kFloat32) round_exp_avg_sq(o, s, at, n, wide);
}

// float16, or bfloat16 momentum of float weights: everything that is not float is converted to float arrays
// that stay in the first cache. The float kernel then does the work. Weights and latents that stay as they
// are, are stepped there too, of all types.
struct Stage {
  alignas(64) float param[kStage];
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

template <class Direction, class R>
void step_staged(const StepContext& o, const StepSegment& s, float* exp_avg_sq, int64_t begin, int64_t end,
                 const Direction& direction, const R& rule) {
  Stage stage;
  for (int64_t at = begin; at < end; at += kStage) {
    const int64_t n = std::min(kStage, end - at);
    float* const v = exp_avg_sq + (exp_avg_sq ? at - begin : 0);
    const auto span = fill_stage(o, s, v, stage, at, n, R::kLatent, R::kReadsWeight);
    step_span(span, n, o.gradient_factor, direction, rule, Writing{});
    if (s.momentum != nullptr) write_from_float(o.momentum_dtype, stage.momentum, s.momentum, at, n);
    if (!o.frozen) write_from_float(o.param_dtype, span.param, s.param, at, n);
  }
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
template <class Direction>
bool all_float(const StepContext& o) {
  return o.param_dtype == Dtype::kFloat32 && (!Direction::kMomentum || o.momentum_dtype == Dtype::kFloat32);
}

template <class Direction, class R>
void step_with(const StepContext& o, const StepSegment& s, float* exp_avg_sq, int64_t begin, int64_t end,
               const Direction& direction, const R& rule) {
  const int64_t n = end - begin;
  if (o.frozen) return step_staged(o, s, exp_avg_sq, begin, end, direction, rule);
  if (all_float<Direction>(o)) {
    return step_span(float_span(s, exp_avg_sq, begin), n, o.gradient_factor, direction, rule,
                     Writing{o.stream}, o.prefetch);
  }
  if (o.param_dtype == Dtype::kBFloat16) {
    PhiloxKey key = o.key;
    key.tensor = s.index;
    key.step = static_cast<uint32_t>(s.step);
    const Span<BFloat16> span = bfloat16_span(o, s, exp_avg_sq, begin);
    const bool stochastic = o.stochastic_rounding && s.latent == nullptr;
    const Writing writing{o.stream, stochastic ? &key : nullptr};
    return step_span(span, n, o.gradient_factor, direction, rule, writing, o.prefetch, begin);
  }
  step_staged(o, s, exp_avg_sq, begin, end, direction, rule);
}

template <class Direction, class R>
void step_range(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                const Direction& direction, const R& rule) {
  if constexpr (Direction::kExpAvgSq) {
    alignas(64) float wide[kStage];
    const int64_t length = o.exp_avg_sq_dtype == Dtype::kFloat32 ? end - begin : kStage;
    for (int64_t at = begin; at < end; at += length) {
      const int64_t n = std::min(length, end - at);
      step_with(o, s, read_exp_avg_sq(o, s, at, n, wide), at, at + n, direction, rule);
      write_exp_avg_sq(o, s, at, n, wide);
    }
  } else {
    step_with(o, s, nullptr, begin, end, direction, rule);
  }
}

// The levels of a scale before the step, without a bound of the latent.
SpanLevels levels_before(const StepContext& o, const StepSegment& s, int64_t scale) {
  const Grid grid = make_grid(s.scale[scale], o.level_factor, o.levels);
  return {grid, grid, std::numeric_limits<float>::infinity()};
}

float latent_limit(const StepContext& o, const StepSegment& s, int64_t bound) {
  return static_cast<float>(o.hyper.bound) * s.latent_bound[bound];
}

// Calls visit(begin, end, levels) for every run of elements that share a scale and, with a latent, a bound.
template <bool Latent, class Visit>
void for_each_span(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                   const Visit& visit) {
  while (begin < end) {
    const int64_t row = begin / s.row;
    const int64_t group = (begin - row * s.row) / s.group;
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

// Calls visit(begin, end, object) for every run of elements that one object of the rule serves.
template <class Row, class Visit>
void for_each_object(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                     const Visit& visit) {
  const auto& constants = *std::get_if<static_cast<size_t>(Row::kRule)>(&o.constants);
  Row::visit_object(constants, o.param_dtype == Dtype::kFloat32, [&](auto type) {
    using R = typename decltype(type)::type;
    if constexpr (Row::kQuantised) {
      for_each_span<R::kLatent>(o, s, begin, end, [&](int64_t a, int64_t b, const SpanLevels& levels) {
        visit(a, b, Row::template object<R>(constants, levels));
      });
    } else {
      visit(begin, end, Row::template object<R>(constants, {}));
    }
  });
}

template <class Visit>
void visit_direction(const StepContext& o, double step, const Visit& visit) {
  if (o.base == Base::kAdam) return visit(make_adam_direction(o.hyper, step));
  if (o.has_momentum) return visit(MomentumDirection{static_cast<float>(o.hyper.momentum), o.nesterov});
  visit(PlainDirection{});
}

template <bool Binary>
void step_piece_of(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end) {
  visit_rule<Binary>(o.rule, [&](auto row) {
    visit_direction(o, s.step, [&](const auto& direction) {
      for_each_object<decltype(row)>(o, s, begin, end, [&](int64_t a, int64_t b, const auto& rule) {
        step_range(o, s, a, b, direction, rule);
      });
    });
  });
}

// The same of a range that shares a scale.
template <class Direction, class R>
double magnitude_of_range(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                          const Direction& direction, const R& rule) {
  const bool at_once = all_float<Direction>(o) && o.exp_avg_sq_dtype == Dtype::kFloat32;
  const int64_t length = at_once ? end - begin : kStage;
  double total = 0.0;
  Stage stage;
  alignas(64) float wide[kStage];
  for (int64_t at = begin; at < end; at += length) {
    const int64_t n = std::min(length, end - at);
    float* const v = Direction::kExpAvgSq ? read_exp_avg_sq(o, s, at, n, wide) : nullptr;
    const auto span = all_float<Direction>(o) ? float_span(s, v, at)
                                              : fill_stage(o, s, v, stage, at, n, true, R::kReadsWeight);
    total += magnitude_of_span(span, n, o.gradient_factor, direction, rule);
  }
  return total;
}

template <bool Binary>
double magnitude_of_piece_of(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end) {
  double total = 0.0;
  visit_rule<Binary>(o.rule, [&](auto row) {
    if constexpr (decltype(row)::kDynamicScale) {
      visit_direction(o, s.step, [&](const auto& direction) {
        for_each_object<decltype(row)>(o, s, begin, end, [&](int64_t a, int64_t b, const auto& rule) {
          total += magnitude_of_range(o, s, a, b, direction, rule);
        });
      });
    }
  });
  return total;
}

// A group of at most kKept elements; returns its scale.
template <class Direction, class R, class MakeRule>
QUANTOPT_INLINE float step_group_with(const StepContext& o, const StepSegment& s, float* exp_avg_sq,
                                      int64_t begin, int64_t n, const Direction& direction, const R& old_rule,
                                      const MakeRule& make_rule) {
  const float factor = o.gradient_factor;
  if (all_float<Direction>(o)) {
    return step_group(float_span(s, exp_avg_sq, begin), n, factor, direction, old_rule, make_rule,
                      Writing{o.stream}, o.prefetch);
  }
  if (o.param_dtype == Dtype::kBFloat16) {
    return step_group(bfloat16_span(o, s, exp_avg_sq, begin), n, factor, direction, old_rule, make_rule,
                      Writing{o.stream}, o.prefetch);
  }
  Stage stage;
  const auto span = fill_stage(o, s, exp_avg_sq, stage, begin, n, true, R::kReadsWeight);
  const float scale = step_group(span, n, factor, direction, old_rule, make_rule, Writing{}, false);
  if (s.momentum != nullptr) write_from_float(o.momentum_dtype, stage.momentum, s.momentum, begin, n);
  write_from_float(o.param_dtype, span.param, s.param, begin, n);
  return scale;
}

template <class Direction, class R, class MakeRule>
QUANTOPT_INLINE float step_group_of(const StepContext& o, const StepSegment& s, int64_t begin, int64_t n,
                                    const Direction& direction, const R& old_rule,
                                    const MakeRule& make_rule) {
  alignas(64) float wide[Direction::kExpAvgSq ? kKept : 1];
  float* const exp_avg_sq = Direction::kExpAvgSq ? read_exp_avg_sq(o, s, begin, n, wide) : nullptr;
  const float scale = step_group_with(o, s, exp_avg_sq, begin, n, direction, old_rule, make_rule);
  if (Direction::kExpAvgSq) write_exp_avg_sq(o, s, begin, n, wide);
  return scale;
}

// Whether all is stepped where it is, kAtOnce groups at a time.
template <class Direction>
bool at_once(const StepContext& o, const StepSegment& s) {
  const bool in_place = all_float<Direction>(o) || o.param_dtype == Dtype::kBFloat16;
  const bool moments = !Direction::kExpAvgSq || o.exp_avg_sq_dtype == Dtype::kFloat32;
  return in_place && moments && s.group % kPair == 0 && s.group * kAtOnce <= kKept;
}

template <class Direction, class R, class MakeRule>
void step_groups_with(const StepContext& o, const StepSegment& s, int64_t begin, const Direction& direction,
                      const R* before, const MakeRule& make_rule, float* scales) {
  float* const v = Direction::kExpAvgSq ? static_cast<float*>(s.exp_avg_sq) + begin : nullptr;
  const auto step = [&](const auto& span) {
    step_groups_at_once(span, s.group, o.gradient_factor, direction, before, make_rule, Writing{o.stream},
                        o.prefetch, scales);
  };
  all_float<Direction>(o) ? step(float_span(s, v, begin)) : step(bfloat16_span(o, s, v, begin));
}

// Calls visit(begin, end, index of the scale) for every group of [begin, end), which are whole ones; first
// many(begin, index) for kAtOnce of them at a time, as long as a row has so many that are not cut off.
template <class Many, class Visit>
QUANTOPT_INLINE void for_each_group(const StepSegment& s, int64_t begin, int64_t end, bool at_once,
                                    const Many& many, const Visit& visit) {
  const int64_t row = begin / s.row;
  int64_t at = row * s.scales_per_row + (begin - row * s.row) / s.group;
  int64_t row_end = (row + 1) * s.row;
  while (begin < end) {
    const int64_t there = std::min(end, row_end);
    for (; at_once && begin + kAtOnce * s.group <= there; begin += kAtOnce * s.group, at += kAtOnce)
      many(begin, at);
    for (; begin < there; begin = std::min(begin + s.group, there))
      visit(begin, std::min(begin + s.group, there), at++);
    row_end += s.row;
  }
}

template <bool Binary>
void step_groups_of(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end) {
  const bool kept =
      s.group <= kKept && (s.latent_bound == nullptr || s.bound_row == 0 || s.bound_row >= s.row);
  if (!kept) {
    return for_each_group(
        s, begin, end, false, [](auto...) {},
        [&](int64_t a, int64_t b, int64_t at) {
          const double sum = magnitude_of_piece_of<Binary>(o, s, a, b);
          s.next_scale[at] = static_cast<float>(sum / static_cast<double>(b - a));
          step_piece_of<Binary>(o, s, a, b);
          s.scale[at] = s.next_scale[at];
        });
  }
  visit_rule<Binary>(o.rule, [&](auto row) {
    using Row = decltype(row);
    if constexpr (Row::kDynamicScale) {
      const auto& constants = *std::get_if<static_cast<size_t>(Row::kRule)>(&o.constants);
      visit_direction(o, s.step, [&](const auto& direction) {
        Row::visit_object(constants, o.param_dtype == Dtype::kFloat32, [&](auto type) {
          using R = typename decltype(type)::type;
          const auto levels_of = [&](int64_t a, int64_t at) {
            SpanLevels levels = levels_before(o, s, at);
            if (s.latent_bound != nullptr)
              levels.latent_limit = latent_limit(o, s, s.bound_row == 0 ? at : a / s.bound_row);
            return levels;
          };
          const auto after = [&](SpanLevels levels, float scale) {
            levels.grid = make_grid(scale, o.level_factor, o.levels);
            return Row::template object<R>(constants, levels);
          };
          const auto many = [&](int64_t a, int64_t at) {
            SpanLevels levels[kAtOnce];
            R old_rules[kAtOnce];
            for (int64_t k = 0; k < kAtOnce; ++k) {
              levels[k] = levels_of(a + k * s.group, at + k);
              old_rules[k] = Row::template object<R>(constants, levels[k]);
            }
            const auto make_rule = [&](int64_t k, float scale) { return after(levels[k], scale); };
            step_groups_with(o, s, a, direction, old_rules, make_rule, s.scale + at);
          };
          const auto one = [&](int64_t a, int64_t b, int64_t at) {
            const SpanLevels levels = levels_of(a, at);
            const R old_rule = Row::template object<R>(constants, levels);
            const auto make_rule = [&](float scale) { return after(levels, scale); };
            s.scale[at] = step_group_of(o, s, a, b - a, direction, old_rule, make_rule);
          };
          using Direction = std::decay_t<decltype(direction)>;
          for_each_group(s, begin, end, at_once<Direction>(o, s), many, one);
        });
      });
    }
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

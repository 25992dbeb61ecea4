// clang-format off: the vectors come before the rules, which are written in them
#include "cpu/kernels/vec.h"
#include "cpu/kernels/step.h"
// clang-format on

#include <algorithm>
#include <limits>
#include <type_traits>

namespace quantopt::QUANTOPT_ISA {
namespace {

constexpr int64_t kBlock = 128;        // elements between two rounds of prefetches
constexpr int64_t kAheadBytes = 2048;  // distance of a prefetch
constexpr int64_t kStage = 512;        // elements converted at a time for 16-bit types; a multiple of kBlock
constexpr int64_t kRandomBlock = 512;  // elements whose random bits are made together

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
    const auto carry =
        (VecBits)(low < static_cast<uint32_t>(block));  // all ones, -1, where the low word wrapped
    VecBits words[4];
    philox(key, low, static_cast<uint32_t>(block >> 32) - carry, words);
    transpose_quads(words);
    std::memcpy(out + 8 * b, words, sizeof(words));
  }
}

// ---- one span: elements that share a scale

// Pointers of a span, already advanced to its first element. P and M are float, or both BFloat16.
template <class P, class M>
struct Span {
  P* param;
  const P* grad;
  M* momentum;
  float* exp_avg_sq;
  float* latent;
};

template <class T>
inline void prefetch_block(const T* p) {
  const char* line = reinterpret_cast<const char*>(p) + kAheadBytes;
  for (size_t offset = 0; offset < kBlock * sizeof(T); offset += 64) __builtin_prefetch(line + offset);
}

// The first `count` elements of a vector, the rest zero.
template <class T>
inline __attribute__((always_inline)) Vec load_some(const T* p, int64_t count) {
  T part[kWidth] = {};
  std::memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}

// How the weights of a span are written.
struct Writing {
  bool stream = false;             // past the caches
  const PhiloxKey* key = nullptr;  // rounded stochastically
};

// One vector of elements from i: the whole of the fused step.
template <class P, class M, class Direction, class R>
inline __attribute__((always_inline)) void step_vector(const Span<P, M>& s, int64_t i, float factor,
                                                       const Direction& direction, const R& rule,
                                                       const Writing& writing,
                                                       const uint16_t* random = nullptr) {
  const Vec w = R::kLatent ? load(s.latent + i) : load(s.param + i);
  Vec m{}, v{};
  if constexpr (Direction::kMomentum) m = load(s.momentum + i);
  if constexpr (Direction::kExpAvgSq) v = load(s.exp_avg_sq + i);
  Vec g = load(s.grad + i);
  if (factor != 1.0f) g *= factor;
  g = rule.gradient(g, w);
  const Vec d = direction(g, m, v);
  const Vec before = R::kReadsWeight ? load(s.param + i) : Vec{};
  const Vec next = rule.step(w, d, before);
  if constexpr (Direction::kMomentum) store(s.momentum + i, m);
  if constexpr (Direction::kExpAvgSq) store(s.exp_avg_sq + i, v);
  if constexpr (R::kLatent) {
    store(s.latent + i, next);
    const Vec weight = rule.weight(next, before);
    if constexpr (std::is_same_v<P, float> && !R::kReadsWeight) {
      if (writing.stream) return store_past_caches(s.param + i, weight);
    }
    store(s.param + i, weight);
  } else if (sizeof(P) == 2 && random != nullptr) {
    const VecBits bits = (VecBits)next, halves = load_halves(random + i);
    const bool large = any_at_least(bits & 0x7FFFFFFFu, kBFloat16Top);
    store_halves(s.param + i,
                 large ? bfloat16_stochastic(bits, halves) : bfloat16_stochastic_finite(bits, halves));
  } else {
    store(s.param + i, next);
  }
}

// The last elements of a span, in a padded copy.
template <class P, class M, class Direction, class R>
void step_tail(const Span<P, M>& s, int64_t i, int64_t count, float factor, const Direction& direction,
               const R& rule, const Writing& writing, const uint16_t* random = nullptr) {
  P param[kWidth] = {}, grad[kWidth] = {};
  M momentum[kWidth] = {};
  float exp_avg_sq[kWidth] = {}, latent[kWidth] = {};
  uint16_t halves[kWidth] = {};
  const auto in = [count, i](auto* to, const auto* from) {
    if (from) std::memcpy(to, from + i, static_cast<size_t>(count) * sizeof(*to));
  };
  const auto out = [count, i](auto* to, const auto* from) {
    if (to) std::memcpy(to + i, from, static_cast<size_t>(count) * sizeof(*from));
  };
  in(param, s.param);
  in(grad, s.grad);
  in(momentum, s.momentum);
  in(exp_avg_sq, s.exp_avg_sq);
  in(latent, s.latent);
  in(halves, random);
  const Span<P, M> padded{param, grad, momentum, exp_avg_sq, latent};
  step_vector(padded, 0, factor, direction, rule, Writing{}, random ? halves : nullptr);
  out(s.param, param);
  out(s.momentum, momentum);
  out(s.exp_avg_sq, exp_avg_sq);
  out(s.latent, latent);
}

// Steps the first n elements of a span; `first` is the number of its first element in its tensor.
template <class P, class M, class Direction, class R>
void step_span(const Span<P, M>& span_in, int64_t n, float factor, const Direction& direction_in,
               const R& rule_in, const Writing& writing_in, bool prefetch = false, int64_t first = 0) {
  const Span<P, M> span = span_in;  // local copies, so that the compiler keeps the constants in registers
  const Direction direction = direction_in;
  const R rule = rule_in;
  Writing writing = writing_in;
  writing.stream = writing.stream && reinterpret_cast<uintptr_t>(span.param) % sizeof(Vec) == 0;
  int64_t begin = 0;
  if constexpr (sizeof(P) == 2) {
    if (writing.key != nullptr) {
      uint16_t halves[kRandomBlock];
      while (begin < n) {
        const int64_t lead = (first + begin) % 8;
        const int64_t end = std::min(n, begin + kRandomBlock - lead);
        random_halves(*writing.key, first + begin - lead, halves);
        const uint16_t* random = halves + lead - begin;
        for (; begin + kWidth <= end; begin += kWidth)
          step_vector(span, begin, factor, direction, rule, writing, random);
        if (begin < end) step_tail(span, begin, end - begin, factor, direction, rule, writing, random);
        begin = end;
      }
      return;
    }
  }
  for (; begin + kBlock <= n; begin += kBlock) {
    if (prefetch) {
      if constexpr (!R::kLatent || R::kReadsWeight) prefetch_block(span.param + begin);
      if constexpr (R::kLatent) prefetch_block(span.latent + begin);
      prefetch_block(span.grad + begin);
      if constexpr (Direction::kMomentum) prefetch_block(span.momentum + begin);
      if constexpr (Direction::kExpAvgSq) prefetch_block(span.exp_avg_sq + begin);
    }
    for (int64_t i = begin; i < begin + kBlock; i += kWidth) {
      step_vector(span, i, factor, direction, rule, writing);
    }
  }
  writing.stream = false;
  for (; begin + kWidth <= n; begin += kWidth) step_vector(span, begin, factor, direction, rule, writing);
  if (begin < n) step_tail(span, begin, n - begin, factor, direction, rule, writing);
}

// Sum of |rule.point| in an order that depends on n alone: 16 lanes, carried over to double.
template <class Direction, class R>
double magnitude_of_span(const Span<float, float>& s, int64_t n, float factor, const Direction& direction,
                         const R& rule) {
  constexpr int64_t kLanes = 16, kCarry = 1024;
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kCarry) {
    const int64_t stop = std::min(n, start + kCarry);
    Vec sums[kLanes / kWidth] = {};
    for (int64_t i = start; i < stop; i += kLanes) {
      for (int k = 0; k < kLanes / kWidth; ++k) {
        const int64_t at = i + k * kWidth;
        const int64_t count = std::min<int64_t>(kWidth, stop - at);
        if (count <= 0) break;
        const auto read = [&](const float* p) {
          return count == kWidth ? load(p + at) : load_some(p + at, count);
        };
        Vec m{}, v{};
        if constexpr (Direction::kMomentum) m = read(s.momentum);
        if constexpr (Direction::kExpAvgSq) v = read(s.exp_avg_sq);
        const Vec w = read(s.latent);
        const Vec g = rule.gradient(read(s.grad) * factor, w);
        const Vec before = R::kReadsWeight ? read(s.param) : Vec{};
        Vec size = absolute(rule.point(w, direction(g, m, v), before));
        for (int64_t lane = count; lane < kWidth; ++lane) size[lane] = 0.0f;
        sums[k] += size;
      }
    }
    for (const Vec& part : sums) {
      for (int lane = 0; lane < kWidth; ++lane) total += part[lane];
    }
  }
  return total;
}

// ---- 16-bit types, a stage at a time

template <class T>
void widen(const void* from, int64_t at, float* to, int64_t n) {
  const T* source = static_cast<const T*>(from) + at;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(source + i));
  if (i == n) return;
  const Vec rest = load_some(source + i, n - i);
  std::memcpy(to + i, &rest, static_cast<size_t>(n - i) * sizeof(float));
}

template <class T>
void narrow(const float* from, void* to, int64_t at, int64_t n) {
  T* target = static_cast<T*>(to) + at;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(target + i, load(from + i));
  if (i == n) return;
  T rest[kWidth];
  store(rest, load_some(from + i, n - i));
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

// bfloat16 momentum, or fp32 with bfloat16 parameters: everything that is not float is converted to float
// arrays that stay in the first cache. The float kernel then does the work. Weights and latents that stay as
// they are, are stepped there too.
struct Stage {
  alignas(64) float param[kStage];
  alignas(64) float grad[kStage];
  alignas(64) float momentum[kStage];
  alignas(64) float latent[kStage];
};

Span<float, float> fill_stage(const StepContext& o, const StepSegment& s, Stage& stage, int64_t at, int64_t n,
                              bool latent_rule, bool reads_weight) {
  Span<float, float> span{};
  read_as_float(o.param_dtype, s.grad, at, stage.grad, n);
  span.grad = stage.grad;
  if (s.momentum != nullptr) {
    read_as_float(o.momentum_dtype, s.momentum, at, stage.momentum, n);
    span.momentum = stage.momentum;
  }
  if (s.exp_avg_sq != nullptr) span.exp_avg_sq = s.exp_avg_sq + at;
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
void step_staged(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                 const Direction& direction, const R& rule) {
  Stage stage;
  for (int64_t at = begin; at < end; at += kStage) {
    const int64_t n = std::min(kStage, end - at);
    const auto span = fill_stage(o, s, stage, at, n, R::kLatent, R::kReadsWeight);
    step_span<float, float>(span, n, o.gradient_factor, direction, rule, Writing{});
    if (s.momentum != nullptr) write_from_float(o.momentum_dtype, stage.momentum, s.momentum, at, n);
    if (!o.frozen) write_from_float(o.param_dtype, span.param, s.param, at, n);
  }
}

// ---- choosing the instantiation

template <class Direction, class R>
void step_range(const StepContext& o, const StepSegment& s, int64_t begin, int64_t end,
                const Direction& direction, const R& rule) {
  const bool float_momentum = !Direction::kMomentum || o.momentum_dtype == Dtype::kFloat32;
  const int64_t n = end - begin;
  if (o.frozen) return step_staged(o, s, begin, end, direction, rule);
  if (o.param_dtype == Dtype::kFloat32 && float_momentum) {
    const Span<float, float> span{
        static_cast<float*>(s.param) + begin, static_cast<const float*>(s.grad) + begin,
        static_cast<float*>(s.momentum) + (s.momentum ? begin : 0), s.exp_avg_sq + (s.exp_avg_sq ? begin : 0),
        s.latent + (s.latent ? begin : 0)};
    return step_span(span, n, o.gradient_factor, direction, rule, Writing{o.stream}, o.prefetch);
  }
  if constexpr (!R::kLatent) {
    const bool bfloat_momentum = !Direction::kMomentum || o.momentum_dtype == Dtype::kBFloat16;
    if (o.param_dtype == Dtype::kBFloat16 && s.latent == nullptr &&
        (bfloat_momentum || o.stochastic_rounding)) {
      PhiloxKey key = o.key;
      key.tensor = s.index;
      key.step = static_cast<uint32_t>(s.step);
      const auto run = [&](auto* momentum) {
        using M = std::remove_pointer_t<decltype(momentum)>;
        const Span<BFloat16, M> span{
            static_cast<BFloat16*>(s.param) + begin, static_cast<const BFloat16*>(s.grad) + begin,
            momentum + (momentum ? begin : 0), s.exp_avg_sq + (s.exp_avg_sq ? begin : 0), nullptr};
        const Writing writing{false, o.stochastic_rounding ? &key : nullptr};
        step_span(span, n, o.gradient_factor, direction, rule, writing, o.prefetch, begin);
      };
      return bfloat_momentum ? run(static_cast<BFloat16*>(s.momentum)) : run(static_cast<float*>(s.momentum));
    }
  }
  step_staged(o, s, begin, end, direction, rule);
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
    SpanLevels levels{make_grid(s.next_scale[at], o.level_factor, o.levels),
                      make_grid(s.scale[at], o.level_factor, o.levels),
                      std::numeric_limits<float>::infinity()};
    if (Latent && s.latent_bound != nullptr) {
      const int64_t bound = s.bound_row == 0 ? at : begin / s.bound_row;
      if (s.bound_row != 0) stop = std::min(stop, (bound + 1) * s.bound_row);
      levels.latent_limit = static_cast<float>(o.hyper.bound) * s.latent_bound[bound];
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
  if (o.param_dtype == Dtype::kFloat32 && (!Direction::kMomentum || o.momentum_dtype == Dtype::kFloat32)) {
    const Span<float, float> span{static_cast<float*>(s.param) + begin,
                                  static_cast<const float*>(s.grad) + begin,
                                  static_cast<float*>(s.momentum) + (s.momentum ? begin : 0),
                                  s.exp_avg_sq + (s.exp_avg_sq ? begin : 0), s.latent + begin};
    return magnitude_of_span(span, end - begin, o.gradient_factor, direction, rule);
  }
  double total = 0.0;
  Stage stage;
  for (int64_t at = begin; at < end; at += kStage) {
    const int64_t n = std::min(kStage, end - at);
    const auto span = fill_stage(o, s, stage, at, n, true, R::kReadsWeight);
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

}  // namespace

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

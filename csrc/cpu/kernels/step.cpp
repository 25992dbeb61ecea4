// clang-format off: the vectors come before what is written in them
#include "cpu/kernels/pair.h"
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

// ---- one span: elements that share a scale

// Momentum beside bfloat16 weights, of either type.
struct Momentum {
  void* data;
  bool narrow;
};
QUANTOPT_INLINE Pair load_momentum(const Momentum& m, int64_t i) {
  if (m.narrow) return load_pair(static_cast<const BFloat16*>(m.data) + i);
  return load_pair(static_cast<const float*>(m.data) + i);
}
QUANTOPT_INLINE void store_momentum(const Momentum& m, int64_t i, Pair x) {
  m.narrow ? store_pair(static_cast<BFloat16*>(m.data) + i, x)
           : store_pair(static_cast<float*>(m.data) + i, x);
}
QUANTOPT_INLINE Pair load_momentum(const float* m, int64_t i) { return load_pair(m + i); }
QUANTOPT_INLINE void store_momentum(float* m, int64_t i, Pair x) { store_pair(m + i, x); }

// Pointers of a span, already advanced to its first element. P is float or BFloat16.
template <class P>
struct Span {
  P* param;
  const P* grad;
  std::conditional_t<std::is_same_v<P, float>, float*, Momentum> momentum;
  float* exp_avg_sq;
  float* latent;  // of the rule, or master weights of bfloat16; else null
};

// How the weights of a span are written.
struct Writing {
  bool stream = false;             // past the caches, where they are not read
  const PhiloxKey* key = nullptr;  // rounded stochastically
};

// One pair of vectors of elements from i: the whole of the fused step.
template <class P, class Direction, class R>
QUANTOPT_INLINE void step_pair(const Span<P>& s, int64_t i, float factor, const Direction& direction,
                               const R& rule, const Writing& writing, const uint16_t* random = nullptr) {
  const bool master = !R::kLatent && !std::is_same_v<P, float> && s.latent != nullptr;
  Pair w;
  if (R::kLatent || master) {
    w = load_pair(s.latent + i);
  } else {
    w = load_pair(s.param + i);
  }
  Pair m{}, v{};
  if constexpr (Direction::kMomentum) m = load_momentum(s.momentum, i);
  if constexpr (Direction::kExpAvgSq) v = load_pair(s.exp_avg_sq + i);
  const Pair before = R::kReadsWeight ? load_pair(s.param + i) : Pair{};
  Pair g = load_pair(s.grad + i);
  if (factor != 1.0f) g = g * factor;
  g = rule.gradient(g, w);
  const Pair d = direction(g, m, v);
  const Pair next = rule.step(w, d, before);
  Pair weight = next;
  if constexpr (R::kLatent) weight = rule.weight(next, before);
  if constexpr (Direction::kMomentum) store_momentum(s.momentum, i, m);
  if constexpr (Direction::kExpAvgSq) store_pair(s.exp_avg_sq + i, v);
  if (R::kLatent || master) store_pair(s.latent + i, next);
  if constexpr (!std::is_same_v<P, float> && !R::kLatent) {
    if (random != nullptr) return store_line(s.param + i, rounded_stochastically(weight, random + i));
  }
  if constexpr (R::kLatent ? !R::kReadsWeight : !std::is_same_v<P, float>) {
    if (writing.stream && (R::kLatent || master)) return stream_pair(s.param + i, weight);
  }
  store_pair(s.param + i, weight);
}

// The last elements of a span, in a padded copy.
template <class P, class Direction, class R>
void step_tail(const Span<P>& s, int64_t i, int64_t count, float factor, const Direction& direction,
               const R& rule, const uint16_t* random = nullptr) {
  P param[kPair] = {}, grad[kPair] = {};
  float momentum[kPair] = {}, exp_avg_sq[kPair] = {}, latent[kPair] = {};
  uint16_t halves[kPair] = {};
  const auto in = [count, i](auto* to, const auto* from) {
    if (from) std::memcpy(to, from + i, static_cast<size_t>(count) * sizeof(*to));
  };
  const auto out = [count, i](auto* to, const auto* from) {
    if (to) std::memcpy(to + i, from, static_cast<size_t>(count) * sizeof(*from));
  };
  // calls visit(its array in s, in the padded copy)
  const auto with_momentum = [&](const auto& visit) {
    if constexpr (std::is_same_v<P, float>) {
      visit(s.momentum, momentum);
    } else if (s.momentum.narrow) {
      visit(static_cast<BFloat16*>(s.momentum.data), reinterpret_cast<BFloat16*>(momentum));
    } else {
      visit(static_cast<float*>(s.momentum.data), momentum);
    }
  };
  in(param, s.param);
  in(grad, s.grad);
  with_momentum([&](auto* from, auto* to) { in(to, from); });
  in(exp_avg_sq, s.exp_avg_sq);
  in(latent, s.latent);
  in(halves, random);
  Span<P> padded{param, grad, {}, exp_avg_sq, s.latent ? latent : nullptr};
  if constexpr (std::is_same_v<P, float>) {
    padded.momentum = momentum;
  } else {
    padded.momentum = {momentum, s.momentum.narrow};
  }
  step_pair(padded, 0, factor, direction, rule, Writing{}, random ? halves : nullptr);
  out(s.param, param);
  with_momentum([&](auto* to, auto* from) { out(to, from); });
  out(s.exp_avg_sq, exp_avg_sq);
  out(s.latent, latent);
}

// Always inlined: of a call that does nothing but prefetch, gcc 12 thinks that it does nothing.
template <class T>
QUANTOPT_INLINE void prefetch_block(const T* p) {
  const char* line = reinterpret_cast<const char*>(p) + kAheadBytes;
  for (size_t offset = 0; offset < kBlock * sizeof(T); offset += 64) __builtin_prefetch(line + offset);
}

template <class P, class Direction, class R>
QUANTOPT_INLINE void prefetch_span(const Span<P>& span, int64_t at) {
  const bool master = !R::kLatent && span.latent != nullptr;
  if (R::kLatent ? R::kReadsWeight : !master) prefetch_block(span.param + at);
  if (R::kLatent || master) prefetch_block(span.latent + at);
  prefetch_block(span.grad + at);
  if constexpr (Direction::kMomentum) {
    if constexpr (std::is_same_v<P, float>) {
      prefetch_block(span.momentum + at);
    } else if (span.momentum.narrow) {
      prefetch_block(static_cast<const BFloat16*>(span.momentum.data) + at);
    } else {
      prefetch_block(static_cast<const float*>(span.momentum.data) + at);
    }
  }
  if constexpr (Direction::kExpAvgSq) prefetch_block(span.exp_avg_sq + at);
}

// Steps the first n elements of a span; `first` is the number of its first element in its tensor.
template <class P, class Direction, class R>
void step_span(const Span<P>& span_in, int64_t n, float factor, const Direction& direction_in,
               const R& rule_in, const Writing& writing_in, bool prefetch = false, int64_t first = 0) {
  const Span<P> span = span_in;  // local copies, so that the compiler keeps the constants in registers
  const Direction direction = direction_in;
  const R rule = rule_in;
  Writing writing = writing_in;
  writing.stream = writing.stream && reinterpret_cast<uintptr_t>(span.param) % sizeof(Vec) == 0;
  int64_t begin = 0;
  if constexpr (!std::is_same_v<P, float> && !R::kLatent) {
    if (writing.key != nullptr) {
      uint16_t halves[kRandomBlock];
      while (begin < n) {
        const int64_t lead = (first + begin) % 8;
        const int64_t end = std::min(n, begin + kRandomBlock - lead);
        if (prefetch) prefetch_span<P, Direction, R>(span, begin);
        random_halves(*writing.key, first + begin - lead, halves);
        const uint16_t* random = halves + lead - begin;
        for (; begin + kPair <= end; begin += kPair)
          step_pair(span, begin, factor, direction, rule, writing, random);
        if (begin < end) step_tail(span, begin, end - begin, factor, direction, rule, random);
        begin = end;
      }
      return;
    }
  }
  for (; begin + kBlock <= n; begin += kBlock) {
    if (prefetch) prefetch_span<P, Direction, R>(span, begin);
    for (int64_t i = begin; i < begin + kBlock; i += kPair)
      step_pair(span, i, factor, direction, rule, writing);
  }
  for (; begin + kPair <= n; begin += kPair) step_pair(span, begin, factor, direction, rule, writing);
  if (begin < n) step_tail(span, begin, n - begin, factor, direction, rule);
}

// Sum of |rule.point| in an order that depends on n alone: 16 lanes, carried over to double.
template <class Direction, class R>
double magnitude_of_span(const Span<float>& s, int64_t n, float factor, const Direction& direction,
                         const R& rule) {
  constexpr int64_t kLanes = 16, kCarry = 1024, kSums = kLanes / kWidth;
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kCarry) {
    const int64_t stop = std::min(n, start + kCarry);
    Vec sums[kSums] = {};
    for (int64_t at = start; at < stop; at += kPair) {
      const int64_t count = std::min<int64_t>(kPair, stop - at);
      const auto read = [&](const float* p) {
        return count == kPair ? load_pair(p + at) : load_some(p + at, count);
      };
      Pair m{}, v{};
      if constexpr (Direction::kMomentum) m = read(s.momentum);
      if constexpr (Direction::kExpAvgSq) v = read(s.exp_avg_sq);
      const Pair w = read(s.latent);
      const Pair g = rule.gradient(read(s.grad) * factor, w);
      const Pair before = R::kReadsWeight ? read(s.param) : Pair{};
      Pair size = absolute(rule.point(w, direction(g, m, v), before));
      if (count < kPair) {
        float lanes[kPair] = {};
        std::memcpy(lanes, &size, static_cast<size_t>(count) * sizeof(float));
        size = load_pair(lanes);
      }
      const int64_t k = (at - start) / kWidth;
      sums[k % kSums] += size.first;
      sums[(k + 1) % kSums] += size.second;
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

// float16, or bfloat16 momentum of float weights: everything that is not float is converted to float arrays
// that stay in the first cache. The float kernel then does the work. Weights and latents that stay as they
// are, are stepped there too, of all types.
struct Stage {
  alignas(64) float param[kStage];
  alignas(64) float grad[kStage];
  alignas(64) float momentum[kStage];
  alignas(64) float latent[kStage];
};

Span<float> fill_stage(const StepContext& o, const StepSegment& s, Stage& stage, int64_t at, int64_t n,
                       bool latent_rule, bool reads_weight) {
  Span<float> span{};
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
    step_span(span, n, o.gradient_factor, direction, rule, Writing{});
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
    const Span<float> span{static_cast<float*>(s.param) + begin, static_cast<const float*>(s.grad) + begin,
                           static_cast<float*>(s.momentum) + (s.momentum ? begin : 0),
                           s.exp_avg_sq + (s.exp_avg_sq ? begin : 0), s.latent + (s.latent ? begin : 0)};
    return step_span(span, n, o.gradient_factor, direction, rule, Writing{o.stream}, o.prefetch);
  }
  if (o.param_dtype == Dtype::kBFloat16) {
    PhiloxKey key = o.key;
    key.tensor = s.index;
    key.step = static_cast<uint32_t>(s.step);
    const bool narrow = o.momentum_dtype == Dtype::kBFloat16;
    const int64_t bytes = narrow ? sizeof(BFloat16) : sizeof(float);
    const Span<BFloat16> span{static_cast<BFloat16*>(s.param) + begin,
                              static_cast<const BFloat16*>(s.grad) + begin,
                              {static_cast<char*>(s.momentum) + (s.momentum ? begin * bytes : 0), narrow},
                              s.exp_avg_sq + (s.exp_avg_sq ? begin : 0),
                              s.latent + (s.latent ? begin : 0)};
    const bool stochastic = o.stochastic_rounding && s.latent == nullptr;
    const Writing writing{o.stream, stochastic ? &key : nullptr};
    return step_span(span, n, o.gradient_factor, direction, rule, writing, o.prefetch, begin);
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
    const Span<float> span{static_cast<float*>(s.param) + begin, static_cast<const float*>(s.grad) + begin,
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

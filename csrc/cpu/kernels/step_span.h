// A span: elements that share a scale, stepped a pair of vectors at a time. Included once for every
// instruction set.
#pragma once

// clang-format off: the vectors come before what is written in them
#include "cpu/kernels/pair.h"
#include "cpu/kernels/step.h"
// clang-format on

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace quantopt::QUANTOPT_ISA {
namespace {

constexpr int64_t kBlock = 128;        // elements between two rounds of prefetches
constexpr int64_t kAheadBytes = 2048;  // distance of a prefetch
constexpr int64_t kStage = 512;        // elements converted at a time for 16-bit types; a multiple of kBlock
constexpr int64_t kKept = kStage;      // of groups whose directions are kept until their scales are known
constexpr int64_t kShort = 64;         // elements of groups whose sums are carried side by side
constexpr int64_t kAtOnce = 4;         // so many of them, at most

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

// SGD, with momentum or without, and a given direction, in one instantiation. Without, m is 0 and beta -0, as
// -0 * 0 + g is g, also where that is a zero.
struct SgdDirection : MomentumDirection {
  bool kept;

  SgdDirection(bool has_momentum, float momentum, bool with_nesterov)
      : MomentumDirection{has_momentum ? momentum : -0.0f, has_momentum && with_nesterov},
        kept(has_momentum) {}
};
QUANTOPT_INLINE bool has_momentum(const SgdDirection& direction) { return direction.kept; }
QUANTOPT_INLINE bool has_momentum(const AdamDirection&) { return true; }

// Pointers of a span, already advanced to its first element. P is float or BFloat16.
template <class P>
struct Span {
  P* param;
  const P* grad;
  std::conditional_t<std::is_same_v<P, float>, float*, Momentum> momentum;
  float* exp_avg_sq;
  float* latent;  // of the rule; of bfloat16 master weights, or a chunk that is rounded after it; else null
};

// How the weights of a span are written.
enum class Writing : uint8_t {
  kStored,
  kStreamed,  // past the caches, where they are not read
  kNot,       // where a chunk stands in for master weights, and is rounded after the step
};
template <class P>
QUANTOPT_INLINE Writing where_aligned(Writing writing, const P* param) {
  const bool aligned = reinterpret_cast<uintptr_t>(param) % sizeof(Vec) == 0;
  return writing == Writing::kStreamed && !aligned ? Writing::kStored : writing;
}

// Of one pair of vectors of elements from i: what the rule steps, and the direction, whose state is written
// by store_state().
struct Moved {
  Pair w;       // latent, master weights or weights
  Pair before;  // what the network ran with, where the rule reads it
  Pair d, m, v;
};

template <class P, class R>
QUANTOPT_INLINE bool has_master(const Span<P>& s) {
  return !R::kLatent && !std::is_same_v<P, float> && s.latent != nullptr;
}

template <class P, class R>
QUANTOPT_INLINE void load_weights(const Span<P>& s, int64_t i, Moved& x) {
  if (R::kLatent || has_master<P, R>(s)) {
    x.w = load_pair(s.latent + i);
  } else {
    x.w = load_pair(s.param + i);
  }
  x.before = R::kReadsWeight ? load_pair(s.param + i) : Pair{};
}

template <class P, class Direction, class R>
QUANTOPT_INLINE Moved load_moved(const Span<P>& s, int64_t i, float factor, const Direction& direction,
                                 const R& rule) {
  Moved x{};
  load_weights<P, R>(s, i, x);
  if (has_momentum(direction)) x.m = load_momentum(s.momentum, i);
  if constexpr (Direction::kExpAvgSq) x.v = load_pair(s.exp_avg_sq + i);
  Pair g = load_pair(s.grad + i);
  if (factor != 1.0f) g = g * factor;
  x.d = direction(rule.gradient(g, x.w), x.m, x.v);
  return x;
}

template <class Direction, class P>
QUANTOPT_INLINE void store_state(const Span<P>& s, int64_t i, const Direction& direction, const Moved& x) {
  if (has_momentum(direction)) store_momentum(s.momentum, i, x.m);
  if constexpr (Direction::kExpAvgSq) store_pair(s.exp_avg_sq + i, x.v);
}

// The new latent or master weights, and the weights.
struct Stepped {
  Pair next, weight;
};

template <class R>
QUANTOPT_INLINE Stepped stepped(const R& rule, const Moved& x) {
  const Pair next = rule.step(x.w, x.d, x.before);
  if constexpr (R::kLatent) {
    return {next, rule.weight(next, x.before)};
  } else {
    return {next, next};
  }
}

template <class P, class R>
QUANTOPT_INLINE void store_weights(const Span<P>& s, int64_t i, const Stepped& y, Writing writing) {
  const bool master = has_master<P, R>(s);
  if (R::kLatent || master) store_pair(s.latent + i, y.next);
  if constexpr (R::kLatent ? !R::kReadsWeight : !std::is_same_v<P, float>) {
    if (writing == Writing::kStreamed && (R::kLatent || master)) return stream_pair(s.param + i, y.weight);
    if (!R::kLatent && writing == Writing::kNot) return;
  }
  store_pair(s.param + i, y.weight);
}

// The whole of the fused step.
template <class P, class Direction, class R>
QUANTOPT_INLINE void step_pair(const Span<P>& s, int64_t i, float factor, const Direction& direction,
                               const R& rule, Writing writing) {
  const Moved x = load_moved(s, i, factor, direction, rule);
  const Stepped y = stepped(rule, x);
  store_state(s, i, direction, x);
  store_weights<P, R>(s, i, y, writing);
}

// The last elements of a span, fewer than a pair, in a copy that zeros fill up. Not inlined: the same code
// serves every rule.
template <class P>
class Rest {
 public:
  Span<P> span{};

  __attribute__((noinline)) void read(const Span<P>& from, int64_t at, int64_t count) {
    span = {param_, grad_, {}, exp_avg_sq_, from.latent ? latent_ : nullptr};
    in(param_, from.param, at, count);
    in(grad_, from.grad, at, count);
    with_momentum(from, [&](auto* theirs, auto* ours) { in(ours, theirs, at, count); });
    in(exp_avg_sq_, from.exp_avg_sq, at, count);
    in(latent_, from.latent, at, count);
    if constexpr (std::is_same_v<P, float>) {
      span.momentum = momentum_;
    } else {
      span.momentum = {momentum_, from.momentum.narrow};
    }
  }

  __attribute__((noinline)) void write(const Span<P>& to, int64_t at, int64_t count) {
    out(to.param, param_, at, count);
    with_momentum(to, [&](auto* theirs, auto* ours) { out(theirs, ours, at, count); });
    out(to.exp_avg_sq, exp_avg_sq_, at, count);
    out(to.latent, latent_, at, count);
  }

 private:
  template <class T>
  static void in(T* ours, const T* theirs, int64_t at, int64_t count) {
    if (!theirs) return;
    std::memset(ours, 0, kPair * sizeof(T));
    std::memcpy(ours, theirs + at, static_cast<size_t>(count) * sizeof(T));
  }
  template <class T>
  static void out(T* theirs, const T* ours, int64_t at, int64_t count) {
    if (theirs) std::memcpy(theirs + at, ours, static_cast<size_t>(count) * sizeof(T));
  }
  // Calls visit(its array of the span, of the copy).
  template <class Visit>
  void with_momentum(const Span<P>& theirs, const Visit& visit) {
    if constexpr (std::is_same_v<P, float>) {
      visit(theirs.momentum, momentum_);
    } else if (theirs.momentum.narrow) {
      visit(static_cast<BFloat16*>(theirs.momentum.data), reinterpret_cast<BFloat16*>(momentum_));
    } else {
      visit(static_cast<float*>(theirs.momentum.data), momentum_);
    }
  }

  alignas(64) P param_[kPair];
  P grad_[kPair];
  float momentum_[kPair], exp_avg_sq_[kPair], latent_[kPair];
};

// Always inlined: of a call that does nothing but prefetch, gcc 12 thinks that it does nothing.
template <int64_t Count, class T>
QUANTOPT_INLINE void prefetch_from(const T* p) {
  const char* line = reinterpret_cast<const char*>(p) + kAheadBytes;
  for (size_t offset = 0; offset < Count * sizeof(T); offset += 64) __builtin_prefetch(line + offset);
}

// What is read of `Count` elements.
template <int64_t Count, class P, class Direction, class R>
QUANTOPT_INLINE void prefetch_span(const Span<P>& span, int64_t at, Writing writing) {
  // Beside weights that are not written the latent is a chunk of them, in the first cache.
  const bool master = has_master<P, R>(span) && writing != Writing::kNot;
  if (R::kLatent ? R::kReadsWeight : !master) prefetch_from<Count>(span.param + at);
  if (R::kLatent || master) prefetch_from<Count>(span.latent + at);
  prefetch_from<Count>(span.grad + at);
  if constexpr (std::is_same_v<P, float>) {
    if (span.momentum != nullptr) prefetch_from<Count>(span.momentum + at);
  } else if (span.momentum.data != nullptr) {
    if (span.momentum.narrow) {
      prefetch_from<Count>(static_cast<const BFloat16*>(span.momentum.data) + at);
    } else {
      prefetch_from<Count>(static_cast<const float*>(span.momentum.data) + at);
    }
  }
  if constexpr (Direction::kExpAvgSq) prefetch_from<Count>(span.exp_avg_sq + at);
}

// A span from its element `at` on.
template <class P>
QUANTOPT_INLINE Span<P> from_element(const Span<P>& s, int64_t at) {
  Span<P> part{s.param + at, s.grad + at, s.momentum, s.exp_avg_sq ? s.exp_avg_sq + at : nullptr,
               s.latent ? s.latent + at : nullptr};
  if constexpr (std::is_same_v<P, float>) {
    if (s.momentum) part.momentum = s.momentum + at;
  } else if (s.momentum.data) {
    const int64_t bytes = s.momentum.narrow ? sizeof(BFloat16) : sizeof(float);
    part.momentum.data = static_cast<char*>(s.momentum.data) + at * bytes;
  }
  return part;
}

// Reads x here. Otherwise gcc takes a constant out of the outer loops as well, stores it before their calls,
// and loads it again in each round.
template <class T>
QUANTOPT_INLINE const T& read_here(const T& x) {
  const T* p = &x;
  asm("" : "+r"(p));
  return *p;
}

// Steps the first n elements of a span by make_rule(constants). The rule of a pair stands here once, for
// whole blocks and what is left alike: each copy more is compiled for every rule, base and type.
template <class P, class Direction, class Constants, class MakeRule>
QUANTOPT_INLINE void step_span(const Span<P>& span, int64_t n, float factor, const Direction& direction_in,
                               const Constants& constants, const MakeRule& make_rule, Writing writing,
                               bool prefetch) {
  using R = decltype(make_rule(constants));
  const int64_t left = n % kPair, whole = n - left;
  Rest<P> rest;
  Span<P> now = span;
  writing = where_aligned(writing, span.param);
  for (int64_t stop = whole;; stop = kPair) {
    const Direction direction = read_here(direction_in);
    const R rule = make_rule(read_here(constants));
    for (int64_t i = 0; i < stop;) {
      const int64_t end = prefetch ? std::min(stop, i + kBlock) : stop;
      if (prefetch) prefetch_span<kBlock, P, Direction, R>(now, i, writing);
#pragma GCC unroll 1
      for (; i < end; i += kPair) step_pair(now, i, factor, direction, rule, writing);
    }
    if (left == 0 || now.param != span.param) break;
    rest.read(span, whole, left);
    now = rest.span;
    prefetch = false;
    if (writing == Writing::kStreamed) writing = Writing::kStored;
  }
  if (left != 0) rest.write(span, whole, left);
}

// Sum of magnitudes in an order that depends on their number alone: 16 lanes, lane k of elements k, k + 16
// and so on; every kCarry elements the lanes are added up in double, the first first.
class MagnitudeSum {
 public:
  static constexpr int64_t kCarry = 1024;

  // Of elements from `at`, a multiple of kPair, counted from the last carry.
  QUANTOPT_INLINE void add(Pair size, int64_t at) {
    const int64_t k = at / kPair % kPairs * 2;
    lanes_[k] += size.first;
    lanes_[kSums == 1 ? 0 : k + 1] += size.second;
  }
  // The same, of which the first `count` count, where they are fewer. No call: it would cost a loop its
  // registers.
  QUANTOPT_INLINE void add_some(Pair size, int64_t at, int64_t count) {
    if (count < kPair) {
      VecBits lane;
      for (uint32_t k = 0; k < kWidth; ++k) lane[k] = k;
      const auto most = static_cast<uint32_t>(count);
      size.first = (Vec)((VecBits)size.first & (VecBits)(lane < most));
      size.second = (Vec)((VecBits)size.second & (VecBits)(lane + static_cast<uint32_t>(kWidth) < most));
    }
    add(size, at);
  }
  // Adds the lanes to `total`.
  QUANTOPT_INLINE double carried(double total) const {
    for (const Vec& part : lanes_) {
      for (int lane = 0; lane < kWidth; ++lane) total += part[lane];
    }
    return total;
  }
  // The means of kAtOnce groups of n elements, side by side, as the additions to one wait for each other.
  static __attribute__((noinline)) void means(const MagnitudeSum (&sums)[kAtOnce], int64_t n, float* out) {
    static_assert(kAtOnce == 4);
    DoubleQuad totals{};
    for (int64_t part = 0; part < kSums; ++part) {
      VecBits quads[kAtOnce];
      for (int64_t k = 0; k < kAtOnce; ++k) quads[k] = (VecBits)sums[k].lanes_[part];
      transpose_quads(quads);
      for (int lane = 0; lane < kWidth; ++lane) {
        FloatQuad of_groups;
        std::memcpy(&of_groups, reinterpret_cast<const char*>(&quads[lane % 4]) + lane / 4 * 16, 16);
        totals += __builtin_convertvector(of_groups, DoubleQuad);
      }
    }
    const FloatQuad quotients = __builtin_convertvector(totals / static_cast<double>(n), FloatQuad);
    std::memcpy(out, &quotients, sizeof(quotients));
  }

 private:
  typedef float FloatQuad __attribute__((vector_size(16)));
  typedef double DoubleQuad __attribute__((vector_size(32)));
  static constexpr int64_t kSums = 16 / kWidth, kPairs = kSums > 1 ? kSums / 2 : 1;
  Vec lanes_[kSums] = {};
};

// Sum of |rule.point|.
template <class Direction, class R>
double magnitude_of_span(const Span<float>& s, int64_t n, float factor, const Direction& direction,
                         const R& rule) {
  double total = 0.0;
  for (int64_t start = 0; start < n; start += MagnitudeSum::kCarry) {
    const int64_t stop = std::min(n, start + MagnitudeSum::kCarry);
    MagnitudeSum sum;
    for (int64_t at = start; at < stop; at += kPair) {
      const int64_t count = std::min<int64_t>(kPair, stop - at);
      const auto read = [&](const float* p) {
        return count == kPair ? load_pair(p + at) : load_some(p + at, count);
      };
      Pair m{}, v{};
      if (has_momentum(direction)) m = read(s.momentum);
      if constexpr (Direction::kExpAvgSq) v = read(s.exp_avg_sq);
      const Pair w = read(s.latent);
      const Pair g = rule.gradient(read(s.grad) * factor, w);
      const Pair before = R::kReadsWeight ? read(s.param) : Pair{};
      const Pair size = absolute(rule.point(w, direction(g, m, v), before));
      sum.add_some(size, at - start, count);
    }
    total = sum.carried(total);
  }
  return total;
}

// The base of a pair of a group: stores its state, and its direction in `d`. Returns |point|.
template <class P, class Direction, class R>
QUANTOPT_INLINE Pair move_pair(const Span<P>& s, int64_t i, float factor, const Direction& direction,
                               const R& rule, float* d) {
  const Moved x = load_moved(s, i, factor, direction, rule);
  store_state(s, i, direction, x);
  store_pair(d, x.d);
  return absolute(rule.point(x.w, x.d, x.before));
}

// The rule of a pair of a group, with its direction from `d`.
template <class P, class R>
QUANTOPT_INLINE void finish_pair(const Span<P>& s, int64_t i, const R& rule, const float* d,
                                 Writing writing) {
  Moved x{};
  load_weights<P, R>(s, i, x);
  x.d = load_pair(d);
  store_weights<P, R>(s, i, stepped(rule, x), writing);
}

// Groups that follow each other, of n elements each, whose scales follow them, step in two halves while they
// are in the first cache: the base and the means of |point|, which become the scales, then the rule. Between
// them the directions stand in `d`.

// First half of `count` groups, at most kAtOnce, of whole pairs. make_rule(k): the rule of group k with the
// scale before the step.
template <class P, class Direction, class MakeRule>
QUANTOPT_INLINE void move_groups(const Span<P>& span, int64_t count, int64_t n, float factor,
                                 const Direction& direction, const MakeRule& make_rule, bool prefetch,
                                 float* d, float* means) {
  using R = decltype(make_rule(0));
  MagnitudeSum sums[kAtOnce];
#pragma GCC unroll 1
  for (int64_t k = 0; k < count; ++k) {
    const R rule = make_rule(k);
    MagnitudeSum sum;
#pragma GCC unroll 1
    for (int64_t i = 0; i < n; i += kPair) {
      const int64_t at = k * n + i;
      if (prefetch) prefetch_span<kPair, P, Direction, R>(span, at, Writing::kStored);
      sum.add(move_pair(span, at, factor, direction, rule, d + at), i);
    }
    sums[k] = sum;
  }
  MagnitudeSum::means(sums, n, means);
}

// Second half. make_rule(k): the rule of group k with the scale that it has now.
template <class P, class MakeRule>
QUANTOPT_INLINE void finish_groups(const Span<P>& span, int64_t count, int64_t n, const MakeRule& make_rule,
                                   Writing writing, const float* d) {
#pragma GCC unroll 1
  for (int64_t k = 0; k < count; ++k) {
    const auto rule = make_rule(k);
#pragma GCC unroll 1
    for (int64_t at = k * n; at < (k + 1) * n; at += kPair) finish_pair(span, at, rule, d + at, writing);
  }
}

// Both halves of one group of any length. What is left of it goes through the same loops, in a copy.
// make_rule(scale): its rule with that scale after the step. Returns the scale.
template <class P, class Direction, class MakeRule>
QUANTOPT_INLINE float step_group(const Span<P>& span, int64_t n, float factor, const Direction& direction,
                                 const MakeRule& make_rule, Writing writing, bool prefetch, float scale,
                                 float* d) {
  using R = decltype(make_rule(scale));
  const int64_t left = n % kPair, whole = n - left;
  Rest<P> rest;
  MagnitudeSum sum;
  {
    const R rule = make_rule(scale);
    Span<P> now = span;
    int64_t done = 0, count = kPair;
    for (int64_t stop = whole;; stop = kPair) {
#pragma GCC unroll 1
      for (int64_t i = 0; i < stop; i += kPair, done += kPair) {
        if (prefetch) prefetch_span<kPair, P, Direction, R>(now, i, writing);
        sum.add_some(move_pair(now, i, factor, direction, rule, d + done), done, count);
      }
      if (left == 0 || count == left) break;
      rest.read(span, whole, left);
      now = rest.span;
      count = left;
      prefetch = false;
    }
  }
  scale = static_cast<float>(sum.carried(0.0) / static_cast<double>(n));
  const R rule = make_rule(scale);
  Span<P> now = span;
  for (int64_t stop = whole;; stop = kPair) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < stop; i += kPair) finish_pair(now, i, rule, d + i, writing);
    if (left == 0 || now.param == rest.span.param) break;
    now = rest.span;
    d += whole;
    if (writing == Writing::kStreamed) writing = Writing::kStored;
  }
  if (left != 0) rest.write(span, whole, left);
  return scale;
}

}  // namespace
}  // namespace quantopt::QUANTOPT_ISA

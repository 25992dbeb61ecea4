// The rules of the fused step. A rule is what the constraint to levels does with the base direction d; where
// d comes from is the base (base.h), and every rule runs on every base.
//
// A new rule adds: a struct with its equation, here or in a header of its family; a row struct below; a line
// to QUANTOPT_RULES. The CPU and CUDA kernels are compiled for every line. RULES of quantopt/rules.py has the
// same names and facts; a test compares them.
#pragma once

#include <cfloat>
#include <cstdint>

#include "askew.h"
#include "base_step.h"
#include "host_device.h"
#include "hyper.h"
#include "levels.h"
#include "prox.h"
#include "stam.h"

namespace quantopt {

// What a rule is told about a span of elements that share a scale.
struct SpanLevels {
  Grid grid;           // after the step
  Grid before;         // before it: another grid where the scale is dynamic
  float latent_limit;  // largest |latent|; infinite: no bound
};

template <class T>
struct Type {
  using type = T;
};

// Row of a rule, template <bool Binary> for grids of two levels:
//   Constants, constants(hyper, decoupled): what is the same for all spans of a step.
//   object<R>(constants, levels): the object that steps a span, with gradient(), step(), and, if it has a
//     latent, weight(); with a dynamic scale also point(), whose mean magnitude becomes the scale. The last
//     argument of the three is what the network ran with, read only if kReadsWeight.
//   visit_object(constants, exact, visit): calls visit(Type<R>) for the R that serves these constants. exact:
//     whether the network's weights are float32, not rounded to 16 bits.
template <class RuleConstants, class RuleObject>
struct RuleRow {
  static constexpr bool kQuantised = true;      // has levels, and so a scale
  static constexpr bool kDynamicScale = false;  // the scale may follow the weights
  using Constants = RuleConstants;
  using Object = RuleObject;

  template <class Visit>
  QUANTOPT_HOST_DEVICE static void visit_object(const Constants&, bool, const Visit& visit) {
    visit(Type<Object>{});
  }
};

template <bool Binary>
struct NoneRow : RuleRow<BaseStep, BaseStep> {
  static constexpr bool kQuantised = false;
  QUANTOPT_HOST_DEVICE static BaseStep constants(const Hyper& h, bool decoupled) {
    return make_base_step(h, decoupled);
  }
  template <class R>
  QUANTOPT_HOST_DEVICE static R object(const BaseStep& c, const SpanLevels&) {
    return c;
  }
};

template <class RuleObject>
struct AskewFamilyRow : RuleRow<AskewConstants, RuleObject> {
  QUANTOPT_HOST_DEVICE static AskewConstants constants(const Hyper& h, bool decoupled) {
    return make_askew_constants(h, decoupled || RuleObject::kLatent);
  }
  template <class R>
  QUANTOPT_HOST_DEVICE static R object(const AskewConstants& c, const SpanLevels& levels) {
    return R(c, levels.grid);
  }
};

template <template <bool Binary, bool Printed> class RuleObject, bool Binary>
struct AskewPlainRow : AskewFamilyRow<RuleObject<Binary, false>> {
  template <class Visit>
  QUANTOPT_HOST_DEVICE static void visit_object(const AskewConstants& c, bool, const Visit& visit) {
    if (c.printed) {
      visit(Type<RuleObject<Binary, true>>{});
    } else {
      visit(Type<RuleObject<Binary, false>>{});
    }
  }
};
template <bool Binary>
struct AskewRow : AskewPlainRow<AskewVelocity, Binary> {};
template <bool Binary>
struct AskewGradientRow : AskewPlainRow<AskewGradient, Binary> {};
template <bool Binary>
struct AskewMemoryRow : AskewFamilyRow<AskewMemory<Binary, true>> {
  template <class Visit>
  QUANTOPT_HOST_DEVICE static void visit_object(const AskewConstants& c, bool, const Visit& visit) {
    if (c.rate > FLT_MAX) {
      visit(Type<AskewMemory<Binary, false>>{});
    } else {
      visit(Type<AskewMemory<Binary, true>>{});
    }
  }
};

// Whether visit_object gives an object only where weights are float32: it is not compiled for others.
template <class R>
inline constexpr bool kExactAlone = false;
template <bool Binary>
inline constexpr bool kExactAlone<StamSplitting<Binary, true>> = true;

template <bool Binary>
struct SplittingRow : RuleRow<StamConstants, StamSplitting<Binary, true>> {
  static constexpr bool kDynamicScale = true;
  template <class Visit>
  QUANTOPT_HOST_DEVICE static void visit_object(const StamConstants& c, bool exact, const Visit& visit) {
    if (exact && c.decays) {
      visit(Type<StamSplitting<Binary, true>>{});
    } else {
      visit(Type<StamSplitting<Binary, false>>{});
    }
  }
  QUANTOPT_HOST_DEVICE static StamConstants constants(const Hyper& h, bool) {
    return make_stam_constants(h, true);
  }
  template <class R>
  QUANTOPT_HOST_DEVICE static R object(const StamConstants& c, const SpanLevels& levels) {
    return {c, levels.before, levels.grid};
  }
};

template <bool Binary>
struct AlternatingRow : RuleRow<StamConstants, StamAlternating<Binary>> {
  static constexpr bool kDynamicScale = true;
  QUANTOPT_HOST_DEVICE static StamConstants constants(const Hyper& h, bool) {
    return make_stam_constants(h, false);
  }
  template <class R>
  QUANTOPT_HOST_DEVICE static R object(const StamConstants& c, const SpanLevels& levels) {
    return {c, levels.before, levels.grid, levels.latent_limit};
  }
};

template <bool Binary>
struct ProxRow : RuleRow<ProxConstants, ProxStep<Binary>> {
  QUANTOPT_HOST_DEVICE static ProxConstants constants(const Hyper& h, bool decoupled) {
    return {make_base_step(h, decoupled), static_cast<float>(h.threshold)};
  }
  template <class R>
  QUANTOPT_HOST_DEVICE static R object(const ProxConstants& c, const SpanLevels& levels) {
    return {c, levels.grid};
  }
};

#define QUANTOPT_RULES(ROW)                               \
  ROW(kNone, "none", NoneRow)                             \
  ROW(kAskew, "askew", AskewRow)                          \
  ROW(kAskewGradient, "askew_gradient", AskewGradientRow) \
  ROW(kAskewMemory, "askew_memory", AskewMemoryRow)       \
  ROW(kSplitting, "splitting", SplittingRow)              \
  ROW(kAlternating, "alternating", AlternatingRow)        \
  ROW(kProx, "prox", ProxRow)

enum class Rule : uint8_t {
#define QUANTOPT_ROW(rule, name, Row) rule,
  QUANTOPT_RULES(QUANTOPT_ROW)
#undef QUANTOPT_ROW
};

struct RuleFacts {
  const char* name;
  bool quantised;      // has levels, and so a scale
  bool latent;         // keeps a latent weight; the network runs with a function of it
  bool dynamic_scale;  // the scale may follow the weights
};

inline constexpr RuleFacts kRules[] = {
#define QUANTOPT_ROW(rule, name, Row) \
  {name, Row<true>::kQuantised, Row<true>::Object::kLatent, Row<true>::kDynamicScale},
    QUANTOPT_RULES(QUANTOPT_ROW)
#undef QUANTOPT_ROW
};

constexpr const RuleFacts& facts_of(Rule rule) { return kRules[static_cast<int>(rule)]; }

// RowOf<Rule::kProx, true> is ProxRow<true> with the rule that it belongs to.
template <Rule rule, bool Binary>
struct RowOf;
#define QUANTOPT_ROW(rule, name, Row)              \
  template <bool Binary>                           \
  struct RowOf<Rule::rule, Binary> : Row<Binary> { \
    static constexpr Rule kRule = Rule::rule;      \
  };
QUANTOPT_RULES(QUANTOPT_ROW)
#undef QUANTOPT_ROW

// Calls visit with the row of a rule.
template <bool Binary, class Visit>
inline auto visit_rule(Rule rule, const Visit& visit) {
  switch (rule) {
#define QUANTOPT_ROW(rule, name, Row) \
  case Rule::rule: return visit(RowOf<Rule::rule, Binary>{});
    QUANTOPT_RULES(QUANTOPT_ROW)
#undef QUANTOPT_ROW
  }
  return visit(RowOf<Rule::kNone, Binary>{});  // every value of Rule has a case
}

}  // namespace quantopt

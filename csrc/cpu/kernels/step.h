// The fused step on a piece of one tensor, compiled for every instruction set; all give the same bits, but
// that AVX512-BF16 rounds bfloat16 denormals to zero.
#pragma once

#include <cstdint>
#include <iterator>
#include <utility>
#include <variant>

#include "core/step.h"
#include "cpu/isa.h"

namespace quantopt {

// The constants of one rule: alternative i is for Rule i.
template <size_t... I>
std::variant<typename RowOf<static_cast<Rule>(I), true>::Constants...> constants_of(
    std::index_sequence<I...>);
using RuleConstants = decltype(constants_of(std::make_index_sequence<std::size(kRules)>{}));

// The options of a step and the constants that its rule derives from them, computed once for all pieces.
struct StepContext : StepOptions {
  explicit StepContext(const StepOptions& options) : StepOptions(options), frozen(hyper.lr == 0.0) {
    visit_rule<true>(rule, [this](auto row) {
      constants.emplace<static_cast<size_t>(row.kRule)>(row.constants(hyper, decoupled));
    });
  }

  bool frozen;  // momentum and step numbers alone change: not weights, latents and scales
  RuleConstants constants;
};

}  // namespace quantopt

QUANTOPT_DECLARE_PER_ISA(
    // One pass over elements [begin, end) of the tensor.
    void step_piece(const StepContext& context, const StepSegment& segment, int64_t begin, int64_t end);
    // The same with scales that follow the weights: each is first replaced by the mean |point| of its
    // elements. [begin, end) are whole groups; next_scale and scale have room for all scales.
    void step_groups(const StepContext& context, const StepSegment& segment, int64_t begin, int64_t end);
    // Sum of |point| of the rule over [begin, end), changing nothing; 0 without a dynamic scale.
    double magnitude_of_piece(const StepContext& context, const StepSegment& segment, int64_t begin,
                              int64_t end);)

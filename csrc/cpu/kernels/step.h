// The fused step on a piece of one tensor, compiled for every instruction set; all give the same bits, but
// that AVX512-BF16 rounds bfloat16 denormals to zero.
#pragma once

#include <cstdint>

#include "core/askew.h"
#include "core/simple.h"
#include "core/stam.h"
#include "core/step.h"
#include "cpu/isa.h"

namespace quantopt {

// The options with what every piece derives from them, computed once a step.
struct StepContext : StepOptions {
  explicit StepContext(const StepOptions& options)
      : StepOptions(options),
        base(make_base_step(hyper, decoupled)),
        askew(make_askew_constants(hyper, decoupled || rule == Rule::kAskewMemory)),
        stam(make_stam_constants(hyper, rule == Rule::kSplitting)) {}

  BaseStep base;
  AskewConstants askew;
  StamConstants stam;
};

}  // namespace quantopt

QUANTOPT_DECLARE_PER_ISA(
    // One pass over elements [begin, end) of the tensor.
    void step_piece(const StepContext& context, const StepSegment& segment, int64_t begin, int64_t end);
    // Sum of |r| (splitting) or |u| after the step (alternating) over [begin, end), changing nothing.
    double magnitude_of_piece(const StepContext& context, const StepSegment& segment, int64_t begin,
                              int64_t end);)

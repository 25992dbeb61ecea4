// The fused step on a piece of one tensor, compiled for every instruction set; all give the same bits.
#pragma once

#include <cstdint>

#include "core/step.h"
#include "cpu/isa.h"

QUANTOPT_DECLARE_PER_ISA(
    // One pass over elements [begin, end) of the tensor.
    void step_piece(const StepOptions& options, const StepSegment& segment, int64_t begin, int64_t end);
    // Sum of |r| (splitting) or |u| after the step (alternating) over [begin, end), changing nothing.
    double magnitude_of_piece(const StepOptions& options, const StepSegment& segment, int64_t begin, int64_t end);)

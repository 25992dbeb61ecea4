// Turns a StepRecord into StepOptions and StepSegments, with every check that the kernels of any device rely
// on.
#pragma once

#include <vector>

#include "core/step.h"
#include "step_record.h"

namespace quantopt {

// Options whose gradient_factor is the sign alone and whose random key has the seed alone: the rest depends
// on tensors that are read at each step.
StepOptions step_options(const StepRecord& record);

// Checks every tensor; `device` is where they must be. Parameters without elements give no segment.
void step_segments(const StepRecord& record, at::Device device, std::vector<StepSegment>& segments);

}  // namespace quantopt

// The fused step over a list of tensors on the CPU: chunks of all tensors in one parallel region.
#pragma once

#include <vector>

#include "core/step.h"

namespace quantopt {

// Steps every segment. `dynamic_scale`: every scale is first replaced by the mean magnitude of the rule's
// point over its elements. Uses at::parallel_for; the result does not depend on the number of threads.
void step_on_cpu(StepOptions options, std::vector<StepSegment>& segments, bool dynamic_scale);

}  // namespace quantopt

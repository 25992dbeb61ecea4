// The calls that every step makes of its plan (quantopt::StepPlan, step_plan.cpp), by the plan's number. A
// call through torch's class bindings takes over a microsecond, a tenth of a step of small tensors.
#pragma once

#include <cstdint>

namespace quantopt {

// Looks up the present gradients; see StepPlan::ready. Throws std::out_of_range if there is no such plan.
bool step_plan_ready(int64_t number);
// One step with these gradients, without a GradScaler.
void step_plan_step(int64_t number);

}  // namespace quantopt

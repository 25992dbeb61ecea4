// The kernels of the rule QUANTOPT_RULE. setup.py compiles this file once for each line of QUANTOPT_RULES.
#include "cuda/step_dispatch.h"

namespace quantopt {

template cudaError_t launch_rule<Rule::QUANTOPT_RULE>(const StepLaunch&);

}  // namespace quantopt

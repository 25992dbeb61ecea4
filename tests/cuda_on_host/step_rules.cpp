// csrc/cuda/step_rule.cu for every rule.
#include "cuda/step_dispatch.h"

namespace quantopt {

#define QUANTOPT_ROW(rule, name, Row) template cudaError_t launch_rule<Rule::rule>(const StepLaunch&);
QUANTOPT_RULES(QUANTOPT_ROW)
#undef QUANTOPT_ROW

}  // namespace quantopt

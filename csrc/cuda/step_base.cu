#include "cuda/step_kernel.h"

namespace quantopt {

cudaError_t launch_base(const StepLaunch& step) { return launch_sgd_or_adam<MakeBase>(step); }

}  // namespace quantopt

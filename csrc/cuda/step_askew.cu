#include "cuda/step_kernel.h"

namespace quantopt {

cudaError_t launch_askew(const StepLaunch& step) {
  return step.binary ? launch_sgd_or_adam<MakeAskew<AskewVelocity<true>>>(step)
                     : launch_sgd_or_adam<MakeAskew<AskewVelocity<false>>>(step);
}

}  // namespace quantopt

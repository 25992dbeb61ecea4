#include "cuda/step_kernel.h"

namespace quantopt {

cudaError_t launch_askew_gradient(const StepLaunch& step) {
  return step.binary ? launch_sgd_or_adam<MakeAskew<AskewGradient<true>>>(step)
                     : launch_sgd_or_adam<MakeAskew<AskewGradient<false>>>(step);
}

}  // namespace quantopt

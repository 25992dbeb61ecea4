#include "cuda/step_kernel.h"

namespace quantopt {

cudaError_t launch_askew_memory(const StepLaunch& step) {
  return step.binary ? launch_sgd_or_adam<MakeMemory<true>>(step)
                     : launch_sgd_or_adam<MakeMemory<false>>(step);
}

}  // namespace quantopt

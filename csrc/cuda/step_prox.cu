#include "cuda/step_kernel.h"

namespace quantopt {

cudaError_t launch_prox(const StepLaunch& step) {
  return step.binary ? launch_steps<MakeProx<true>, SgdDirection>(step)
                     : launch_steps<MakeProx<false>, SgdDirection>(step);
}

}  // namespace quantopt

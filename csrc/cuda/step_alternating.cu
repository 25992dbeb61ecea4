#include "cuda/step_kernel.h"

namespace quantopt {

cudaError_t launch_alternating(const StepLaunch& step) {
  return step.binary ? launch_moving<MakeAlternating<true>>(step)
                     : launch_moving<MakeAlternating<false>>(step);
}

}  // namespace quantopt

#include "cuda/step_kernel.h"

namespace quantopt {

cudaError_t launch_splitting(const StepLaunch& step) {
  return step.binary ? launch_moving<MakeSplitting<true>>(step) : launch_moving<MakeSplitting<false>>(step);
}

}  // namespace quantopt

// Products of rows of x with packed weights on the tensor cores: the kernel is in binary_mma_kernel.h.
#include "cuda/binary_mma_kernel.h"

namespace quantopt {
namespace {

template <class Op>
cudaError_t run_shape(int shape, const Arguments<RowTokens>& arguments, bool overlap, cudaStream_t stream) {
  switch (shape) {
    case 0: return run_mma<Op, 0>(arguments, overlap, stream);
    case 1: return run_mma<Op, 1>(arguments, overlap, stream);
    case 2: return run_mma<Op, 2>(arguments, overlap, stream);
    case 3: return run_mma<Op, 3>(arguments, overlap, stream);
    case 4: return run_mma<Op, 4>(arguments, overlap, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

const char* binary_mma_on_cuda(const BinaryWeights& weights, const MmaTokens& tokens, const MmaPlan& plan,
                               const BinaryEpilogue& epilogue, void* sums, const CudaContext& context) {
  const int64_t size = tokens.type == MmaTokens::Type::kInt8 ? 1 : 2;
  const Arguments<RowTokens> arguments{
      weights,
      epilogue,
      {static_cast<const uint8_t*>(tokens.x), tokens.columns * size, tokens.stride},
      tokens.rows,
      weights.outputs,
      sums,
      plan.splits,
      plan.splits > 1 && mma_parts(plan, context) == 1};
  const bool overlap = tokens.fresh && context.capability >= 90;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const bool grouped = weights.group_scale != nullptr;
  return on_device(context.device, [&] {
    switch (tokens.type) {
      case MmaTokens::Type::kBFloat16: return run_shape<BFloat16s>(plan.shape, arguments, overlap, stream);
      case MmaTokens::Type::kFloat16: return run_shape<Halfs>(plan.shape, arguments, overlap, stream);
      default:
        return grouped ? run_shape<Bytes<float>>(plan.shape, arguments, overlap, stream)
                       : run_shape<Bytes<int32_t>>(plan.shape, arguments, overlap, stream);
    }
  });
}

}  // namespace quantopt

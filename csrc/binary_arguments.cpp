#include "binary_arguments.h"

#include <c10/util/Exception.h>

#include <string>
#include <utility>

#include "memory.h"

namespace quantopt {
namespace {

// Sizes of rows are multiplied below; such bits do not exist.
constexpr int64_t kMostInputs = int64_t{1} << 40;

}  // namespace

at::Tensor check_bits(const at::Tensor& bits, int64_t in_features) {
  TORCH_CHECK_VALUE(in_features >= 0 && in_features <= kMostInputs, "quantopt: in_features must be in 0..",
                    kMostInputs, ", not ", in_features);
  TORCH_CHECK_TYPE(bits.scalar_type() == at::kByte, "quantopt: bits must be uint8, not ", bits.scalar_type());
  TORCH_CHECK_VALUE(bits.dim() == 2 || bits.dim() == 3,
                    "quantopt: bits must be [N, ceil(K/8)] or [P, N, ceil(K/8)], not ", bits.sizes());
  TORCH_CHECK_VALUE(bits.dim() == 2 || bits.size(0) > 0, "quantopt: bits have no planes");
  TORCH_CHECK_VALUE(bits.size(-1) == (in_features + 7) / 8, "quantopt: bits have ", bits.size(-1),
                    " bytes per row, in_features=", in_features, " needs ", (in_features + 7) / 8);
  check_memory(bits, "quantopt", "bits");
  return bits.contiguous();
}

BinaryArguments check_binary(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                             const std::optional<at::Tensor>& bias, int64_t in_features,
                             at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                             const std::optional<at::Tensor>& tiles, c10::string_view activation) {
  for (const at::Tensor* tensor : {&bits, &scale, bias ? &*bias : &scale}) {
    TORCH_CHECK_VALUE(tensor->device() == x.device(), "quantopt: bits, scale and bias must be on ",
                      x.device(), " like x, not on ", tensor->device());
  }
  BinaryArguments w;
  w.bits = check_bits(bits, in_features);
  w.given_bits = &bits;
  w.tiles = tiles ? &*tiles : nullptr;
  w.outputs = w.bits.size(-2);
  w.inputs = in_features;
  w.group_size = group_size;
  TORCH_CHECK_VALUE(group_size >= 0 && group_size <= INT32_MAX,
                    "quantopt: group_size must be in 0..2^31-1, not ", group_size);
  w.groups = group_size > 0 ? in_features / group_size + (in_features % group_size != 0) : 1;
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
      "quantopt: x must be float32, bfloat16 or float16, not ", x.scalar_type());
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, "quantopt: scale must be float32, not ",
                   scale.scalar_type());
  if (group_size > 0) {
    TORCH_CHECK_VALUE(scale.dim() == 2 && scale.size(0) == w.outputs && scale.size(1) == w.groups,
                      "quantopt: with group_size=", group_size, " scale must be [", w.outputs, ", ", w.groups,
                      "], not ", scale.sizes());
  } else {
    TORCH_CHECK_VALUE(scale.dim() == 1 && (scale.size(0) == 1 || scale.size(0) == w.outputs),
                      "quantopt: scale must be [1] or [", w.outputs, "], not ", scale.sizes());
  }
  check_memory(x, "quantopt", "x");
  check_memory(scale, "quantopt", "scale");
  w.scale = scale.contiguous();
  if (bias) {
    TORCH_CHECK_TYPE(at::isFloatingType(bias->scalar_type()), "quantopt: bias must be floating, not ",
                     bias->scalar_type());
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == w.outputs, "quantopt: bias must be [", w.outputs,
                      "], not ", bias->sizes());
    check_memory(*bias, "quantopt", "bias");
    w.bias = as_type(*bias, at::kFloat).contiguous();
  }
  w.quantize = compute == "int8";  // "auto" is exact: what loses accuracy is asked for by name
  w.round = compute == "bf16";
  TORCH_CHECK_VALUE(w.quantize || w.round || compute == "exact" || compute == "auto",
                    "quantopt: compute must be \"auto\", \"exact\", \"bf16\" or \"int8\", not \"",
                    std::string(compute), "\"");
  TORCH_CHECK_VALUE(find_activation(activation, w.activation),
                    "quantopt: activation must be \"none\", \"relu\", \"gelu\" or \"silu\", not \"",
                    std::string(activation), "\"");
  TORCH_CHECK_VALUE(static_cast<int64_t>(plane_weights.size()) == planes_of(w.bits),
                    "quantopt: ", plane_weights.size(), " plane_weights for ", planes_of(w.bits),
                    " planes of bits");
  int64_t total = 0;
  for (int64_t weight : plane_weights) {
    TORCH_CHECK_VALUE(weight >= 1 && weight <= 128, "quantopt: plane_weights must be in 1..128, not ",
                      weight);
    w.plane_weights.push_back(static_cast<int32_t>(weight));
    total += weight;
  }
  TORCH_CHECK_VALUE(!w.quantize || in_features * 127 * total < (int64_t{1} << 31),
                    "quantopt: in_features=", in_features,
                    " is too large for the 32-bit sums of compute=\"int8\"; use compute=\"exact\"");
  return w;
}

void check_rows(const at::Tensor& x, const BinaryArguments& w) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == w.inputs, "quantopt: x must have in_features=", w.inputs,
                    " as its last dimension, not shape ", x.sizes());
}

ConvArguments check_conv(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, at::IntArrayRef plane_weights, int64_t group_size,
                         c10::string_view compute, const std::optional<at::Tensor>& tiles,
                         c10::string_view activation) {
  TORCH_CHECK_VALUE(x.dim() == 4, "quantopt: x must be [B, C, H, W], not ", x.sizes());
  const std::pair<const char*, at::IntArrayRef> pairs[] = {
      {"kernel_size", kernel}, {"stride", stride}, {"padding", padding}, {"dilation", dilation}};
  for (const auto& [name, pair] : pairs) {
    const int64_t least = pair.data() == padding.data() ? 0 : 1;
    TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, "quantopt: ", name,
                      " must be two integers of at least ", least, ", not ", pair);
    // So that no product or sum below leaves 64 bits.
    TORCH_CHECK_VALUE(pair[0] <= INT32_MAX && pair[1] <= INT32_MAX, "quantopt: ", name,
                      " must be less than 2^31, not ", pair);
  }
  TORCH_CHECK_VALUE(x.size(1) <= INT32_MAX && x.size(2) <= INT32_MAX && x.size(3) <= INT32_MAX &&
                        kernel[0] * kernel[1] <= INT32_MAX,
                    "quantopt: the sizes of x and the positions of the kernel must be less than 2^31, not ",
                    x.sizes(), " and ", kernel);
  TORCH_CHECK_VALUE(groups >= 1 && x.size(1) % groups == 0, "quantopt: groups=", groups,
                    " does not divide the ", x.size(1), " channels of x");
  ConvArguments c;
  c.groups = groups;
  c.channels = x.size(1) / groups;
  c.weights = check_binary(x, bits, scale, bias, c.channels * kernel[0] * kernel[1], plane_weights,
                           group_size, compute, tiles, activation);
  TORCH_CHECK_VALUE(c.weights.outputs % groups == 0, "quantopt: groups=", groups, " does not divide the ",
                    c.weights.outputs, " output channels");
  c.outputs = c.weights.outputs / groups;
  for (int i = 0; i < 2; ++i) {
    c.kernel[i] = kernel[i];
    c.stride[i] = stride[i];
    c.padding[i] = padding[i];
    c.dilation[i] = dilation[i];
    const int64_t room = x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "quantopt: kernel_size=", kernel, " with dilation=", dilation,
                      " is larger than the padded image of x");
    c.size[i] = room / stride[i] + 1;
  }
  return c;
}

void check_conv_form(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups,
                     int64_t group_size) {
  TORCH_CHECK_VALUE(channels >= 0 && channels <= INT32_MAX && taps >= 1 && taps <= INT32_MAX,
                    "quantopt: channels must be in 0..2^31-1 and taps in 1..2^31-1, not ", channels, " and ",
                    taps);
  TORCH_CHECK_VALUE(bits.dim() >= 2 && groups >= 1 && bits.size(-2) % groups == 0,
                    "quantopt: groups=", groups, " must be at least 1 and divide the rows of bits");
  TORCH_CHECK_VALUE(group_size >= 0 && group_size <= INT32_MAX,
                    "quantopt: group_size must be in 0..2^31-1, not ", group_size);
}

}  // namespace quantopt

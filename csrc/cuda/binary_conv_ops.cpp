// quantopt::binary_conv2d and binary_conv_tiles on CUDA: checks and memory around the kernels of
// binary_conv.h.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "binary_arguments.h"
#include "cuda/binary_conv.h"
#include "cuda/binary_dispatch.h"
#include "cuda/binary_torch.h"
#include "cuda/torch_cuda.h"
#include "dtype.h"
#include "tiles.h"

namespace quantopt {
namespace {

at::Tensor make_conv_tiles(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups,
                           const CudaContext& context) {
  const int64_t planes = planes_of(bits), outputs = bits.size(-2) / groups;
  const int64_t inputs = taps * conv_channels(channels);
  at::Tensor tiles =
      at::empty({groups * planes, tile_plane_words(outputs, inputs)}, bits.options().dtype(at::kInt));
  if (tiles.numel() == 0) return tiles;
  const at::Tensor ordered = at::empty({groups * planes * outputs, inputs / 8}, bits.options());
  check(conv_bits_on_cuda(bits.const_data_ptr<uint8_t>(), planes, groups, outputs, channels, taps,
                          ordered.mutable_data_ptr<uint8_t>(), context));
  check(binary_tiles_on_cuda(ordered.const_data_ptr<uint8_t>(), groups * planes, outputs, inputs,
                             reinterpret_cast<uint32_t*>(tiles.mutable_data_ptr<int32_t>()), context));
  return tiles;
}

at::Tensor binary_conv_tiles(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups,
                             int64_t group_size) {
  check_conv_form(bits, channels, taps, groups, group_size);
  if (group_size > 0) return at::empty({0}, bits.options().dtype(at::kInt));  // see unsupported
  const at::Tensor dense = check_bits(bits, channels * taps);
  const c10::DeviceGuard guard(dense.device());
  const at::Tensor tiles = make_conv_tiles(dense, channels, taps, groups, cuda_context(dense.device()));
  tie_tiles(tiles, bits, {channels * taps, taps, groups});
  return tiles;
}

// Why the kernel cannot run the convolution, or null: quantopt/backends.py leaves these to the reference, as
// tests hold.
const char* unsupported(const at::Tensor& x, const ConvArguments& c) {
  const BinaryArguments& w = c.weights;
  if (w.group_size > 0) return "the CUDA convolution takes scales per tensor or row (group_size=0)";
  if (w.planes() > kMaxPlanes) return "the CUDA kernels take at most 8 planes";
  if (c.groups > 1 && !w.quantize && (x.scalar_type() == at::kFloat || c.channels % 8 != 0)) {
    return "the CUDA convolution takes groups with compute=\"int8\", or 16-bit x (or compute=\"bf16\") of a "
           "multiple of 8 channels";
  }
  return nullptr;
}

// How the output pixels are divided: few channels of the output by blocks of as many rows.
MmaPlan plan_conv(const BinaryWeights& w, int64_t tokens, bool may_split, int processors) {
  constexpr int64_t kLeastStages = 4;
  MmaPlan plan{tokens <= kMmaShapes[1].tokens ? 1 : w.outputs <= kMmaShapes[5].rows ? 5 : 4, 1};
  if (!may_split) return plan;
  const MmaShape& shape = kMmaShapes[plan.shape];
  const int64_t blocks = ceil_divide(w.outputs, shape.rows) * ceil_divide(tokens, shape.tokens);
  const int64_t stages = ceil_divide(w.inputs, shape.depth);
  const int64_t wanted = std::clamp<int64_t>(int64_t{processors} * shape.blocks / blocks, 1,
                                             std::max<int64_t>(1, stages / kLeastStages));
  plan.splits = static_cast<int>(ceil_divide(stages, ceil_divide(stages, wanted)));
  return plan;
}

at::Tensor binary_conv2d(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, at::IntArrayRef plane_weights, int64_t group_size,
                         c10::string_view compute, const std::optional<at::Tensor>& tiles,
                         c10::string_view activation) {
  const ConvArguments conv = check_conv(x, bits, scale, bias, kernel, stride, padding, dilation, groups,
                                        plane_weights, group_size, compute, tiles, activation);
  const BinaryArguments& a = conv.weights;
  const c10::DeviceGuard guard(x.device());
  at::Tensor dense = rounded(x, a);
  const char* reason = unsupported(dense, conv);
  TORCH_CHECK_NOT_IMPLEMENTED(reason == nullptr, "quantopt: ", reason);
  at::Tensor y = at::empty({x.size(0), a.outputs, conv.size[0], conv.size[1]}, x.options(),
                           at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;

  const CudaContext context = cuda_context(x.device());
  const Dtype dtype = dtype_of(dense, "quantopt", "x"), y_dtype = dtype_of(y, "quantopt", "y");
  const int64_t size = dense.element_size(), pixels = x.size(2) * x.size(3);
  const int64_t taps = conv.taps(), padded = conv_channels(conv.channels);
  if (x.numel() == 0) {  // nothing to add up
    const at::Tensor sums = at::zeros({y.numel()}, x.options().dtype(at::kFloat));
    const BinaryEpilogue epilogue{a.scale.const_data_ptr<float>(),
                                  a.scale_stride(),
                                  nullptr,
                                  a.bias_or_null(),
                                  a.activation,
                                  y_dtype,
                                  y.mutable_data_ptr()};
    check(binary_epilogue_on_cuda(
        {sums.const_data_ptr(), false, 1, 1, y.numel() / a.outputs, a.outputs, a.outputs, false}, epilogue,
        context));
    return y;
  }
  dense = dense.contiguous(at::MemoryFormat::ChannelsLast);
  if (groups > 1 && reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 != 0) {
    dense = dense.clone(at::MemoryFormat::ChannelsLast);  // groups are read where they are
  }
  const TilesForm form{conv.channels * taps, taps, groups};
  BinaryWeights w{};
  w.outputs = conv.outputs;
  w.inputs = taps * padded;
  w.planes = a.planes();
  std::copy(a.plane_weights.begin(), a.plane_weights.end(), w.plane_weights);
  const int64_t group_words = w.planes * tile_plane_words(w.outputs, w.inputs);
  const at::Tensor layout = tiles_or_derived(a.tiles, bits, form, at::kInt, groups * group_words, [&] {
    return make_conv_tiles(a.bits, conv.channels, taps, groups, context);
  });

  // The tokens that one launch takes, and the parts in which they are added up.
  const int64_t parts = !a.quantize && dtype == Dtype::kFloat32 ? 3 : 1;
  const bool readable = !a.quantize && parts == 1 && conv.channels % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0;
  ConvGeometry g{x.size(0),
                 static_cast<int32_t>(x.size(2)),
                 static_cast<int32_t>(x.size(3)),
                 static_cast<int32_t>(conv.size[0]),
                 static_cast<int32_t>(conv.size[1]),
                 static_cast<int32_t>(kernel[0]),
                 static_cast<int32_t>(kernel[1]),
                 {static_cast<int32_t>(stride[0]), static_cast<int32_t>(stride[1])},
                 {static_cast<int32_t>(padding[0]), static_cast<int32_t>(padding[1])},
                 {static_cast<int32_t>(dilation[0]), static_cast<int32_t>(dilation[1])}};
  constexpr int64_t kLaunch = int64_t{65535} * 64;  // blocks along y, of 64 tokens each
  TORCH_CHECK_NOT_IMPLEMENTED(
      conv.size[0] <= INT32_MAX / conv.size[1] && parts * g.output_pixels() <= kLaunch &&
          w.inputs <= INT32_MAX && pixels <= INT32_MAX,
      "quantopt: the CUDA convolution takes images of at most ", kLaunch / parts, " output pixels");
  for (const int i : {0, 1}) {  // so that no coordinate leaves 32 bits
    TORCH_CHECK_NOT_IMPLEMENTED(
        (kernel[i] - 1) * dilation[i] + x.size(2 + i) + 2 * padding[i] <= INT32_MAX,
        "quantopt: the CUDA convolution takes padded images of less than 2^31 pixels");
  }
  // Images at a time: as many as a launch takes, and as have room in this memory for x in its order for K.
  constexpr int64_t kRoom = int64_t{256} << 20;
  const int64_t image_bytes =
      a.quantize ? pixels * groups * padded : (readable ? 0 : parts * pixels * padded * 2);
  const int64_t most = std::clamp<int64_t>(
      std::min(kLaunch / (parts * g.output_pixels()), kRoom / std::max<int64_t>(1, image_bytes)), 1,
      x.size(0));
  const auto bytes = [&](int64_t count) { return at::empty({count}, x.options().dtype(at::kByte)); };
  const at::Tensor values = bytes(most * image_bytes);
  const at::Tensor row_scale = bytes(a.quantize ? most * g.output_pixels() * 4 : 0);
  const at::Tensor largest = bytes(a.quantize ? most * kConvParts * 4 : 0);
  const MmaPlan plan = plan_conv(w, parts * most * g.output_pixels(), groups == 1, context.processors);
  const int64_t splits = mma_parts(plan, context);
  const bool direct = splits == 1 && parts == 1;
  const at::Tensor sums = bytes(direct ? 0 : splits * parts * most * g.output_pixels() * w.outputs * 4);

  for (int64_t first = 0; first < x.size(0); first += most) {
    g.images = std::min(most, x.size(0) - first);
    const auto* const from =
        static_cast<const uint8_t*>(dense.const_data_ptr()) + first * pixels * x.size(1) * size;
    auto* const to = static_cast<uint8_t*>(y.mutable_data_ptr()) +
                     first * g.output_pixels() * a.outputs * y.element_size();
    ConvTokens tokens{
        values.const_data_ptr(), MmaTokens::Type::kInt8, parts, padded, padded, groups * padded, true};
    if (a.quantize) {
      check(quantize_images_on_cuda(
          {from, dtype, g.images, pixels, groups, conv.channels},
          static_cast<float*>(largest.mutable_data_ptr()), static_cast<int8_t*>(values.mutable_data_ptr()),
          static_cast<float*>(row_scale.mutable_data_ptr()), g.output_pixels(), context));
    } else {
      tokens.type = dtype == Dtype::kFloat16 ? MmaTokens::Type::kFloat16 : MmaTokens::Type::kBFloat16;
      if (readable) {
        tokens.x = from;
        tokens.channel_bytes = 2 * conv.channels;
        tokens.pixel_bytes = 2 * x.size(1);
        tokens.fresh = false;  // the weights may be
      } else {
        check(split_rows_on_cuda({from, dtype, g.images * pixels, conv.channels, conv.channels},
                                 values.mutable_data_ptr(), padded, context));
        tokens.channel_bytes = tokens.pixel_bytes = 2 * padded;
      }
    }
    const auto* const first_token = static_cast<const uint8_t*>(tokens.x);
    for (int64_t group = 0; group < groups; ++group) {
      w.tiles = reinterpret_cast<const uint32_t*>(layout.const_data_ptr<int32_t>()) + group * group_words;
      tokens.x = first_token + group * tokens.channel_bytes;
      const BinaryEpilogue epilogue{
          a.scale.const_data_ptr<float>() + group * w.outputs * a.scale_stride(),
          a.scale_stride(),
          a.quantize ? static_cast<const float*>(row_scale.const_data_ptr()) : nullptr,
          a.bias.defined() ? a.bias_or_null() + group * w.outputs : nullptr,
          a.activation,
          y_dtype,
          to + group * w.outputs * y.element_size()};
      check(binary_conv_on_cuda(w, tokens, g, plan, epilogue, a.outputs,
                                direct ? nullptr : sums.mutable_data_ptr(), context));
      if (direct) continue;
      check(binary_epilogue_on_cuda({sums.const_data_ptr(), a.quantize, splits, parts,
                                     g.images * g.output_pixels(), w.outputs, w.outputs, true},
                                    epilogue, context));
    }
  }
  return y;
}

}  // namespace
}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CUDA, m) {
  m.impl("binary_conv_tiles", &quantopt::binary_conv_tiles);
  m.impl("binary_conv2d", &quantopt::binary_conv2d);
}

// quantopt::binary_conv2d and binary_conv_tiles on the CPU: the choice between packed kernels and ATen's
// convolution, memory and threads around them.
#include "cpu/binary_conv_ops.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/quantize.h"
#include "cpu/amx_conv_ops.h"
#include "cpu/amx_ops.h"
#include "cpu/binary_linear_ops.h"
#include "cpu/conv_tiles.h"
#include "tiles.h"

namespace quantopt {

ConvProblem problem_of(const at::Tensor& x, const ConvArguments& conv, const at::Tensor& layout,
                       int64_t group) {
  const BinaryArguments& w = conv.weights;
  ConvProblem c{};
  c.images = x.size(0);
  c.height = x.size(2);
  c.width = x.size(3);
  c.channels = conv.channels;
  c.x_stride = x.size(1);
  c.out_height = conv.size[0];
  c.out_width = conv.size[1];
  c.outputs = conv.outputs;
  c.y_stride = w.outputs;
  std::copy_n(conv.kernel, 2, c.kernel);
  std::copy_n(conv.stride, 2, c.stride);
  std::copy_n(conv.padding, 2, c.padding);
  std::copy_n(conv.dilation, 2, c.dilation);
  c.planes = w.planes();
  c.tiles = reinterpret_cast<const uint16_t*>(layout.const_data_ptr<int16_t>()) +
            group * (layout.numel() / conv.groups);
  c.plane_weights = w.plane_weights.data();
  c.scale_stride = w.scale_stride();
  c.scale = w.scale.const_data_ptr<float>() + group * conv.outputs * c.scale_stride;
  c.bias = w.bias.defined() ? w.bias_or_null() + group * conv.outputs : nullptr;
  c.activation = w.activation;
  return c;
}

LinearProblem rows_of_weights(const ConvProblem& c, int64_t group) {
  LinearProblem w{};
  w.outputs = c.outputs;
  w.inputs = c.channels * c.kernel[0] * c.kernel[1];
  w.planes = c.planes;
  w.tiles = c.tiles;
  w.plane_weights = c.plane_weights;
  w.group = group;
  w.bias = c.bias;
  w.activation = c.activation;
  return w;
}

namespace {

// Tiles of [groups, planes, kernel positions] times [outputs, channels] of a group.
at::Tensor derive_conv_tiles(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups) {
  const at::Tensor dense = check_bits(bits, channels * taps);
  const int64_t planes = planes_of(dense), outputs = dense.size(-2) / groups;
  const int64_t row = dense.size(-1), bytes = (channels + 7) / 8;
  const at::Tensor by_tap =
      at::zeros({groups * planes * taps * outputs, bytes}, at::TensorOptions().dtype(at::kByte));
  const uint8_t* from = dense.const_data_ptr<uint8_t>();
  auto* to = by_tap.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, planes * groups * outputs, 1 + 32768 / (8 * row + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i % outputs, group = i / outputs % groups, plane = i / outputs / groups;
      const uint8_t* in = from + i * row;
      uint8_t* out = to + ((group * planes + plane) * taps * outputs + n) * bytes;
      for (int64_t c = 0, k = 0; c < channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap, ++k) {
          const int bit = (in[k / 8] >> (k % 8)) & 1;
          out[tap * outputs * bytes + c / 8] |= static_cast<uint8_t>(bit << (c % 8));
        }
      }
    }
  });
  return derive_tiles(binary_kernels(active_isa()), by_tap, groups * planes * taps, outputs, channels);
}

at::Tensor binary_conv_tiles(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups,
                             int64_t group_size) {
  check_conv_form(bits, channels, taps, groups, group_size);
  if (!conv_takes_tiles(bits.size(-2) / groups, channels, taps, groups, group_size))
    return at::empty({0}, at::TensorOptions().dtype(at::kShort));
  if (group_size > 0) {
    channels *= taps;
    taps = 1;
  }
  const at::Tensor tiles = derive_conv_tiles(bits, channels, taps, groups);
  tie_tiles(tiles, bits, {channels * taps, taps, groups});
  return tiles;
}

// The tiles that the caller has if they fit, else derived.
at::Tensor layout_of(const ConvArguments& conv) {
  const BinaryArguments& w = conv.weights;
  const int64_t taps = w.group_size > 0 ? 1 : conv.taps(), inputs = w.inputs / taps;  // of tiles
  return tiles_or_derived(w.tiles, *w.given_bits, {w.inputs, taps, conv.groups}, at::kShort,
                          tiles_size(conv.groups * w.planes() * taps, conv.outputs, inputs),
                          [&] { return derive_conv_tiles(w.bits, inputs, taps, conv.groups); });
}

// x is channels last. (A single image may be so and not say so: its batch has any stride.)
at::Tensor quantize_images(const BinaryKernels& kernels, const at::Tensor& x, at::Tensor& scale) {
  at::Tensor q = dense_tensor(x.sizes(), at::kChar, at::MemoryFormat::ChannelsLast);
  scale = dense_tensor({x.size(0)}, at::kFloat);
  quantize_rows(kernels, x.const_data_ptr<float>(), x.size(0), x.numel() / x.size(0),
                q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>());
  return q;
}

bool all_finite(const at::Tensor& x) {
  return largest_magnitude(x.const_data_ptr<float>(), x.numel()) < INFINITY;
}

// W as fp32 [N, K]: with its scales or levels if grouped, else without.
at::Tensor dense(const BinaryArguments& w, const int8_t* levels) {
  at::Tensor result = at::zeros({w.outputs, w.inputs}, at::TensorOptions().dtype(at::kFloat));
  const int64_t bytes = w.bits.size(-1);
  const uint8_t* bits = w.bits.const_data_ptr<uint8_t>();
  const float* scale = w.scale.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, w.outputs, 1 + 32768 / (w.inputs + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* row = out + n * w.inputs;
      for (size_t plane = 0; plane < w.plane_weights.size(); ++plane) {
        const uint8_t* from = bits + (static_cast<int64_t>(plane) * w.outputs + n) * bytes;
        const float weight = static_cast<float>(w.plane_weights[plane]);
        for (int64_t k = 0; k < w.inputs; ++k) row[k] += (from[k / 8] >> (k % 8)) & 1 ? weight : -weight;
      }
      if (w.group_size == 0) continue;
      for (int64_t k = 0; k < w.inputs; ++k) {
        const int64_t at = n * w.groups + k / w.group_size;
        row[k] *= levels != nullptr ? static_cast<float>(levels[at]) : scale[at];
      }
    }
  });
  return result;
}

void activate_by_aten(Activation activation, at::Tensor& y) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: at::relu_(y); return;
    case Activation::gelu: at::gelu_(y); return;
    case Activation::silu: at::silu_(y); return;
  }
}

// ATen's convolution with W expanded, x in fp32 and channels last.
at::Tensor conv_by_aten(const BinaryKernels& kernels, const at::Tensor& x, const ConvArguments& conv,
                        const at::Tensor& x_scale) {
  const BinaryArguments& w = conv.weights;
  at::Tensor levels, scale = w.scale;
  if (x_scale.defined() && w.group_size > 0 && takes_levels(w.plane_weights.data(), w.planes(), w.inputs)) {
    levels = dense_tensor(w.scale.sizes(), at::kChar);
    scale = dense_tensor({w.outputs}, at::kFloat);
    quantize_rows(kernels, w.scale.const_data_ptr<float>(), w.outputs, w.groups,
                  levels.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>());
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // it would round
  const int8_t* const whole = levels.defined() ? levels.const_data_ptr<int8_t>() : nullptr;
  const at::Tensor weight = dense(w, whole).view({w.outputs, conv.channels, conv.kernel[0], conv.kernel[1]});
  // The stride of a single channel says nothing, but that of channels last misleads torch 2.13's convolution.
  const at::Tensor image = x.size(1) == 1 ? x.reshape({-1}).view(x.sizes()) : x;
  at::Tensor y = at::conv2d(image, weight, {}, conv.stride, conv.padding, conv.dilation, conv.groups);
  at::Tensor factor;  // as the kernels multiply: one product of both scales
  if (w.group_size == 0 || levels.defined()) factor = scale.view({-1, 1, 1});
  if (x_scale.defined()) {
    const at::Tensor of_images = x_scale.view({-1, 1, 1, 1});
    factor = factor.defined() ? factor.mul(of_images) : of_images;
  }
  if (factor.defined()) y.mul_(factor);
  if (w.bias.defined()) y.add_(w.bias.view({-1, 1, 1}));
  activate_by_aten(w.activation, y);
  return y.contiguous(at::MemoryFormat::ChannelsLast);
}

// c with a scale for each `group` weights of a row of W: the product of whole rows with gathered values.
void run_on_patches(const BinaryKernels& kernels, const ConvProblem& c, int64_t group) {
  constexpr int64_t kRows = 16;  // pixels gathered at once
  LinearProblem w = rows_of_weights(c, group);
  const int64_t groups = (w.inputs + group - 1) / group;
  const bool levels = c.q != nullptr && takes_levels(w.plane_weights, w.planes, w.inputs);
  const at::Tensor scales = group_scales_of(kernels, c.scale, w.outputs, groups, levels);
  set_group_scales(scales, w);
  const int64_t pixels = c.images * c.out_height * c.out_width, blocks = (pixels + kRows - 1) / kRows;
  const int64_t bands = (w.outputs + kBandRows - 1) / kBandRows;
  const int64_t work = kRows * kBandRows * w.inputs * w.planes;
  at::parallel_for(0, blocks * bands, 1 + kThreadWork / (work + 1), [&](int64_t begin, int64_t end) {
    std::vector<float> x(c.q == nullptr ? kRows * w.inputs : 0);
    std::vector<int8_t> q(c.q != nullptr ? kRows * w.inputs : 0);
    std::vector<float> y(c.y_stride != w.outputs ? kRows * w.outputs : 0);  // where pixels of y are apart
    float x_scale[kRows];
    LinearProblem p = w;
    p.x = c.q == nullptr ? x.data() : nullptr;
    p.q = c.q != nullptr ? q.data() : nullptr;
    p.x_scale = x_scale;
    while (begin < end) {
      const int64_t first = begin / bands * kRows, band = begin % bands;
      const int64_t last = std::min(bands, band + end - begin);
      const int64_t output = band * kBandRows, output_end = std::min(last * kBandRows, w.outputs);
      p.rows = std::min(kRows, pixels - first);
      p.y = y.empty() ? c.y + first * w.outputs : y.data();
      for (int64_t i = 0; i < p.rows; ++i) {
        if (c.q == nullptr) {
          gather_patch(c, c.x, first + i, x.data() + i * w.inputs);
          continue;
        }
        gather_patch(c, c.q, first + i, q.data() + i * w.inputs);
        x_scale[i] = c.x_scale[(first + i) / (c.out_height * c.out_width)];
      }
      kernels.linear(p, 0, p.rows, output, output_end);
      for (int64_t i = 0; !y.empty() && i < p.rows; ++i) {
        const float* row = y.data() + i * w.outputs;
        std::copy(row + output, row + output_end, c.y + (first + i) * c.y_stride + output);
      }
      begin += last - band;
    }
  });
}

void run_on_lookups(const BinaryKernels& kernels, const ConvProblem& c) {
  const int64_t bytes = kernels.conv_memory(c), pieces = kernels.conv_pieces(c);
  const int64_t pixels = c.images * c.out_height * c.out_width;
  const int64_t work = pixels * c.channels * c.kernel[0] * c.kernel[1] * c.planes * c.outputs / pieces;
  at::parallel_for(0, pieces, 1 + kThreadWork / (work + 1), [&](int64_t begin, int64_t end) {
    at::Tensor memory = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));  // aligned to 64 bytes
    kernels.conv2d(c, begin, end, memory.mutable_data_ptr());
  });
}

// A kernel of 1x1 without padding and groups is a product of rows, the pixels.
bool is_linear(const ConvArguments& conv) {
  return conv.taps() == 1 && conv.padding[0] + conv.padding[1] == 0 && conv.groups == 1;
}
// The pixels that it meets.
at::Tensor met(const at::Tensor& x, const ConvArguments& conv) {
  if (conv.stride[0] * conv.stride[1] == 1) return x;
  return x.slice(2, 0, x.size(2), conv.stride[0])
      .slice(3, 0, x.size(3), conv.stride[1])
      .contiguous(at::MemoryFormat::ChannelsLast);
}

// values: x as fp32, or int8 with x_scale for each image.
void run_as_linear(const BinaryKernels& kernels, const ConvArguments& conv, const at::Tensor& values,
                   const at::Tensor& x_scale, at::Tensor& y) {
  const at::Tensor x = met(values, conv);
  const int64_t images = x.size(0), pixels = conv.size[0] * conv.size[1], count = images * pixels;
  if (!conv.weights.quantize) {
    return run_linear(kernels, conv.weights, {count, x.const_data_ptr<float>(), nullptr, nullptr}, y);
  }
  const at::Tensor scale = x_scale.unsqueeze(1).expand({images, pixels}).contiguous();
  run_linear(kernels, conv.weights,
             {count, nullptr, x.const_data_ptr<int8_t>(), scale.const_data_ptr<float>()}, y);
}

// On the tile registers of AMX, or undefined where other kernels run.
at::Tensor run_on_amx(const BinaryKernels& kernels, const ConvArguments& conv, const at::Tensor& given,
                      at::ScalarType y_type) {
  const BinaryArguments& w = conv.weights;
  const bool half = given.scalar_type() == at::kBFloat16;
  const at::Tensor x =
      as_type(given, half ? at::kBFloat16 : at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t pixels = conv.size[0] * conv.size[1], stride = conv.stride[0] * conv.stride[1];
  // Many pixels of few channels are multiplied with weights that are expanded once, in int8: in other modes a
  // linear layer has a power of two for each pixel. Measured at 256 channels on 2048 pixels, 0.40 ms against
  // 0.51, and at 1024 on 196, 0.21 against 0.18 (an Intel Xeon with AMX and AVX512-FP16, one thread, November
  // 2026).
  const bool once = w.quantize && (stride > 1 || (w.inputs <= 512 && x.size(0) * pixels >= 512));
  if (is_linear(conv) && (w.group_size > 0 || !once)) {
    const at::Tensor scale = w.quantize ? scales_of_pixels(x, pixels) : at::Tensor();
    const at::Tensor rows = met(x, conv).permute({0, 2, 3, 1});
    const at::Tensor y = linear_on_amx(kernels, w, rows, scale, y_type);
    return y.defined() ? y.permute({0, 3, 1, 2}) : y;
  }
  return conv_on_amx(kernels, conv, x, y_type, [&] { return layout_of(conv); });
}

at::Tensor binary_conv2d(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, at::IntArrayRef plane_weights, int64_t group_size,
                         c10::string_view compute, const std::optional<at::Tensor>& tiles,
                         c10::string_view activation) {
  const ConvArguments conv = check_conv(x, bits, scale, bias, kernel, stride, padding, dilation, groups,
                                        plane_weights, group_size, compute, tiles, activation);
  const BinaryArguments& w = conv.weights;
  const int64_t channels = conv.channels, outputs = conv.outputs, *const size = conv.size;
  const Isa isa = active_isa();
  const BinaryKernels kernels = binary_kernels(isa);
  const bool on_tiles =
      kernels.conv_available() && conv_takes_tiles(outputs, channels, conv.taps(), groups, group_size);
  if (isa == Isa::amx && on_tiles && x.numel() > 0 && w.outputs > 0) {
    const at::Tensor y = run_on_amx(kernels, conv, rounded(x, w), x.scalar_type());
    if (y.defined()) return as_type(y, x.scalar_type());
  }
  at::Tensor y =
      dense_tensor({x.size(0), w.outputs, size[0], size[1]}, at::kFloat, at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return as_type(y, x.scalar_type());
  if (x.numel() == 0) {
    y.zero_();
    if (w.bias.defined()) y.add_(w.bias.view({-1, 1, 1}));
    activate_by_aten(w.activation, y);
    return as_type(y, x.scalar_type());
  }
  at::Tensor values = values_of(x, w, at::MemoryFormat::ChannelsLast), x_scale;
  if (w.quantize) values = quantize_images(kernels, values, x_scale);
  if (is_linear(conv)) {
    run_as_linear(kernels, conv, values, x_scale, y);
    return as_type(y, x.scalar_type());
  }
  // Summed plane by plane, an infinity becomes NaN where planes differ: it is multiplied by levels, as in
  // ATen's convolution.
  const bool by_levels = w.planes() > 1 && !w.quantize && !all_finite(values);
  if (by_levels || !on_tiles) {
    return as_type(conv_by_aten(kernels, as_type(values, at::kFloat), conv, x_scale), x.scalar_type());
  }
  const at::Tensor layout = layout_of(conv);
  for (int64_t group = 0; group < groups; ++group) {
    ConvProblem c = problem_of(values, conv, layout, group);
    if (w.quantize) {
      c.x_scale = x_scale.const_data_ptr<float>();
      c.q = values.const_data_ptr<int8_t>() + group * channels;
    } else {
      c.x = values.const_data_ptr<float>() + group * channels;
    }
    c.y = y.mutable_data_ptr<float>() + group * outputs;
    if (group_size > 0) {
      run_on_patches(kernels, c, group_size);
    } else {
      run_on_lookups(kernels, c);
    }
  }
  return as_type(y, x.scalar_type());
}

}  // namespace
}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CPU, m) {
  m.impl("binary_conv_tiles", &quantopt::binary_conv_tiles);
  m.impl("binary_conv2d", &quantopt::binary_conv2d);
}

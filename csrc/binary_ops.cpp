// quantopt::binary_linear, binary_conv2d and binary_tiles on the CPU: checks, conversions and threads around
// the kernels of cpu/kernels/binary_linear.h.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "binary_arguments.h"
#include "core/quantize.h"
#include "cpu/isa.h"
#include "cpu/kernels/binary_amx.h"
#include "cpu/kernels/binary_conv.h"
#include "cpu/kernels/binary_linear.h"

namespace {

using quantopt::as_type;
using quantopt::BinaryArguments;
using quantopt::BinaryConv;
using quantopt::BinaryLinear;
using quantopt::Isa;
using quantopt::TilesForm;

// The kernels of one instruction set.
struct Kernels {
  decltype(&quantopt::portable::binary_uses_tiles) uses_tiles;
  decltype(&quantopt::portable::binary_tiles) tiles;
  decltype(&quantopt::portable::binary_linear) linear;
  decltype(&quantopt::portable::quantize_row) quantize_row;
  decltype(&quantopt::portable::binary_conv_available) conv_available;
  decltype(&quantopt::portable::binary_conv_memory) conv_memory;
  decltype(&quantopt::portable::binary_conv_pieces) conv_pieces;
  decltype(&quantopt::portable::binary_conv2d) conv2d;
};

#define QUANTOPT_KERNELS(isa)                                                                              \
  Kernels {                                                                                                \
    quantopt::isa::binary_uses_tiles, quantopt::isa::binary_tiles, quantopt::isa::binary_linear,           \
        quantopt::isa::quantize_row, quantopt::isa::binary_conv_available,                                 \
        quantopt::isa::binary_conv_memory, quantopt::isa::binary_conv_pieces, quantopt::isa::binary_conv2d \
  }

Kernels kernels_of(Isa isa) {
  switch (isa) {
#ifdef QUANTOPT_HAVE_AVX512VNNI
    case Isa::amx:
    case Isa::avx512vnni: return QUANTOPT_KERNELS(avx512vnni);
#endif
#ifdef QUANTOPT_HAVE_AVX512
    case Isa::avx512: return QUANTOPT_KERNELS(avx512);
#endif
#ifdef QUANTOPT_HAVE_AVX2
    case Isa::avx2: return QUANTOPT_KERNELS(avx2);
#endif
    default: return QUANTOPT_KERNELS(portable);
  }
}

// Multiply-adds below which another thread takes longer to start than to do its share.
constexpr int64_t kThreadWork = 1 << 18;

// Whether the products run on AMX tiles, `rows` of y in all. Exact ones do not, of bfloat16 either: they have
// the same bits for any number of rows, and take denormals as they are.
bool takes_amx([[maybe_unused]] Isa isa, [[maybe_unused]] const BinaryArguments& w,
               [[maybe_unused]] int64_t rows) {
#ifdef QUANTOPT_HAVE_AMX
  return isa == Isa::amx && (w.quantize || w.round) && w.group_size == 0 && w.inputs > 0 &&
         quantopt::amx::binary_amx_covers(w.quantize, w.plane_weights.data(), w.planes(), rows);
#else
  return false;
#endif
}

void run_on_amx([[maybe_unused]] const BinaryConv& c) {
#ifdef QUANTOPT_HAVE_AMX
  namespace amx = quantopt::amx;
  const int64_t parts = amx::binary_amx_parts(c), bytes = amx::binary_amx_memory(c);
  const int64_t sums = c.images * c.out_height * c.out_width * c.outputs;
  const int64_t work = sums / parts * c.channels * c.kernel[0] * c.kernel[1];
  at::parallel_for(0, parts, 1 + kThreadWork / (work + 1), [&](int64_t begin, int64_t end) {
    at::Tensor memory = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));  // aligned to 64 bytes
    amx::binary_amx(c, begin, end, memory.mutable_data_ptr());
  });
#endif
}

// x as the kernels read it: in fp32, but what was rounded to bfloat16 goes to tiles as that.
at::Tensor values_of(const at::Tensor& x, const BinaryArguments& w, bool amx, at::MemoryFormat format) {
  const at::Tensor values = quantopt::rounded(x, w);
  return (w.round && amx ? values : as_type(values, at::kFloat)).contiguous(format);
}

const uint16_t* halves_of(const at::Tensor& values) {
  return reinterpret_cast<const uint16_t*>(values.const_data_ptr<at::BFloat16>());
}

// Many rows of x: each thread takes rows. Few: each takes outputs.
void run(const Kernels& kernels, const BinaryLinear& p) {
  constexpr int64_t kRows = 8;  // a multiple of the rows that the kernels take together
  if (p.rows >= 2 * kRows * at::get_num_threads()) {
    at::parallel_for(0, (p.rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
      kernels.linear(p, begin * kRows, std::min(end * kRows, p.rows), 0, p.outputs);
    });
    return;
  }
  const int64_t work = p.rows * p.inputs * p.planes * quantopt::kBandRows;
  const int64_t grain = 1 + kThreadWork / (work + 1);
  at::parallel_for(0, (p.outputs + quantopt::kBandRows - 1) / quantopt::kBandRows, grain,
                   [&](int64_t begin, int64_t end) {
                     kernels.linear(p, 0, p.rows, begin * quantopt::kBandRows,
                                    std::min(end * quantopt::kBandRows, p.outputs));
                   });
}

TilesForm linear_form(int64_t inputs) { return {inputs, 1, 1}; }

at::Tensor binary_tiles_with(const Kernels& kernels, const at::Tensor& bits, int64_t planes, int64_t outputs,
                             int64_t inputs) {
  const int64_t count = quantopt::tile_count(outputs);
  const int64_t size = count * quantopt::tile_words(inputs) * quantopt::kTileRows;
  const int64_t bytes = outputs * ((inputs + 7) / 8);
  at::Tensor tiles = at::empty({planes, size}, at::TensorOptions().dtype(at::kShort));
  const uint8_t* from = bits.const_data_ptr<uint8_t>();
  auto* to = reinterpret_cast<uint16_t*>(tiles.mutable_data_ptr<int16_t>());
  for (int64_t plane = 0; plane < planes; ++plane) {
    at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      kernels.tiles(from + plane * bytes, outputs, inputs, to + plane * size, begin, end);
    });
  }
  return tiles;
}

// The layout is the same for all instruction sets, also those that run on the bits themselves: a layer may be
// packed under another than it runs under.
at::Tensor binary_tiles(const at::Tensor& bits, int64_t in_features) {
  const at::Tensor dense = quantopt::check_bits(bits, in_features);
  const at::Tensor tiles = binary_tiles_with(kernels_of(quantopt::active_isa()), dense,
                                             quantopt::planes_of(dense), dense.size(-2), in_features);
  quantopt::tie_tiles(tiles, bits, linear_form(in_features));
  return tiles;
}

// Whether a convolution runs on tiles, where the instruction set has such kernels; else the library's is
// faster. With groups of channels: not with less than a quarter of the 32 outputs or 16 channels that are
// taken together. With scales for groups of weights, which run along whole rows of W: those of whole words,
// and enough outputs to gather the values of several kernel positions for.
bool conv_takes_tiles(int64_t outputs, int64_t channels, int64_t taps, int64_t groups, int64_t group_size) {
  constexpr int64_t kPatchOutputs = 64;
  if (group_size > 0) {
    if (group_size % 16 != 0 || (taps > 1 && outputs < kPatchOutputs)) return false;
    channels *= taps;
  }
  return groups == 1 || 4 * outputs * channels >= (outputs + 31) / 32 * 32 * ((channels + 15) / 16 * 16);
}

// Tiles of [groups, planes, kernel positions] times [outputs, channels] of a group.
at::Tensor derive_conv_tiles(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups) {
  const at::Tensor dense = quantopt::check_bits(bits, channels * taps);
  const int64_t planes = quantopt::planes_of(dense), outputs = dense.size(-2) / groups;
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
  return binary_tiles_with(kernels_of(quantopt::active_isa()), by_tap, groups * planes * taps, outputs,
                           channels);
}

at::Tensor binary_conv_tiles(const at::Tensor& bits, int64_t channels, int64_t taps, int64_t groups,
                             int64_t group_size) {
  quantopt::check_conv_form(bits, channels, taps, groups);
  if (!conv_takes_tiles(bits.size(-2) / groups, channels, taps, groups, group_size))
    return at::empty({0}, at::TensorOptions().dtype(at::kShort));
  if (group_size > 0) {
    channels *= taps;
    taps = 1;
  }
  const at::Tensor tiles = derive_conv_tiles(bits, channels, taps, groups);
  quantopt::tie_tiles(tiles, bits, {channels * taps, taps, groups});
  return tiles;
}

// `tiles` if they were derived from `bits` as these are now; else what `derive` returns, for this call alone.
template <class Derive>
at::Tensor layout_of(const std::optional<at::Tensor>& tiles, const at::Tensor& bits, const TilesForm& form,
                     int64_t matrices, int64_t outputs, int64_t inputs, const Derive& derive) {
  if (!tiles || tiles->numel() == 0) return derive();
  const int64_t size =
      matrices * quantopt::tile_count(outputs) * quantopt::tile_words(inputs) * quantopt::kTileRows;
  TORCH_CHECK_VALUE(tiles->device() == bits.device() && tiles->scalar_type() == at::kShort &&
                        tiles->is_contiguous() && tiles->numel() == size,
                    "quantopt: tiles do not belong to these bits; derive them anew from the bits");
  return quantopt::tiles_fit(*tiles, bits, form) ? *tiles : derive();
}

// A new dense tensor; at::empty passes the dispatcher twice.
at::Tensor dense_tensor(at::IntArrayRef shape, at::ScalarType type,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return at::detail::empty_cpu(shape, type, /*pin_memory=*/false, format);
}

// Each of `rows` rows of x as int8 in q, and their scales.
void quantize_rows(const Kernels& kernels, const float* x, int64_t rows, int64_t length, int8_t* q,
                   float* scale) {
  at::parallel_for(0, rows, 1 + 32768 / (length + 1), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      scale[m] = kernels.quantize_row(x + m * length, length, q + m * length);
    }
  });
}

// x is channels last. (A single image may be so and not say so: its batch has any stride.)
at::Tensor quantize_images(const Kernels& kernels, const at::Tensor& x, at::Tensor& scale) {
  at::Tensor q = dense_tensor(x.sizes(), at::kChar, at::MemoryFormat::ChannelsLast);
  scale = dense_tensor({x.size(0)}, at::kFloat);
  quantize_rows(kernels, x.const_data_ptr<float>(), x.size(0), x.numel() / x.size(0),
                q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>());
  return q;
}

// Rows of x in one of these forms: fp32, bfloat16 for AMX tiles, or int8 with a scale for each row.
struct Rows {
  int64_t count;
  const float* x = nullptr;
  const uint16_t* half = nullptr;
  const int8_t* q = nullptr;
  const float* scale = nullptr;
};

Rows rows_of(const at::Tensor& values, int64_t count) {
  Rows rows{count};
  if (values.scalar_type() == at::kFloat) {
    rows.x = values.const_data_ptr<float>();
  } else {
    rows.half = halves_of(values);
  }
  return rows;
}

// y = x W^T + b. `tiles` may be those of `bits`.
void run_linear(bool amx, const Kernels& kernels, const BinaryArguments& w, const Rows& rows,
                const at::Tensor& bits, const std::optional<at::Tensor>& tiles, at::Tensor& y) {
  BinaryLinear p{};
  p.rows = rows.count;
  p.outputs = w.outputs;
  p.inputs = w.inputs;
  p.planes = w.planes();
  p.bits = w.bits.const_data_ptr<uint8_t>();
  p.plane_weights = w.plane_weights.data();
  p.scale = w.scale.const_data_ptr<float>();
  p.scale_stride = w.scale_stride();
  p.group = w.group_size;
  p.bias = w.bias_or_null();
  p.x = rows.x;
  p.q = rows.q;
  p.x_scale = rows.scale;
  p.y = y.mutable_data_ptr<float>();
  p.activation = w.activation;
  at::Tensor layout;
  if (kernels.uses_tiles(p)) {
    layout = layout_of(tiles, bits, linear_form(w.inputs), p.planes, w.outputs, w.inputs,
                       [&] { return binary_tiles_with(kernels, w.bits, w.planes(), w.outputs, w.inputs); });
    p.tiles = reinterpret_cast<const uint16_t*>(layout.const_data_ptr<int16_t>());
  }
  if (!amx) return run(kernels, p);
  BinaryConv c = quantopt::as_conv(p);
  c.half = rows.half;
  run_on_amx(c);
}

at::Tensor binary_linear(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, int64_t in_features,
                         at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                         const std::optional<at::Tensor>& tiles, c10::string_view activation) {
  const BinaryArguments w = quantopt::check_binary(x, bits, scale, bias, in_features, plane_weights,
                                                   group_size, compute, activation);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == in_features,
                    "quantopt: x must have in_features=", in_features, " as its last dimension, not shape ",
                    x.sizes());
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w.outputs;
  at::Tensor y = dense_tensor(shape, at::kFloat);
  if (y.numel() > 0) {
    const Isa isa = quantopt::active_isa();
    const Kernels kernels = kernels_of(isa);
    const int64_t count = y.numel() / w.outputs;
    const bool amx = takes_amx(isa, w, count);
    const at::Tensor values = values_of(x, w, amx, at::MemoryFormat::Contiguous);
    Rows rows = rows_of(values, count);
    c10::DataPtr memory;  // a tensor would take small products a twentieth of their time
    if (w.quantize) {
      const size_t scales = sizeof(float) * static_cast<size_t>(count);
      memory = c10::GetCPUAllocator()->allocate(scales + static_cast<size_t>(count * w.inputs));
      auto* const scale = static_cast<float*>(memory.mutable_get());
      auto* const q = reinterpret_cast<int8_t*>(scale + count);
      quantize_rows(kernels, rows.x, count, w.inputs, q, scale);
      rows = {count, nullptr, nullptr, q, scale};
    }
    run_linear(amx, kernels, w, rows, bits, tiles, y);
  }
  return as_type(y, x.scalar_type());
}

bool all_finite(const at::Tensor& x) {
  return quantopt::largest_magnitude(x.const_data_ptr<float>(), x.numel()) < INFINITY;
}

// W as fp32 [N, K]: with its scales if grouped, else without.
at::Tensor dense(const BinaryArguments& w) {
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
      for (int64_t k = 0; k < w.inputs; ++k) row[k] *= scale[n * w.groups + k / w.group_size];
    }
  });
  return result;
}

void activate_by_library(quantopt::Activation activation, at::Tensor& y) {
  switch (activation) {
    case quantopt::Activation::none: return;
    case quantopt::Activation::relu: at::relu_(y); return;
    case quantopt::Activation::gelu: at::gelu_(y); return;
    case quantopt::Activation::silu: at::silu_(y); return;
  }
}

// The library's convolution with W expanded, x in fp32 and channels last.
at::Tensor conv_by_library(const at::Tensor& x, const BinaryArguments& w, const at::Tensor& x_scale,
                           at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation, int64_t groups) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // it would round
  const at::Tensor weight = dense(w).view({w.outputs, x.size(1) / groups, kernel[0], kernel[1]});
  at::Tensor y = at::conv2d(x, weight, {}, stride, padding, dilation, groups);
  at::Tensor factor;  // as the kernels multiply: one product of both scales
  if (w.group_size == 0) factor = w.scale.view({-1, 1, 1});
  if (x_scale.defined()) {
    const at::Tensor of_images = x_scale.view({-1, 1, 1, 1});
    factor = factor.defined() ? factor.mul(of_images) : of_images;
  }
  if (factor.defined()) y.mul_(factor);
  if (w.bias.defined()) y.add_(w.bias.view({-1, 1, 1}));
  activate_by_library(w.activation, y);
  return y.contiguous(at::MemoryFormat::ChannelsLast);
}

// The values of x that pixel `index` of y meets, in the order of a row of W: [channels, kernel positions].
template <class T>
void gather_patch(const BinaryConv& c, const T* x, int64_t index, T* patch) {
  const int64_t image = index / c.out_width / c.out_height;
  const int64_t oy = index / c.out_width % c.out_height, ox = index % c.out_width;
  const int64_t taps = c.kernel[0] * c.kernel[1];
  for (int64_t r = 0; r < c.kernel[0]; ++r) {
    const int64_t iy = oy * c.stride[0] - c.padding[0] + r * c.dilation[0];
    for (int64_t s = 0; s < c.kernel[1]; ++s, ++patch) {
      const int64_t ix = ox * c.stride[1] - c.padding[1] + s * c.dilation[1];
      if (iy < 0 || iy >= c.height || ix < 0 || ix >= c.width) {
        for (int64_t i = 0; i < c.channels; ++i) patch[i * taps] = T{0};
        continue;
      }
      const T* from = x + ((image * c.height + iy) * c.width + ix) * c.x_stride;
      for (int64_t i = 0; i < c.channels; ++i) patch[i * taps] = from[i];
    }
  }
}

// c with a scale for each `group` weights of a row of W: the product of whole rows with gathered values.
void run_on_patches(const Kernels& kernels, const BinaryConv& c, int64_t group) {
  constexpr int64_t kRows = 16;  // pixels gathered at once
  BinaryLinear w{};
  w.outputs = c.outputs;
  w.inputs = c.channels * c.kernel[0] * c.kernel[1];
  w.planes = c.planes;
  w.tiles = c.tiles;
  w.plane_weights = c.plane_weights;
  w.scale = c.scale;
  w.scale_stride = c.scale_stride;
  w.group = group;
  w.bias = c.bias;
  w.activation = c.activation;
  const int64_t pixels = c.images * c.out_height * c.out_width, blocks = (pixels + kRows - 1) / kRows;
  const int64_t bands = (w.outputs + quantopt::kBandRows - 1) / quantopt::kBandRows;
  const int64_t work = kRows * quantopt::kBandRows * w.inputs * w.planes;
  at::parallel_for(0, blocks * bands, 1 + kThreadWork / (work + 1), [&](int64_t begin, int64_t end) {
    std::vector<float> x(c.q == nullptr ? kRows * w.inputs : 0);
    std::vector<int8_t> q(c.q != nullptr ? kRows * w.inputs : 0);
    std::vector<float> y(c.y_stride != w.outputs ? kRows * w.outputs : 0);  // where pixels of y are apart
    float x_scale[kRows];
    BinaryLinear p = w;
    p.x = c.q == nullptr ? x.data() : nullptr;
    p.q = c.q != nullptr ? q.data() : nullptr;
    p.x_scale = x_scale;
    while (begin < end) {
      const int64_t first = begin / bands * kRows, band = begin % bands;
      const int64_t last = std::min(bands, band + end - begin);
      const int64_t output = band * quantopt::kBandRows,
                    output_end = std::min(last * quantopt::kBandRows, w.outputs);
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

void run_on_lookups(const Kernels& kernels, const BinaryConv& c) {
  const int64_t bytes = kernels.conv_memory(c), pieces = kernels.conv_pieces(c);
  const int64_t pixels = c.images * c.out_height * c.out_width;
  const int64_t work = pixels * c.channels * c.kernel[0] * c.kernel[1] * c.planes * c.outputs / pieces;
  at::parallel_for(0, pieces, 1 + kThreadWork / (work + 1), [&](int64_t begin, int64_t end) {
    at::Tensor memory = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));  // aligned to 64 bytes
    kernels.conv2d(c, begin, end, memory.mutable_data_ptr());
  });
}

at::Tensor binary_conv2d(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, at::IntArrayRef plane_weights, int64_t group_size,
                         c10::string_view compute, const std::optional<at::Tensor>& tiles,
                         c10::string_view activation) {
  const quantopt::ConvArguments conv =
      quantopt::check_conv(x, bits, scale, bias, kernel, stride, padding, dilation, groups, plane_weights,
                           group_size, compute, activation);
  const BinaryArguments& w = conv.weights;
  const int64_t channels = conv.channels, outputs = conv.outputs, *const size = conv.size;
  at::Tensor y =
      dense_tensor({x.size(0), w.outputs, size[0], size[1]}, at::kFloat, at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return as_type(y, x.scalar_type());
  if (x.numel() == 0) {
    y.zero_();
    if (w.bias.defined()) y.add_(w.bias.view({-1, 1, 1}));
    activate_by_library(w.activation, y);
    return as_type(y, x.scalar_type());
  }
  const Isa isa = quantopt::active_isa();
  const Kernels kernels = kernels_of(isa);
  const bool amx = takes_amx(isa, w, x.size(0) * size[0] * size[1]);
  at::Tensor values = values_of(x, w, amx, at::MemoryFormat::ChannelsLast), x_scale;
  if (w.quantize) values = quantize_images(kernels, values, x_scale);
  if (kernel[0] * kernel[1] == 1 && padding[0] + padding[1] == 0 && groups == 1) {
    if (stride[0] * stride[1] > 1) {
      values = values.slice(2, 0, x.size(2), stride[0]).slice(3, 0, x.size(3), stride[1]);
      values = values.contiguous(at::MemoryFormat::ChannelsLast);
    }
    const int64_t pixels = size[0] * size[1], count = x.size(0) * pixels;
    if (w.quantize) {
      x_scale = x_scale.unsqueeze(1).expand({x.size(0), pixels}).contiguous();
      const Rows rows{count, nullptr, nullptr, values.const_data_ptr<int8_t>(),
                      x_scale.const_data_ptr<float>()};
      run_linear(amx, kernels, w, rows, bits, tiles, y);
    } else {
      run_linear(amx, kernels, w, rows_of(values, count), bits, tiles, y);
    }
    return as_type(y, x.scalar_type());
  }
  // Summed plane by plane, an infinity becomes NaN where planes differ: it is multiplied by levels, as tiles
  // do.
  const bool by_levels = w.planes() > 1 && !w.quantize && !amx && !all_finite(values);
  const int64_t all_taps = kernel[0] * kernel[1];
  if (by_levels || !kernels.conv_available() ||
      !conv_takes_tiles(outputs, channels, all_taps, groups, group_size)) {
    const at::Tensor fp32 = as_type(values, at::kFloat);
    return as_type(conv_by_library(fp32, w, x_scale, kernel, stride, padding, dilation, groups),
                   x.scalar_type());
  }
  const int64_t taps = group_size > 0 ? 1 : all_taps, inputs = w.inputs / taps;  // of tiles
  const at::Tensor layout =
      layout_of(tiles, bits, {w.inputs, taps, groups}, groups * w.planes() * taps, outputs, inputs,
                [&] { return derive_conv_tiles(w.bits, inputs, taps, groups); });
  BinaryConv c{};
  c.images = x.size(0);
  c.height = x.size(2);
  c.width = x.size(3);
  c.channels = channels;
  c.x_stride = x.size(1);
  c.out_height = size[0];
  c.out_width = size[1];
  c.outputs = outputs;
  c.y_stride = w.outputs;
  for (int i = 0; i < 2; ++i) {
    c.kernel[i] = kernel[i];
    c.stride[i] = stride[i];
    c.padding[i] = padding[i];
    c.dilation[i] = dilation[i];
  }
  c.planes = w.planes();
  c.plane_weights = w.plane_weights.data();
  c.scale_stride = w.scale_stride();
  c.activation = w.activation;
  if (w.quantize) c.x_scale = x_scale.const_data_ptr<float>();
  for (int64_t group = 0; group < groups; ++group) {
    c.tiles = reinterpret_cast<const uint16_t*>(layout.const_data_ptr<int16_t>()) +
              group * (layout.numel() / groups);
    c.scale = w.scale.const_data_ptr<float>() + group * outputs * c.scale_stride;
    c.bias = w.bias.defined() ? w.bias_or_null() + group * outputs : nullptr;
    if (w.quantize) {
      c.q = values.const_data_ptr<int8_t>() + group * channels;
    } else if (amx) {
      c.half = halves_of(values) + group * channels;
    } else {
      c.x = values.const_data_ptr<float>() + group * channels;
    }
    c.y = y.mutable_data_ptr<float>() + group * outputs;
    if (group_size > 0) {
      run_on_patches(kernels, c, group_size);
    } else if (amx) {
      run_on_amx(c);
    } else {
      run_on_lookups(kernels, c);
    }
  }
  return as_type(y, x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(quantopt, CPU, m) {
  m.impl("binary_tiles", &binary_tiles);
  m.impl("binary_conv_tiles", &binary_conv_tiles);
  m.impl("binary_linear", &binary_linear);
  m.impl("binary_conv2d", &binary_conv2d);
}

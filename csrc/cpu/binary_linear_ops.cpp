// quantopt::binary_linear and binary_tiles on the CPU: memory and threads around the kernels of
// cpu/kernels/binary_linear.h.
#include "cpu/binary_linear_ops.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/amx_ops.h"
#include "tiles.h"

namespace quantopt {
namespace {

constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));

}  // namespace

#define QUANTOPT_BINARY_KERNELS(isa)                                                                     \
  BinaryKernels {                                                                                        \
    isa::binary_uses_tiles, isa::binary_tiles, isa::binary_linear, isa::quantize_row,                    \
        isa::binary_conv_available, isa::binary_conv_memory, isa::binary_conv_pieces, isa::binary_conv2d \
  }

BinaryKernels binary_kernels(Isa isa) { return QUANTOPT_FOR_ISA(isa, QUANTOPT_BINARY_KERNELS); }

at::Tensor values_of(const at::Tensor& x, const BinaryArguments& w, at::MemoryFormat format) {
  return as_type(rounded(x, w), at::kFloat).contiguous(format);
}

const uint16_t* bf16_data(const at::Tensor& values) {
  return reinterpret_cast<const uint16_t*>(values.const_data_ptr<at::BFloat16>());
}

at::Tensor dense_tensor(at::IntArrayRef shape, at::ScalarType type, at::MemoryFormat format) {
  return at::detail::empty_cpu(shape, type, /*pin_memory=*/false, format);
}

void quantize_rows(const BinaryKernels& kernels, const float* x, int64_t rows, int64_t length, int8_t* q,
                   float* scale) {
  at::parallel_for(0, rows, 1 + 32768 / (length + 1), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      // The scales of groups, which are short rows, come from memory: in time, if asked for two pages ahead.
      constexpr int64_t kAhead = 2048, kLine = 16, kShort = 1024;
      for (int64_t k = 0; k < length && length <= kShort; k += kLine) {
        __builtin_prefetch(x + m * length + k + kAhead);
      }
      scale[m] = kernels.quantize_row(x + m * length, length, q + m * length);
    }
  });
}

namespace {

template <class T>
void in_order_of_tiles(const T* from, int64_t outputs, int64_t groups, T* to) {
  at::parallel_for(0, tile_count(outputs), 1 + 32768 / (groups * kTileRows + 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t n = begin * kTileRows; n < end * kTileRows; ++n) {
                       for (int64_t g = 0; g < groups; ++g)
                         to[group_index(n, g, groups)] = n < outputs ? from[n * groups + g] : T{};
                     }
                   });
}

}  // namespace

at::Tensor group_scales_of(const BinaryKernels& kernels, const float* scale, int64_t outputs, int64_t groups,
                           bool levels) {
  const int64_t padded = tile_count(outputs) * kTileRows;
  if (!levels) {
    at::Tensor result = dense_tensor({padded * groups}, at::kFloat);
    in_order_of_tiles(scale, outputs, groups, result.mutable_data_ptr<float>());
    return result;
  }
  const at::Tensor rows = dense_tensor({outputs, groups}, at::kChar);
  at::Tensor result = dense_tensor({padded * (kFloatBytes + groups)}, at::kChar);
  auto* const to = result.mutable_data_ptr<int8_t>();
  quantize_rows(kernels, scale, outputs, groups, rows.mutable_data_ptr<int8_t>(),
                reinterpret_cast<float*>(to));
  in_order_of_tiles(rows.const_data_ptr<int8_t>(), outputs, groups, to + padded * kFloatBytes);
  return result;
}

void set_group_scales(const at::Tensor& scales, LinearProblem& p) {
  if (scales.scalar_type() == at::kFloat) {
    p.group_scales = scales.const_data_ptr<float>();
    return;
  }
  const auto* const from = scales.const_data_ptr<int8_t>();
  p.scale = reinterpret_cast<const float*>(from);
  p.scale_stride = 1;
  p.levels = from + tile_count(p.outputs) * kTileRows * kFloatBytes;
}

at::Tensor derive_tiles(const BinaryKernels& kernels, const at::Tensor& bits, int64_t planes, int64_t outputs,
                        int64_t inputs) {
  const int64_t count = tile_count(outputs), size = tiles_size(1, outputs, inputs);
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

namespace {

// Many rows of x: each thread takes rows. Few: each takes outputs.
void run(const BinaryKernels& kernels, const LinearProblem& p) {
  constexpr int64_t kRows = 8;  // a multiple of the rows that the kernels take together
  if (p.rows >= 2 * kRows * at::get_num_threads()) {
    at::parallel_for(0, (p.rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
      kernels.linear(p, begin * kRows, std::min(end * kRows, p.rows), 0, p.outputs);
    });
    return;
  }
  const int64_t work = p.rows * p.inputs * p.planes * kBandRows;
  const int64_t grain = 1 + kThreadWork / (work + 1);
  at::parallel_for(0, (p.outputs + kBandRows - 1) / kBandRows, grain, [&](int64_t begin, int64_t end) {
    kernels.linear(p, 0, p.rows, begin * kBandRows, std::min(end * kBandRows, p.outputs));
  });
}

TilesForm linear_form(int64_t inputs) { return {inputs, 1, 1}; }

}  // namespace

LinearProblem weights_of(const BinaryArguments& w) {
  LinearProblem p{};
  p.outputs = w.outputs;
  p.inputs = w.inputs;
  p.planes = w.planes();
  p.bits = w.bits.const_data_ptr<uint8_t>();
  p.plane_weights = w.plane_weights.data();
  p.scale = w.group_size == 0 ? w.scale.const_data_ptr<float>() : nullptr;
  p.scale_stride = w.scale_stride();
  p.group = w.group_size;
  p.bias = w.bias_or_null();
  p.activation = w.activation;
  return p;
}

at::Tensor linear_tiles(const BinaryKernels& kernels, const BinaryArguments& w) {
  return tiles_or_derived(w.tiles, *w.given_bits, linear_form(w.inputs), at::kShort,
                          tiles_size(w.planes(), w.outputs, w.inputs),
                          [&] { return derive_tiles(kernels, w.bits, w.planes(), w.outputs, w.inputs); });
}

at::Tensor linear_group_scales(const BinaryKernels& kernels, const BinaryArguments& w,
                               const at::Tensor& layout, LinearProblem& p) {
  if (p.group == 0) return {};
  const bool levels = w.quantize && takes_levels(p.plane_weights, p.planes, p.inputs);
  const auto derive = [&] {
    return group_scales_of(kernels, w.scale.const_data_ptr<float>(), w.outputs, w.groups, levels);
  };
  at::Tensor scales = layout.defined() ? kept_with_tiles(layout, w.scale, levels, derive) : derive();
  set_group_scales(scales, p);
  return scales;
}

void run_linear(const BinaryKernels& kernels, const BinaryArguments& w, const Rows& rows, at::Tensor& y) {
  LinearProblem p = weights_of(w);
  p.rows = rows.count;
  p.x = rows.x;
  p.q = rows.q;
  p.x_scale = rows.scale;
  p.y = y.mutable_data_ptr<float>();
  at::Tensor layout;
  if (kernels.uses_tiles(p)) {
    layout = linear_tiles(kernels, w);
    p.tiles = reinterpret_cast<const uint16_t*>(layout.const_data_ptr<int16_t>());
  }
  const at::Tensor scales = linear_group_scales(kernels, w, layout, p);
  run(kernels, p);
}

namespace {

// The layout is the same for all instruction sets, also those that run on the bits themselves: a layer may be
// packed under another than it runs under.
at::Tensor binary_tiles(const at::Tensor& bits, int64_t in_features) {
  const at::Tensor dense = check_bits(bits, in_features);
  const at::Tensor tiles =
      derive_tiles(binary_kernels(active_isa()), dense, planes_of(dense), dense.size(-2), in_features);
  tie_tiles(tiles, bits, linear_form(in_features));
  return tiles;
}

at::Tensor binary_linear(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, int64_t in_features,
                         at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                         const std::optional<at::Tensor>& tiles, c10::string_view activation) {
  const BinaryArguments w =
      check_binary(x, bits, scale, bias, in_features, plane_weights, group_size, compute, tiles, activation);
  check_rows(x, w);
  const Isa isa = active_isa();
  const BinaryKernels kernels = binary_kernels(isa);
  if (isa == Isa::amx) {
    const at::Tensor y = linear_on_amx(kernels, w, x, {}, x.scalar_type());
    if (y.defined()) return as_type(y, x.scalar_type());
  }
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w.outputs;
  at::Tensor y = dense_tensor(shape, at::kFloat);
  if (y.numel() > 0) {
    const int64_t count = y.numel() / w.outputs;
    const at::Tensor values = values_of(x, w, at::MemoryFormat::Contiguous);
    Rows rows{count, values.const_data_ptr<float>(), nullptr, nullptr};
    c10::DataPtr memory;  // a tensor would take small products a twentieth of their time
    if (w.quantize) {
      const size_t scales = sizeof(float) * static_cast<size_t>(count);
      memory = c10::GetCPUAllocator()->allocate(scales + static_cast<size_t>(count * w.inputs));
      auto* const scale = static_cast<float*>(memory.mutable_get());
      auto* const q = reinterpret_cast<int8_t*>(scale + count);
      quantize_rows(kernels, rows.x, count, w.inputs, q, scale);
      rows = {count, nullptr, q, scale};
    }
    run_linear(kernels, w, rows, y);
  }
  return as_type(y, x.scalar_type());
}

}  // namespace
}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CPU, m) {
  m.impl("binary_tiles", &quantopt::binary_tiles);
  m.impl("binary_linear", &quantopt::binary_linear);
}

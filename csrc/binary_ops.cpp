// quantopt::binary_linear and quantopt::binary_tiles on the CPU: checks, conversions and threads around the
// kernels of cpu/kernels/binary_linear.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels/binary_linear.h"

namespace {

using quantopt::BinaryLinear;
using quantopt::Isa;

// The kernels of one instruction set.
struct Kernels {
  decltype(&quantopt::portable::binary_uses_tiles) uses_tiles;
  decltype(&quantopt::portable::binary_tiles) tiles;
  decltype(&quantopt::portable::binary_linear) linear;
  decltype(&quantopt::portable::quantize_row) quantize_row;
};

#define QUANTOPT_KERNELS(isa)                                                                    \
  Kernels {                                                                                      \
    quantopt::isa::binary_uses_tiles, quantopt::isa::binary_tiles, quantopt::isa::binary_linear, \
        quantopt::isa::quantize_row                                                              \
  }

Kernels active_kernels() {
  switch (quantopt::active_isa()) {
#ifdef QUANTOPT_HAVE_AVX512VNNI
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

// Many rows of x: each thread takes rows. Few: each takes outputs.
void run(const Kernels& kernels, const BinaryLinear& p) {
  constexpr int64_t kRows = 8;  // a multiple of the rows that the kernels take together
  if (p.rows >= 2 * kRows * at::get_num_threads()) {
    at::parallel_for(0, (p.rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
      kernels.linear(p, begin * kRows, std::min(end * kRows, p.rows), 0, p.outputs);
    });
    return;
  }
  // Below about 2^18 multiply-adds another thread takes longer to start than to do its share.
  const int64_t work = p.rows * p.inputs * p.planes * quantopt::kItemRows;
  const int64_t grain = 1 + (int64_t{1} << 18) / (work + 1);
  at::parallel_for(0, (p.outputs + quantopt::kItemRows - 1) / quantopt::kItemRows, grain,
                   [&](int64_t begin, int64_t end) {
                     kernels.linear(p, 0, p.rows, begin * quantopt::kItemRows,
                                    std::min(end * quantopt::kItemRows, p.outputs));
                   });
}

at::Tensor binary_tiles_with(const Kernels& kernels, const at::Tensor& planes, int64_t in_features) {
  const int64_t outputs = planes.size(1), count = quantopt::tile_count(outputs);
  const int64_t words = quantopt::tile_words(in_features);
  at::Tensor tiles =
      at::empty({planes.size(0), count * words * quantopt::kTileRows}, at::TensorOptions().dtype(at::kShort));
  const uint8_t* bits = planes.const_data_ptr<uint8_t>();
  auto* out = reinterpret_cast<uint16_t*>(tiles.mutable_data_ptr<int16_t>());
  for (int64_t plane = 0; plane < planes.size(0); ++plane) {
    at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      kernels.tiles(bits + plane * planes.size(1) * planes.size(2), outputs, in_features,
                    out + plane * count * words * quantopt::kTileRows, begin, end);
    });
  }
  return tiles;
}

// bits as [P, N, ceil(K / 8)], dense.
at::Tensor as_planes(const at::Tensor& bits, int64_t in_features) {
  TORCH_CHECK_VALUE(in_features >= 0, "quantopt: in_features must be at least 0, not ", in_features);
  TORCH_CHECK_TYPE(bits.scalar_type() == at::kByte, "quantopt: bits must be uint8, not ", bits.scalar_type());
  TORCH_CHECK_VALUE(bits.dim() == 2 || bits.dim() == 3,
                    "quantopt: bits must be [N, ceil(K/8)] or [P, N, ceil(K/8)], not ", bits.sizes());
  TORCH_CHECK_VALUE(bits.size(-1) == (in_features + 7) / 8, "quantopt: bits have ", bits.size(-1),
                    " bytes per row, in_features=", in_features, " needs ", (in_features + 7) / 8);
  return (bits.dim() == 2 ? bits.unsqueeze(0) : bits).contiguous();
}

at::Tensor binary_tiles(const at::Tensor& bits, int64_t in_features) {
  const at::Tensor planes = as_planes(bits, in_features);
  const Kernels kernels = active_kernels();
  BinaryLinear ungrouped{};
  // Instruction sets that run on the bits themselves need no tiles.
  if (!kernels.uses_tiles(ungrouped)) return at::empty({0}, at::TensorOptions().dtype(at::kShort));
  return binary_tiles_with(kernels, planes, in_features);
}

at::Tensor binary_linear(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, int64_t in_features,
                         at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                         const std::optional<at::Tensor>& tiles) {
  const at::Tensor planes = as_planes(bits, in_features);
  const int64_t outputs = planes.size(1),
                groups = group_size > 0 ? (in_features + group_size - 1) / group_size : 1;
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == in_features,
                    "quantopt: the last dimension of x must be in_features=", in_features, ", x has shape ",
                    x.sizes());
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
      "quantopt: x must be float32, bfloat16 or float16, not ", x.scalar_type());
  TORCH_CHECK_VALUE(static_cast<int64_t>(plane_weights.size()) == planes.size(0),
                    "quantopt: ", plane_weights.size(), " plane_weights for ", planes.size(0),
                    " planes of bits");
  TORCH_CHECK_VALUE(group_size >= 0, "quantopt: group_size must be at least 0, not ", group_size);
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, "quantopt: scale must be float32, not ",
                   scale.scalar_type());
  if (group_size > 0) {
    TORCH_CHECK_VALUE(scale.dim() == 2 && scale.size(0) == outputs && scale.size(1) == groups,
                      "quantopt: with group_size=", group_size, " scale must be [", outputs, ", ", groups,
                      "], not ", scale.sizes());
  } else {
    TORCH_CHECK_VALUE(scale.dim() == 1 && (scale.size(0) == 1 || scale.size(0) == outputs),
                      "quantopt: scale must be [1] or [", outputs, "], not ", scale.sizes());
  }
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == outputs, "quantopt: bias must be [", outputs,
                      "], not ", bias->sizes());
  }
  const bool quantize = compute == "int8";
  TORCH_CHECK_VALUE(quantize || compute == "exact", "quantopt: compute must be \"exact\" or \"int8\", not \"",
                    std::string(compute), "\"");
  std::vector<int32_t> weights;
  int64_t total_weight = 0;
  for (int64_t weight : plane_weights) {
    TORCH_CHECK_VALUE(weight >= 1 && weight <= 128, "quantopt: plane_weights must be in 1..128, not ",
                      weight);
    weights.push_back(static_cast<int32_t>(weight));
    total_weight += weight;
  }
  TORCH_CHECK_VALUE(!quantize || in_features * 127 * total_weight < (int64_t{1} << 31),
                    "quantopt: in_features=", in_features,
                    " is too large for the 32-bit sums of compute=\"int8\"; use compute=\"exact\"");

  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  const int64_t rows =
      in_features > 0 ? x.numel() / in_features : c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  at::Tensor y = at::empty({rows, outputs}, at::TensorOptions().dtype(at::kFloat));
  if (y.numel() > 0) {
    const Kernels kernels = active_kernels();
    at::Tensor values = x.to(at::kFloat).contiguous();
    const at::Tensor scales = scale.contiguous();
    const at::Tensor offsets = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
    BinaryLinear p{};
    p.rows = rows;
    p.outputs = outputs;
    p.inputs = in_features;
    p.planes = planes.size(0);
    p.bits = planes.const_data_ptr<uint8_t>();
    p.plane_weights = weights.data();
    p.scale = scales.const_data_ptr<float>();
    p.scale_stride = scale.numel() == 1 && group_size == 0 ? 0 : groups;
    p.group = group_size;
    p.bias = bias ? offsets.const_data_ptr<float>() : nullptr;
    p.y = y.mutable_data_ptr<float>();
    at::Tensor quantized, row_scale;
    if (quantize) {
      quantized = at::empty({rows, in_features}, values.options());
      row_scale = at::empty({rows}, values.options());
      const float* from = values.const_data_ptr<float>();
      float* to = quantized.mutable_data_ptr<float>();
      float* row = row_scale.mutable_data_ptr<float>();
      at::parallel_for(0, rows, 1 + 32768 / (in_features + 1), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
          row[m] = kernels.quantize_row(from + m * in_features, in_features, to + m * in_features);
        }
      });
      values = quantized;
      p.x_scale = row;
    }
    p.x = values.const_data_ptr<float>();
    at::Tensor layout;
    if (kernels.uses_tiles(p)) {
      const int64_t words = quantopt::tile_words(in_features), count = quantopt::tile_count(outputs);
      if (tiles && tiles->numel() > 0) {
        TORCH_CHECK_VALUE(
            tiles->scalar_type() == at::kShort && tiles->is_contiguous() &&
                tiles->numel() == p.planes * count * words * quantopt::kTileRows,
            "quantopt: tiles do not belong to these bits; derive them with binary_tiles(bits, in_features)");
        layout = *tiles;
      } else {
        layout = binary_tiles_with(kernels, planes, in_features);
      }
      p.tiles = reinterpret_cast<const uint16_t*>(layout.const_data_ptr<int16_t>());
    }
    run(kernels, p);
  }
  return y.view(shape).to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(quantopt, CPU, m) {
  m.impl("binary_tiles", &binary_tiles);
  m.impl("binary_linear", &binary_linear);
}

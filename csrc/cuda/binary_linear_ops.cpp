// quantopt::binary_linear and binary_tiles on CUDA: checks and memory around the kernels of binary_linear.h,
// and the products by the library.
#include <ATen/core/Tensor.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "binary_arguments.h"
#include "cuda/binary_dispatch.h"
#include "cuda/binary_torch.h"
#include "cuda/torch_cuda.h"

namespace quantopt {
namespace {

at::Tensor make_tiles(const at::Tensor& bits, int64_t inputs, const CudaPlace& place) {
  const int64_t count = planes_of(bits), outputs = bits.size(-2);
  at::Tensor tiles = at::empty({count, tile_plane_words(outputs, inputs)}, bits.options().dtype(at::kInt));
  if (tiles.numel() > 0) {
    check(binary_tiles_on_cuda(bits.const_data_ptr<uint8_t>(), count, outputs, inputs,
                               reinterpret_cast<uint32_t*>(tiles.mutable_data_ptr<int32_t>()), place));
  }
  return tiles;
}

at::Tensor binary_tiles(const at::Tensor& bits, int64_t in_features) {
  const at::Tensor dense = check_bits(bits, in_features);
  const c10::DeviceGuard guard(dense.device());
  const at::Tensor tiles = make_tiles(dense, in_features, cuda_place(dense.device()));
  tie_tiles(tiles, bits, {in_features, 1, 1});
  return tiles;
}

// W as the library reads it: whole numbers of `type`, padded with zeros to 8 rows and 16 columns.
at::Tensor expand(const at::Tensor& bits, int64_t inputs, at::IntArrayRef plane_weights, at::ScalarType type,
                  const CudaPlace& place) {
  const int64_t columns = ceil_divide(inputs, 16) * 16, outputs = ceil_divide(bits.size(-2), 8) * 8;
  const at::Tensor dense = at::empty({outputs, columns}, bits.options().dtype(type));
  if (dense.numel() == 0) return dense;
  BinaryExpansion expansion{bits.const_data_ptr<uint8_t>(),
                            bits.size(-2),
                            inputs,
                            planes_of(bits),
                            {},
                            type == at::kChar   ? Expanded::kInt8
                            : type == at::kHalf ? Expanded::kFloat16
                                                : Expanded::kBFloat16,
                            dense.mutable_data_ptr(),
                            outputs,
                            columns};
  std::copy(plane_weights.begin(), plane_weights.end(), expansion.plane_weights);
  check(binary_expand_on_cuda(expansion, place));
  return dense;
}

at::Tensor binary_tiles_and_weight(const at::Tensor& bits, int64_t in_features, at::IntArrayRef plane_weights,
                                   at::ScalarType dtype) {
  const at::Tensor dense = check_bits(bits, in_features);
  TORCH_CHECK_VALUE(dtype == at::kChar || dtype == at::kHalf || dtype == at::kBFloat16,
                    "quantopt: dtype must be int8, float16 or bfloat16, not ", dtype);
  int64_t total = 0;
  for (int64_t weight : plane_weights) {
    TORCH_CHECK_VALUE(weight >= 1, "quantopt: plane_weights must be at least 1, not ", weight);
    total += weight;
  }
  const auto planes = static_cast<int64_t>(plane_weights.size());
  TORCH_CHECK_VALUE(
      planes == planes_of(dense) && planes <= kMaxPlanes && total <= most_expanded(dtype == at::kChar),
      "quantopt: plane_weights must be one for each plane of bits, at most 8 and ",
      most_expanded(dtype == at::kChar), " together, for W to be kept as ", dtype);
  const c10::DeviceGuard guard(dense.device());
  const CudaPlace place = cuda_place(dense.device());
  const at::Tensor tiles = make_tiles(dense, in_features, place);
  tie_tiles(tiles, bits, {in_features, 1, 1}, expand(dense, in_features, plane_weights, dtype, place),
            plane_weights);
  return tiles;
}

// Rows of x that the library multiplies at a time: their sums stay in the second-level cache (of an H200: 60
// MB; not measured), where binary_finish_on_cuda finds them.
constexpr int64_t kLibrarySums = int64_t{32} << 20;

// `kept`: W expanded, if it is of the type wanted here. Else it is expanded for this call: the allocator
// hands the same memory from layer to layer.
void multiply_by_library(BinaryProduct p, const at::Tensor& bits, at::IntArrayRef plane_weights,
                         const at::Tensor& kept, const CudaPlace& place) {
  const BinaryWeights& w = p.weights;
  const auto on_device = bits.options();
  const bool fp32 = p.x.dtype == Dtype::kFloat32, half = p.x.dtype == Dtype::kFloat16;
  const int64_t parts = !p.int8 && fp32 ? 3 : 1;
  const auto type = p.int8 ? at::kChar : (half ? at::kHalf : at::kBFloat16);
  const at::Tensor dense = kept.defined() && kept.scalar_type() == type
                               ? kept
                               : expand(bits, w.inputs, plane_weights, type, place);
  const int64_t columns = dense.size(1), outputs = dense.size(0);

  constexpr int64_t kLeast = 32;  // _int_mm wants more than 16 rows
  const int64_t rows =
      std::clamp<int64_t>(kLibrarySums / (4 * parts * outputs), kLeast, std::max(kLeast, p.x.rows));
  const int64_t size = fp32 ? 4 : 2, y_size = p.epilogue.dtype == Dtype::kFloat32 ? 4 : 2;
  const at::Tensor values = at::empty({parts * rows, columns}, on_device.dtype(type));
  const at::Tensor scale = at::empty({p.int8 ? rows : 0}, on_device.dtype(at::kFloat));
  const auto* const x = static_cast<const uint8_t*>(p.x.x);
  auto* const y = static_cast<uint8_t*>(p.epilogue.y);
  for (int64_t first = 0; first < p.x.rows; first += rows) {
    CudaRows some = p.x;
    some.x = x + first * some.stride * size;
    some.rows = std::min(rows, p.x.rows - first);
    p.epilogue.y = y + first * w.outputs * y_size;
    at::Tensor sums;
    if (p.int8) {
      check(quantize_rows_on_cuda(some, XLayout::kPlain, values.mutable_data_ptr<int8_t>(), columns,
                                  scale.mutable_data_ptr<float>(), place));
      p.epilogue.x_scale = scale.const_data_ptr<float>();
      // Rows beyond the last hold what was there before, and are not read again.
      sums = at::_int_mm(values.narrow(0, 0, std::max(kLeast, some.rows)), dense.t());
    } else {
      check(split_rows_on_cuda(some, values.mutable_data_ptr(), columns, place));
      sums = float_product(values.narrow(0, 0, parts * some.rows), dense.t());
    }
    check(binary_finish_on_cuda(
        {sums.const_data_ptr(), p.int8, 1, parts, some.rows, w.outputs, outputs, false}, p.epilogue, place));
  }
}

// `bits` as they were given. kernel: "" for the one that the table names. shape, splits: how mma divides the
// product; -1: as planned.
at::Tensor multiply(const at::Tensor& x, const at::Tensor& bits, const BinaryArguments& arguments,
                    int64_t in_features, at::IntArrayRef plane_weights,
                    const std::optional<at::Tensor>& tiles, c10::string_view kernel, int64_t shape,
                    int64_t splits) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == in_features,
                    "quantopt: x must have in_features=", in_features, " as its last dimension, not shape ",
                    x.sizes());
  const c10::DeviceGuard guard(x.device());
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = arguments.outputs;
  at::Tensor y = at::empty(sizes, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (y.numel() == 0) return y;
  const int64_t inputs = arguments.inputs, group = arguments.group_size;
  const char* reason = binary_linear_unsupported(arguments.plane_weights.size(), group);
  TORCH_CHECK_NOT_IMPLEMENTED(reason == nullptr, "quantopt: ", reason);
  TORCH_CHECK_VALUE(inputs <= INT32_MAX, "quantopt: in_features must be less than 2^31");

  // Rows that lie evenly, the elements of each side by side, can be read where they are.
  at::Tensor rows = rounded(x, arguments).reshape({y.numel() / arguments.outputs, inputs});
  if (inputs > 1 && rows.stride(1) != 1) rows = rows.contiguous();

  const CudaPlace place = cuda_place(x.device());
  BinaryProduct p{};
  BinaryWeights& w = p.weights;
  w.outputs = arguments.outputs;
  w.inputs = inputs;
  w.planes = static_cast<int64_t>(plane_weights.size());
  std::copy(arguments.plane_weights.begin(), arguments.plane_weights.end(), w.plane_weights);
  if (group > 0) {
    w.group_scale = arguments.scale.const_data_ptr<float>();
    w.group_units = static_cast<uint32_t>(group / kGroupUnit);
    w.groups = static_cast<uint32_t>(arguments.groups);
  }
  p.x = {rows.const_data_ptr(), dtype_of(rows), rows.size(0), inputs, rows.stride(0)};
  p.int8 = arguments.quantize;
  p.epilogue = {group > 0 ? nullptr : arguments.scale.const_data_ptr<float>(),
                arguments.scale_stride(),
                nullptr,
                arguments.bias_or_null(),
                arguments.activation,
                dtype_of(y),
                y.mutable_data_ptr()};
  if (inputs == 0) {  // nothing to add up
    const at::Tensor sums = at::zeros_like(y, y.options().dtype(at::kFloat));
    check(binary_finish_on_cuda(
        {sums.const_data_ptr(), false, 1, 1, rows.size(0), w.outputs, w.outputs, false}, p.epilogue, place));
    return y;
  }

  const int64_t multiplied = p.int8 || p.x.dtype != Dtype::kFloat32 ? p.x.rows : 3 * p.x.rows;
  BinaryKernel chosen = choose_binary_kernel(w, p.int8, multiplied, place.capability);
  if (!kernel.empty()) {
    TORCH_CHECK_VALUE(find_binary_kernel({kernel.data(), kernel.size()}, chosen),
                      "quantopt: kernel must be \"gemv\", \"mma\", \"library\" or \"wgmma\", not \"",
                      std::string(kernel), "\"");
    TORCH_CHECK_VALUE(binary_kernel_fits(chosen, w, p.int8, multiplied, place.capability),
                      "quantopt: the kernel ", std::string(kernel), " does not take this product");
  }
  if (tiles && tiles->numel() > 0) {
    TORCH_CHECK_VALUE(tiles->scalar_type() == at::kInt && tiles->is_contiguous() &&
                          tiles->device() == x.device() &&
                          tiles->numel() == w.planes * tile_plane_words(w.outputs, w.inputs),
                      "quantopt: tiles do not belong to these bits; derive them anew from the bits");
  }
  const bool fit = tiles && tiles_fit(*tiles, bits, {inputs, 1, 1});
  if (chosen == BinaryKernel::kLibrary) {
    const at::Tensor kept = fit ? weight_of_tiles(*tiles, plane_weights) : at::Tensor();
    multiply_by_library(p, arguments.bits, plane_weights, kept, place);
    return y;
  }
  const at::Tensor layout = fit ? *tiles : make_tiles(arguments.bits, inputs, place);
  w.tiles = reinterpret_cast<const uint32_t*>(layout.const_data_ptr<int32_t>());
  if (chosen == BinaryKernel::kGemv) {
    check(binary_gemv_on_cuda(w, p.x, p.epilogue, place));
    return y;
  }
  const MmaPlan plan{static_cast<int>(shape), static_cast<int>(splits)};
  const bool wgmma = chosen == BinaryKernel::kWgmma;
  const int64_t shapes = static_cast<int64_t>(wgmma ? std::size(kWgmmaTokens) : std::size(kMmaShapes));
  const int64_t most_splits = wgmma ? std::min<int64_t>(8, tile_block_count(inputs)) : 65535;
  TORCH_CHECK_VALUE(shape < shapes && (shape < 0 || (splits > 0 && splits <= most_splits)),
                    "quantopt: shape must be less than ", shapes, ", splits in 1..", most_splits);
  for (int64_t first = 0; first < rows.size(0); first += kMmaRows) {
    BinaryProduct some = p;
    some.x.x = static_cast<const uint8_t*>(p.x.x) + first * p.x.stride * rows.element_size();
    some.x.rows = std::min(kMmaRows, rows.size(0) - first);
    some.epilogue.y = static_cast<uint8_t*>(p.epilogue.y) + first * w.outputs * y.element_size();
    std::vector<at::Tensor> memory;
    const auto allocate = [&](int64_t bytes) {
      memory.push_back(at::empty({bytes}, x.options().dtype(at::kByte)));
      return memory.back().mutable_data_ptr();
    };
    check(multiply_by_mma(some, wgmma, place, allocate, shape >= 0 ? &plan : nullptr));
  }
  return y;
}

at::Tensor binary_linear(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, int64_t in_features,
                         at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                         const std::optional<at::Tensor>& tiles, c10::string_view activation) {
  const BinaryArguments arguments =
      check_binary(x, bits, scale, bias, in_features, plane_weights, group_size, compute, activation);
  return multiply(x, bits, arguments, in_features, plane_weights, tiles, "", -1, 1);
}

at::Tensor binary_linear_by(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                            const std::optional<at::Tensor>& bias, int64_t in_features,
                            at::IntArrayRef plane_weights, c10::string_view kernel, int64_t shape,
                            int64_t splits, int64_t group_size, c10::string_view compute,
                            const std::optional<at::Tensor>& tiles, c10::string_view activation) {
  const BinaryArguments arguments =
      check_binary(x, bits, scale, bias, in_features, plane_weights, group_size, compute, activation);
  return multiply(x, bits, arguments, in_features, plane_weights, tiles, kernel, shape, splits);
}

}  // namespace
}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CUDA, m) {
  m.impl("binary_tiles", &quantopt::binary_tiles);
  m.impl("binary_tiles_and_weight", &quantopt::binary_tiles_and_weight);
  m.impl("binary_linear", &quantopt::binary_linear);
  m.impl("binary_linear_by", &quantopt::binary_linear_by);
}

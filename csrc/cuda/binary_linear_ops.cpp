// quantopt::binary_linear and binary_tiles on CUDA: checks and memory around the kernels of binary_linear.h,
// and the products by cuBLAS.
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
#include "dtype.h"
#include "tiles.h"

namespace quantopt {
namespace {

at::Tensor make_tiles(const at::Tensor& bits, int64_t inputs, const CudaContext& context) {
  const int64_t count = planes_of(bits), outputs = bits.size(-2);
  at::Tensor tiles = at::empty({count, tile_plane_words(outputs, inputs)}, bits.options().dtype(at::kInt));
  if (tiles.numel() > 0) {
    check(binary_tiles_on_cuda(bits.const_data_ptr<uint8_t>(), count, outputs, inputs,
                               reinterpret_cast<uint32_t*>(tiles.mutable_data_ptr<int32_t>()), context));
  }
  return tiles;
}

at::Tensor binary_tiles(const at::Tensor& bits, int64_t in_features) {
  const at::Tensor dense = check_bits(bits, in_features);
  const c10::DeviceGuard guard(dense.device());
  const at::Tensor tiles = make_tiles(dense, in_features, cuda_context(dense.device()));
  tie_tiles(tiles, bits, {in_features, 1, 1});
  return tiles;
}

// W as cuBLAS reads it: whole numbers of `type`, padded with zeros to 8 rows and 16 columns.
at::Tensor expand(const BinaryArguments& w, at::ScalarType type, const CudaContext& context) {
  const int64_t columns = ceil_divide(w.inputs, 16) * 16, outputs = ceil_divide(w.outputs, 8) * 8;
  const at::Tensor dense = at::empty({outputs, columns}, w.bits.options().dtype(type));
  if (dense.numel() == 0) return dense;
  BinaryExpansion expansion{w.bits.const_data_ptr<uint8_t>(),
                            w.outputs,
                            w.inputs,
                            w.planes(),
                            {},
                            type == at::kChar   ? Expanded::kInt8
                            : type == at::kHalf ? Expanded::kFloat16
                                                : Expanded::kBFloat16,
                            dense.mutable_data_ptr(),
                            outputs,
                            columns};
  std::copy(w.plane_weights.begin(), w.plane_weights.end(), expansion.plane_weights);
  check(binary_expand_on_cuda(expansion, context));
  return dense;
}

// Bytes of sums that cuBLAS makes at a time: they stay in the second-level cache (of an H200: 60 MB), where
// binary_epilogue_on_cuda finds them.
constexpr int64_t kCublasSums = int64_t{32} << 20;

// W is expanded for each call: the allocator hands the same memory from layer to layer.
void multiply_by_cublas(BinaryProduct p, const BinaryArguments& a, const CudaContext& context) {
  const BinaryWeights& w = p.weights;
  const auto on_device = a.bits.options();
  const bool fp32 = p.x.dtype == Dtype::kFloat32;
  const int64_t parts = !p.int8 && fp32 ? 3 : 1;
  const auto type = p.int8 ? at::kChar : (p.x.dtype == Dtype::kFloat16 ? at::kHalf : at::kBFloat16);
  const at::Tensor dense = expand(a, type, context);
  const int64_t columns = dense.size(1), outputs = dense.size(0);

  constexpr int64_t kLeast = 32;  // _int_mm wants more than 16 rows
  const int64_t rows =
      std::clamp<int64_t>(kCublasSums / (4 * parts * outputs), kLeast, std::max(kLeast, p.x.rows));
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
                                  scale.mutable_data_ptr<float>(), context));
      p.epilogue.x_scale = scale.const_data_ptr<float>();
      // Rows beyond the last hold what was there before, and are not read again.
      sums = at::_int_mm(values.narrow(0, 0, std::max(kLeast, some.rows)), dense.t());
    } else {
      check(split_rows_on_cuda(some, values.mutable_data_ptr(), columns, context));
      sums = float_product(values.narrow(0, 0, parts * some.rows), dense.t());
    }
    check(binary_epilogue_on_cuda(
        {sums.const_data_ptr(), p.int8, 1, parts, some.rows, w.outputs, outputs, false}, p.epilogue,
        context));
  }
}

// A kernel asked for by name, and how it divides the product; "": the one that the table names, divided as
// planned.
struct Forced {
  c10::string_view kernel = "";
  int64_t shape = -1, splits = 1;
};

at::Tensor multiply(const at::Tensor& x, const BinaryArguments& a, const Forced& forced = {}) {
  check_rows(x, a);
  const c10::DeviceGuard guard(x.device());
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = a.outputs;
  at::Tensor y = at::empty(sizes, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (y.numel() == 0) return y;
  const int64_t inputs = a.inputs, group = a.group_size;
  const char* reason = binary_linear_unsupported(a.planes(), group);
  TORCH_CHECK_NOT_IMPLEMENTED(reason == nullptr, "quantopt: ", reason);
  TORCH_CHECK_VALUE(inputs <= INT32_MAX, "quantopt: in_features must be less than 2^31");

  // Rows that lie evenly, the elements of each side by side, can be read where they are.
  at::Tensor rows = rounded(x, a).reshape({y.numel() / a.outputs, inputs});
  if (inputs > 1 && rows.stride(1) != 1) rows = rows.contiguous();

  const CudaContext context = cuda_context(x.device());
  BinaryProduct p{};
  BinaryWeights& w = p.weights;
  w.outputs = a.outputs;
  w.inputs = inputs;
  w.planes = a.planes();
  std::copy(a.plane_weights.begin(), a.plane_weights.end(), w.plane_weights);
  if (group > 0) {
    w.group_scale = a.scale.const_data_ptr<float>();
    w.group_units = static_cast<uint32_t>(group / kGroupUnit);
    w.groups = static_cast<uint32_t>(a.groups);
  }
  p.x = {rows.const_data_ptr(), dtype_of(rows, "quantopt", "x"), rows.size(0), inputs, rows.stride(0)};
  p.int8 = a.quantize;
  p.epilogue = {group > 0 ? nullptr : a.scale.const_data_ptr<float>(),
                a.scale_stride(),
                nullptr,
                a.bias_or_null(),
                a.activation,
                dtype_of(y, "quantopt", "y"),
                y.mutable_data_ptr()};
  if (inputs == 0) {  // nothing to add up
    const at::Tensor sums = at::zeros_like(y, y.options().dtype(at::kFloat));
    check(binary_epilogue_on_cuda(
        {sums.const_data_ptr(), false, 1, 1, rows.size(0), w.outputs, w.outputs, false}, p.epilogue,
        context));
    return y;
  }

  const int64_t multiplied = p.int8 || p.x.dtype != Dtype::kFloat32 ? p.x.rows : 3 * p.x.rows;
  BinaryKernel chosen = choose_binary_kernel(w, p.int8, multiplied, context.capability);
  if (!forced.kernel.empty()) {
    const std::string kernel(forced.kernel);
    TORCH_CHECK_VALUE(find_binary_kernel(kernel, chosen),
                      "quantopt: kernel must be \"gemv\", \"mma\", \"cublas\" or \"wgmma\", not \"", kernel,
                      "\"");
    TORCH_CHECK_VALUE(binary_kernel_fits(chosen, w, p.int8, multiplied, context.capability),
                      "quantopt: the kernel ", kernel, " does not take this product");
  }
  if (chosen == BinaryKernel::kCublas) {
    multiply_by_cublas(p, a, context);
    return y;
  }
  const at::Tensor layout = tiles_or_derived(a.tiles, *a.given_bits, {inputs, 1, 1}, at::kInt,
                                             w.planes * tile_plane_words(w.outputs, w.inputs),
                                             [&] { return make_tiles(a.bits, inputs, context); });
  w.tiles = reinterpret_cast<const uint32_t*>(layout.const_data_ptr<int32_t>());
  if (chosen == BinaryKernel::kGemv) {
    check(binary_gemv_on_cuda(w, p.x, p.epilogue, context));
    return y;
  }
  const int64_t shape = forced.shape, splits = forced.splits;
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
    check(multiply_by_mma(some, wgmma, context, allocate, shape >= 0 ? &plan : nullptr));
  }
  return y;
}

at::Tensor binary_linear(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, int64_t in_features,
                         at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                         const std::optional<at::Tensor>& tiles, c10::string_view activation) {
  return multiply(x, check_binary(x, bits, scale, bias, in_features, plane_weights, group_size, compute,
                                  tiles, activation));
}

at::Tensor binary_linear_by(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                            const std::optional<at::Tensor>& bias, int64_t in_features,
                            at::IntArrayRef plane_weights, c10::string_view kernel, int64_t shape,
                            int64_t splits, int64_t group_size, c10::string_view compute,
                            const std::optional<at::Tensor>& tiles, c10::string_view activation) {
  const BinaryArguments arguments =
      check_binary(x, bits, scale, bias, in_features, plane_weights, group_size, compute, tiles, activation);
  return multiply(x, arguments, {kernel, shape, splits});
}

}  // namespace
}  // namespace quantopt

TORCH_LIBRARY_IMPL(quantopt, CUDA, m) {
  m.impl("binary_tiles", &quantopt::binary_tiles);
  m.impl("binary_linear", &quantopt::binary_linear);
}

// For measurements and tests alone: binary_linear by a kernel of csrc/cuda/binary_dispatch.h ("gemv", "mma",
// "cublas", "wgmma"), the tensor cores' divided by one of their shapes into so many parts of K (shape=-1: as
// planned).
TORCH_LIBRARY(quantopt_by_kernel, m) {
  m.def(
      "binary_linear_by(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int in_features, int[] "
      "plane_weights, "
      "str kernel, int shape=-1, int splits=1, int group_size=0, str compute=\"exact\", Tensor? tiles=None, "
      "str activation=\"none\") -> Tensor",
      &quantopt::binary_linear_by);
}

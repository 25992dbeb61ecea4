// Operators of the package with trivial or existing kernels, registered through torch's C++ interface or,
// with -DSTABLE_ABI, through its stable ABI: bench/stable_abi.py compiles this file both ways and times
// calls. The bodies are the same; what differs are types, checks and the memory of results.
#ifdef STABLE_ABI
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#else
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>
#endif

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/activation.h"
#include "cpu/isa.h"
#include "cpu/kernels/binary_linear.h"

namespace {

#ifdef STABLE_ABI
using Tensor = torch::stable::Tensor;
using Ints = torch::headeronly::HeaderOnlyArrayRef<int64_t>;
using Tensors = torch::headeronly::HeaderOnlyArrayRef<Tensor>;
using String = std::string_view;
using Type = torch::headeronly::ScalarType;
#define CHECK_VALUE STD_TORCH_CHECK  // a RuntimeError: the stable ABI has no other

// The C interface makes it without the dispatcher; torch::stable::empty asks that.
Tensor dense(int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

// Of torch's version counters the stable ABI has what the dispatcher finds by name.
int64_t version_of(const Tensor& tensor) {
  StableIValue stack[] = {torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_version", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<int64_t>(stack[0]);
}
#else
using Tensor = at::Tensor;
using Ints = at::IntArrayRef;
using Tensors = at::TensorList;
using String = c10::string_view;
using Type = at::ScalarType;
#define CHECK_VALUE TORCH_CHECK_VALUE

Tensor dense(int64_t rows, int64_t columns) {
  return at::detail::empty_cpu({rows, columns}, Type::Float, /*pin_memory=*/false,
                               at::MemoryFormat::Contiguous);
}

int64_t version_of(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}
#endif

#define LINEAR_OF(isa) \
  Product { quantopt::isa::binary_uses_tiles, quantopt::isa::binary_linear }
struct Product {
  decltype(&quantopt::portable::binary_uses_tiles) uses_tiles;
  decltype(&quantopt::portable::binary_linear) run;
};
const Product product = QUANTOPT_FOR_ISA(quantopt::best_isa(), LINEAR_OF);

// quantopt::binary_linear of one plane in fp32, with the checks and the kernel of a small product.
Tensor linear(const Tensor& x, const Tensor& bits, const Tensor& scale, const std::optional<Tensor>& bias,
              int64_t in_features, Ints plane_weights, int64_t group_size, String compute,
              const std::optional<Tensor>& tiles, String activation) {
  CHECK_VALUE(x.dim() == 2 && x.size(1) == in_features && x.scalar_type() == Type::Float &&
                  x.is_contiguous() && x.device().is_cpu(),
              "linear: x must be float32 [M, in_features], dense, on the CPU");
  CHECK_VALUE(bits.dim() == 2 && bits.size(1) == (in_features + 7) / 8 && bits.scalar_type() == Type::Byte &&
                  bits.is_contiguous() && bits.device().is_cpu(),
              "linear: bits must be uint8 [N, ceil(in_features / 8)], dense, on the CPU");
  const int64_t rows = x.size(0), outputs = bits.size(0);
  CHECK_VALUE(scale.dim() == 1 && (scale.size(0) == 1 || scale.size(0) == outputs) &&
                  scale.scalar_type() == Type::Float && scale.is_contiguous() && scale.device().is_cpu(),
              "linear: scale must be float32 [1] or [N], dense, on the CPU");
  if (bias) {
    CHECK_VALUE(bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == Type::Float &&
                    bias->is_contiguous() && bias->device().is_cpu(),
                "linear: bias must be float32 [N], dense, on the CPU");
  }
  CHECK_VALUE(plane_weights.size() == 1 && plane_weights[0] == 1 && group_size == 0 && compute == "exact",
              "linear: one plane, one scale for a row and compute=\"exact\" alone");
  quantopt::LinearProblem p{};
  CHECK_VALUE(quantopt::find_activation(activation, p.activation), "linear: unknown activation");
  Tensor y = dense(rows, outputs);
  const int32_t one = 1;
  p.rows = rows;
  p.outputs = outputs;
  p.inputs = in_features;
  p.planes = 1;
  p.bits = static_cast<const uint8_t*>(bits.const_data_ptr());
  p.plane_weights = &one;
  p.scale = static_cast<const float*>(scale.const_data_ptr());
  p.scale_stride = scale.size(0) == 1 ? 0 : 1;
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.y = static_cast<float*>(y.mutable_data_ptr());
  if (product.uses_tiles(p)) {
    CHECK_VALUE(tiles && tiles->scalar_type() == Type::Short, "linear: tiles must be int16");
    p.tiles = static_cast<const uint16_t*>(tiles->const_data_ptr());
  }
  product.run(p, 0, rows, 0, outputs);
  return y;
}

// A step of lists: latent -= lr grad, weight = its sign, with the checks of each tensor.
void step(String rule, Tensors params, Tensors grads, Tensors latents, const Tensor& hyper) {
  CHECK_VALUE(rule == "signs", "step: unknown rule");
  CHECK_VALUE(grads.size() == params.size() && latents.size() == params.size(),
              "step: lists of different lengths");
  const auto lr = static_cast<float>(*static_cast<const double*>(hyper.const_data_ptr()));
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t count = params[i].numel();
    for (const Tensor* tensor : {&params[i], &grads[i], &latents[i]}) {
      CHECK_VALUE(tensor->scalar_type() == Type::Float && tensor->numel() == count &&
                      tensor->is_contiguous() && tensor->device().is_cpu(),
                  "step: tensors must be float32, dense, of the sizes of params, on the CPU");
    }
    auto* const param = static_cast<float*>(params[i].mutable_data_ptr());
    auto* const latent = static_cast<float*>(latents[i].mutable_data_ptr());
    const auto* const grad = static_cast<const float*>(grads[i].const_data_ptr());
    for (int64_t k = 0; k < count; ++k) {
      latent[k] -= lr * grad[k];
      param[k] = latent[k] < 0 ? -1.0f : 1.0f;
    }
  }
}

// The sum of `count` looks at the version counter of a tensor.
int64_t versions(const Tensor& tensor, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += version_of(tensor);
  return sum;
}

constexpr const char* kLinear =
    "linear(Tensor x, Tensor bits, Tensor scale, Tensor? bias, int in_features, int[] plane_weights, "
    "int group_size=0, str compute=\"exact\", Tensor? tiles=None, str activation=\"none\") -> Tensor";
constexpr const char* kStep =
    "step(str rule, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] latents, Tensor hyper) -> ()";
constexpr const char* kVersions = "versions(Tensor tensor, int count) -> int";

#ifndef STABLE_ABI
using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                          const std::optional<at::Tensor>&, int64_t, at::IntArrayRef, int64_t,
                          c10::string_view, const std::optional<at::Tensor>&, c10::string_view);

// Seconds of `count` calls of an operator with the schema of linear through the dispatcher, without Python.
double time_linear(c10::string_view name, int64_t count, const at::Tensor& x, const at::Tensor& bits,
                   const at::Tensor& scale, const std::optional<at::Tensor>& bias, int64_t in_features,
                   const std::optional<at::Tensor>& tiles) {
  const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow(std::string(name).c_str(), "").typed<Linear>();
  const int64_t planes[] = {1};
  const at::AutoDispatchBelowAutograd no_gradients;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < count; ++i) {
    handle.call(x, bits, scale, bias, in_features, planes, 0, "exact", tiles, "none");
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
#endif

}  // namespace

#ifdef STABLE_ABI
STABLE_TORCH_LIBRARY(quantopt_stable, m) {
  m.def(kLinear);
  m.def(kStep);
  m.def(kVersions);
}

STABLE_TORCH_LIBRARY_IMPL(quantopt_stable, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("step", TORCH_BOX(&step));
  m.impl("versions", TORCH_BOX(&versions));
}
#else
TORCH_LIBRARY(quantopt_full, m) {
  m.def(kLinear);
  m.def(kStep);
  m.def(kVersions);
  m.def(
      "time_linear(str name, int count, Tensor x, Tensor bits, Tensor scale, Tensor? bias, int in_features, "
      "Tensor? tiles) -> float",
      &time_linear);
}

TORCH_LIBRARY_IMPL(quantopt_full, CPU, m) {
  m.impl("linear", &linear);
  m.impl("step", &step);
  m.impl("versions", &versions);
}
#endif

// Calls the operator through the dispatcher, as torch.ops does, but only where nothing but the CPU's kernel
// would run: no mode, subclass, transform or gradient. Those tests rely on details of torch, which
// tests/test_direct_call.py holds it to.
#include "direct_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <optional>

namespace quantopt {
namespace {

using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                          const std::optional<at::Tensor>&, int64_t, at::IntArrayRef, int64_t,
                          c10::string_view, const std::optional<at::Tensor>&, c10::string_view);

// Whether a mode or a transform sees all calls: tracing, fake tensors, torch.func, ...
bool watched() {
  const c10::DispatchKeySet keys = c10::impl::tls_local_dispatch_key_set().included_;
  return at::impl::torch_function_mode_enabled() ||
         (keys | c10::default_included_set) != c10::default_included_set;
}

// A dense tensor of the CPU that is of no subclass and that no transform has wrapped; None if `optional`.
bool plain(PyObject* object, bool optional = false) {
  if (object == Py_None) return optional;
  constexpr c10::DispatchKeySet kKeys({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                       c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  return THPVariable_CheckExact(object) && (THPVariable_Unpack(object).key_set() | kKeys) == kKeys;
}

std::optional<at::Tensor> optional_tensor(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  return THPVariable_Unpack(object);
}

bool kernel_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

bool read(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  value = PyLong_AsLongLong(object);
  if (value != -1 || PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

bool read(PyObject* object, c10::string_view& value) {
  if (!PyUnicode_CheckExact(object)) return false;
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(object, &size);
  if (data != nullptr) value = {data, static_cast<size_t>(size)};
  PyErr_Clear();
  return data != nullptr;
}

struct WithoutGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};
// Multiply-adds of a product that is over before another thread would have run.
constexpr int64_t kBrief = 1 << 14;

}  // namespace

PyObject* binary_linear_direct(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  // The fields of a PackedWeight.
  enum { kBits, kScale, kBias, kInFeatures, kPlaneWeights, kGroupSize, kTiles, kFields };
  if (count != 4 || !PyTuple_Check(arguments[1]) || PyTuple_GET_SIZE(arguments[1]) != kFields || watched()) {
    Py_RETURN_NONE;
  }
  PyObject* fields[kFields];
  for (int i = 0; i < kFields; ++i) fields[i] = PyTuple_GET_ITEM(arguments[1], i);
  if (!plain(arguments[0]) || !plain(fields[kBits]) || !plain(fields[kScale]) ||
      !plain(fields[kBias], true) || !plain(fields[kTiles], true)) {
    Py_RETURN_NONE;
  }
  const at::Tensor &x = THPVariable_Unpack(arguments[0]), &bits = THPVariable_Unpack(fields[kBits]),
                   &scale = THPVariable_Unpack(fields[kScale]);
  const std::optional<at::Tensor> bias = optional_tensor(fields[kBias]);
  const bool differentiated =
      c10::GradMode::is_enabled() && (x.requires_grad() || (bias && bias->requires_grad()));
  int64_t in_features = 0, group_size = 0;
  c10::string_view compute, activation;
  PyObject* const weights = fields[kPlaneWeights];
  if (differentiated || !kernel_type(x.scalar_type()) || scale.scalar_type() != at::kFloat ||
      !read(fields[kInFeatures], in_features) || !PyList_CheckExact(weights) ||
      !read(fields[kGroupSize], group_size) || !read(arguments[2], compute) ||
      !read(arguments[3], activation)) {
    Py_RETURN_NONE;
  }
  c10::SmallVector<int64_t, 8> plane_weights(static_cast<size_t>(PyList_GET_SIZE(weights)));
  for (size_t i = 0; i < plane_weights.size(); ++i) {
    if (!read(PyList_GET_ITEM(weights, static_cast<Py_ssize_t>(i)), plane_weights[i])) Py_RETURN_NONE;
  }
  static const c10::TypedOperatorHandle<Linear> linear =
      c10::Dispatcher::singleton().findSchemaOrThrow("quantopt::binary_linear", "").typed<Linear>();
  const std::optional<at::Tensor> tiles = optional_tensor(fields[kTiles]);
  at::Tensor y;
  {
    const bool brief =
        bits.dim() > 1 && x.numel() * bits.size(-2) * static_cast<int64_t>(plane_weights.size()) <= kBrief;
    std::optional<WithoutGil> no_gil;
    if (!brief) no_gil.emplace();
    const at::AutoDispatchBelowAutograd no_gradients;
    y = linear.call(x, bits, scale, bias, in_features, plane_weights, group_size, compute, tiles, activation);
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

}  // namespace quantopt

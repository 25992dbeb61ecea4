// A small layer takes less time than torch.ops needs to parse ten arguments. This parses them by hand and
// calls the operator through the dispatcher, as torch.ops does.
#include "binary_call.h"

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

}  // namespace

PyObject* binary_linear_call(PyObject*, PyObject* const* a, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 10 || !plain(a[0]) || !plain(a[1]) || !plain(a[2]) || !plain(a[3], true) ||
      !plain(a[8], true) || watched()) {
    Py_RETURN_NONE;
  }
  const at::Tensor &x = THPVariable_Unpack(a[0]), &scale = THPVariable_Unpack(a[2]);
  const std::optional<at::Tensor> bias = optional_tensor(a[3]);
  const bool differentiated =
      c10::GradMode::is_enabled() && (x.requires_grad() || (bias && bias->requires_grad()));
  int64_t in_features = 0, group_size = 0;
  c10::string_view compute, activation;
  if (differentiated || !kernel_type(x.scalar_type()) || scale.scalar_type() != at::kFloat ||
      !read(a[4], in_features) || !PyList_CheckExact(a[5]) || !read(a[6], group_size) ||
      !read(a[7], compute) || !read(a[9], activation)) {
    Py_RETURN_NONE;
  }
  c10::SmallVector<int64_t, 8> plane_weights(static_cast<size_t>(PyList_GET_SIZE(a[5])));
  for (size_t i = 0; i < plane_weights.size(); ++i) {
    if (!read(PyList_GET_ITEM(a[5], static_cast<Py_ssize_t>(i)), plane_weights[i])) Py_RETURN_NONE;
  }
  static const c10::TypedOperatorHandle<Linear> linear =
      c10::Dispatcher::singleton().findSchemaOrThrow("quantopt::binary_linear", "").typed<Linear>();
  const std::optional<at::Tensor> tiles = optional_tensor(a[8]);
  at::Tensor y;
  {
    const WithoutGil others_run;
    const at::AutoDispatchBelowAutograd no_gradients;
    y = linear.call(x, THPVariable_Unpack(a[1]), scale, bias, in_features, plane_weights, group_size, compute,
                    tiles, activation);
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

}  // namespace quantopt

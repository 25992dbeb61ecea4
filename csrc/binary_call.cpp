// quantopt::binary_linear called from Python as torch calls its own operators: the arguments are read here
// and the dispatcher is given values of their types. By way of torch.ops they become a stack of boxed values
// first, which takes longer than a small product.
#include "binary_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

namespace {

using Linear = at::Tensor(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& scale,
                          const std::optional<at::Tensor>& bias, int64_t in_features,
                          at::IntArrayRef plane_weights, int64_t group_size, c10::string_view compute,
                          const std::optional<at::Tensor>& tiles, c10::string_view activation);

// Whether nobody but the dispatcher has to see the tensor: a subclass may override what is done with it.
bool plain(PyObject* tensor) { return THPVariable_CheckExact(tensor); }

std::optional<at::Tensor> optional(PyObject* tensor) {
  return tensor == Py_None ? std::nullopt : std::make_optional(THPVariable_Unpack(tensor));
}

int64_t integer(PyObject* value) {
  const long long result = PyLong_AsLongLong(value);
  if (result == -1 && PyErr_Occurred()) throw python_error();
  return result;
}

c10::string_view text(PyObject* value) {
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(value, &size);
  if (data == nullptr) throw python_error();
  return {data, static_cast<size_t>(size)};
}

}  // namespace

PyObject* quantopt_binary_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 10 || !PyList_Check(arguments[5])) {
    PyErr_SetString(PyExc_TypeError, "binary_linear takes the 10 arguments of quantopt::binary_linear");
    return nullptr;
  }
  PyObject *x = arguments[0], *bits = arguments[1], *scale = arguments[2], *bias = arguments[3],
           *plane_weights = arguments[5], *tiles = arguments[8];
  if (at::impl::torch_function_mode_enabled() || !plain(x) || !plain(bits) || !plain(scale) ||
      (bias != Py_None && !plain(bias)) || (tiles != Py_None && !plain(tiles))) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  static const auto call =
      c10::Dispatcher::singleton().findSchemaOrThrow("quantopt::binary_linear", "").typed<Linear>();
  c10::SmallVector<int64_t, 8> weights;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(plane_weights); ++i) {
    weights.push_back(integer(PyList_GET_ITEM(plane_weights, i)));
  }
  const int64_t in_features = integer(arguments[4]), group_size = integer(arguments[6]);
  const c10::string_view compute = text(arguments[7]), activation = text(arguments[9]);
  at::Tensor y;
  {
    pybind11::gil_scoped_release others;
    y = call.call(THPVariable_Unpack(x), THPVariable_Unpack(bits), THPVariable_Unpack(scale), optional(bias),
                  in_features, weights, group_size, compute, optional(tiles), activation);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

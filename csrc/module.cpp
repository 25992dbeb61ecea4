// The module quantopt._C. Importing it registers the operators. Beside StepPlan it
// has a few functions whose call must cost little, without pybind11's parsing of arguments: whether a group
// of parameters is as it was, where its gradients are, and the call of a small packed layer.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/base.h"
#include "core/hyper.h"
#include "core/rules.h"
#include "cpu/conv_tiles.h"
#include "direct_call.h"
#include "step_plan.h"

namespace py = pybind11;

namespace {

// holds(states, keys, values): whether states[i][keys[k]] is values[i][k] for all i and k. states is a list
// of dicts, keys a tuple of str, values a list of tuples of as many values.
PyObject* holds(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyList_Check(arguments[0]) || !PyTuple_Check(arguments[1]) ||
      !PyList_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError, "holds(states: list[dict], keys: tuple[str, ...], values: list[tuple])");
    return nullptr;
  }
  PyObject *states = arguments[0], *keys = arguments[1], *values = arguments[2];
  const Py_ssize_t rows = PyList_GET_SIZE(states), columns = PyTuple_GET_SIZE(keys);
  if (PyList_GET_SIZE(values) != rows) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < rows; ++i) {
    PyObject* state = PyList_GET_ITEM(states, i);
    PyObject* expected = PyList_GET_ITEM(values, i);
    if (!PyDict_Check(state) || !PyTuple_Check(expected) || PyTuple_GET_SIZE(expected) != columns)
      Py_RETURN_FALSE;
    for (Py_ssize_t k = 0; k < columns; ++k) {
      PyObject* value = PyDict_GetItemWithError(state, PyTuple_GET_ITEM(keys, k));  // borrowed
      if (value == nullptr && PyErr_Occurred()) return nullptr;
      if (value != PyTuple_GET_ITEM(expected, k)) Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

// same(a, b): whether two lists hold the same objects in the same order.
PyObject* same(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyList_Check(arguments[0]) || !PyList_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "same(a: list, b: list)");
    return nullptr;
  }
  PyObject *a = arguments[0], *b = arguments[1];
  if (PyList_GET_SIZE(a) != PyList_GET_SIZE(b)) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(a); ++i) {
    if (PyList_GET_ITEM(a, i) != PyList_GET_ITEM(b, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// Attribute of a DTensor that is its shard; a new reference, or null without an error.
PyObject* shard_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  PyObject* const shard = PyObject_GetAttr(tensor, name);
  if (shard == nullptr) PyErr_Clear();
  return shard;
}

// Whether a DTensor and its gradient are laid out alike over the ranks.
bool placed_alike(PyObject* param, PyObject* grad) {
  static PyObject* const spec = PyUnicode_InternFromString("_spec");  // FSDP2 gives both the same
  static PyObject* const name = PyUnicode_InternFromString("placements");
  const auto get = [](PyObject* object, PyObject* attribute) {
    return py::reinterpret_steal<py::object>(object ? PyObject_GetAttr(object, attribute) : nullptr);
  };
  const py::object spec_a = get(param, spec), spec_b = get(grad, spec);
  if (spec_a && spec_a.is(spec_b)) return true;
  PyErr_Clear();
  const py::object a = get(param, name), b = get(grad, name);
  const int alike = a && b ? PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ) : -1;
  if (alike < 0) PyErr_Clear();
  return alike > 0;
}

// The gradient of a parameter, of a DTensor its shard; a new reference, or null without an error where
// kernels cannot read it along with the weight, or where `shard` is not what they would change.
PyObject* gradient_of(PyObject* param, PyObject* shard, const at::Tensor& weight) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  if (param != shard) {
    const py::object now = py::reinterpret_steal<py::object>(shard_of(param));
    if (now.ptr() != shard) return nullptr;
  }
  py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, name));
  if (!grad) PyErr_Clear();
  if (grad && !grad.is_none() && param != shard) {
    if (!placed_alike(param, grad.ptr())) return nullptr;
    grad = py::reinterpret_steal<py::object>(shard_of(grad.ptr()));
  }
  if (!grad || !THPVariable_CheckExact(grad.ptr())) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(grad.ptr());
  const bool fits = quantopt::gradient_fits(tensor, weight) && tensor.strides() == weight.strides();
  return fits ? grad.release().ptr() : nullptr;
}

// find_gradients(params, shards, weights): a list of the gradients, or None; see gradient_of. shards[i] is
// params[i], or the shard of that DTensor.
PyObject* find_gradients(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyList_Check(arguments[0]) || !PyList_Check(arguments[1]) ||
      !PyList_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError, "find_gradients(params: list, shards: list, weights: list)");
    return nullptr;
  }
  const Py_ssize_t size = PyList_GET_SIZE(arguments[0]);
  if (PyList_GET_SIZE(arguments[1]) != size || PyList_GET_SIZE(arguments[2]) != size) Py_RETURN_NONE;
  py::object grads = py::reinterpret_steal<py::object>(PyList_New(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* const weight = PyList_GET_ITEM(arguments[2], i);
    PyObject* const grad = THPVariable_Check(weight)
                               ? gradient_of(PyList_GET_ITEM(arguments[0], i),
                                             PyList_GET_ITEM(arguments[1], i), THPVariable_Unpack(weight))
                               : nullptr;
    if (grad == nullptr) Py_RETURN_NONE;
    PyList_SET_ITEM(grads.ptr(), i, grad);
  }
  return grads.release().ptr();
}

// A function that takes an array of arguments, as a method table wants it.
PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef fast_functions[] = {
    {"binary_linear_direct", fast(quantopt::binary_linear_direct), METH_FASTCALL,
     "binary_linear_direct(x, weight, compute, activation) -> Tensor | None: the operator's result; None: "
     "torch.ops must call it"},
    {"find_gradients", fast(find_gradients), METH_FASTCALL,
     "find_gradients(params, shards, weights) -> list | None: the gradients, where kernels can read them"},
    {"holds", fast(holds), METH_FASTCALL,
     "holds(states, keys, values) -> bool: whether states[i][keys[k]] is values[i][k] for all i and k"},
    {"same", fast(same), METH_FASTCALL,
     "same(a, b) -> bool: whether two lists hold the same objects in the same order"},
    {nullptr, nullptr, 0, nullptr},
};

// ---- StepPlan

const at::Tensor& tensor_of(py::handle object, const char* name) {
  if (!THPVariable_Check(object.ptr())) {
    throw py::type_error(std::string("StepPlan: ") + name + " must be tensors, not " +
                         Py_TYPE(object.ptr())->tp_name);
  }
  return THPVariable_Unpack(object.ptr());
}

std::optional<at::Tensor> optional_tensor(py::handle object, const char* name) {
  if (object.is_none()) return std::nullopt;
  return tensor_of(object, name);
}

// None within the list gives an undefined tensor.
std::vector<at::Tensor> tensors_of(py::handle list, const char* name) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(py::len(list));
  for (py::handle item : list) tensors.push_back(optional_tensor(item, name).value_or(at::Tensor()));
  return tensors;
}

// From a StepRecord of quantopt/rules.py, by the names of its fields.
std::unique_ptr<quantopt::StepPlan> make_plan(py::handle record, py::handle left_out, py::handle counted) {
  const auto list = [&](const char* name) { return tensors_of(record.attr(name), name); };
  const auto text = [&](const char* name) { return record.attr(name).cast<std::string>(); };
  const auto number = [&](const char* name) { return record.attr(name).cast<int64_t>(); };
  const auto flag = [&](const char* name) { return record.attr(name).cast<bool>(); };
  const auto rule = text("rule"), base = text("base");
  const auto params = list("params"), grads = list("grads"), momentum_buffers = list("momentum_buffers"),
             exp_avg_sqs = list("exp_avg_sqs"), latents = list("latents"), scales = list("scales"),
             latent_bounds = list("latent_bounds"), steps = list("steps");
  quantopt::StepRecord r{};
  r.rule = rule;
  r.base = base;
  r.params = params;
  r.grads = grads;
  r.momentum_buffers = momentum_buffers;
  r.exp_avg_sqs = exp_avg_sqs;
  r.latents = latents;
  r.scales = scales;
  r.latent_bounds = latent_bounds;
  r.steps = steps;
  r.hyper = tensor_of(record.attr("hyper"), "hyper");
  r.levels = number("levels");
  r.group_size = number("group_size");
  r.dynamic_scale = flag("dynamic_scale");
  r.nesterov = flag("nesterov");
  r.maximize = flag("maximize");
  r.decoupled = flag("decoupled");
  r.seed = number("seed");
  r.state_seed = number("state_seed");
  return std::make_unique<quantopt::StepPlan>(r, tensors_of(left_out, "left_out"),
                                              tensors_of(counted, "counted"));
}

std::unique_ptr<quantopt::TensorWatch> make_watch(py::handle tensors, py::handle counted) {
  auto watch = std::make_unique<quantopt::TensorWatch>();
  watch->add(tensors_of(tensors, "tensors"));
  watch->count_writes(tensors_of(counted, "counted"));
  return watch;
}

bool plan_valid(quantopt::StepPlan& plan, py::handle grads) {
  if (grads.is_none()) return plan.valid(std::nullopt);
  return plan.valid(tensors_of(grads, "grads"));
}

void plan_step(quantopt::StepPlan& plan, py::handle grad_scale, py::handle found_inf) {
  const auto scale = optional_tensor(grad_scale, "grad_scale"),
             found = optional_tensor(found_inf, "found_inf");
  const py::gil_scoped_release others_run;
  plan.step(scale, found);
}

// torch's exceptions as the Python ones that its operators raise, without the C++ stack.
void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

// ---- the tables of csrc/core, for the test that compares them with quantopt/rules.py

py::list rules() {
  py::list rows;
  for (const quantopt::RuleFacts& facts : quantopt::kRules) {
    rows.append(py::make_tuple(facts.name, facts.quantised, facts.latent, facts.dynamic_scale));
  }
  return rows;
}

template <size_t Count>
py::list names(const char* const (&table)[Count]) {
  py::list result;
  for (const char* name : table) result.append(name);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (PyModule_AddFunctions(m.ptr(), fast_functions) != 0) throw py::error_already_set();
  py::register_local_exception_translator(&translate);
  py::class_<quantopt::TensorWatch>(m, "TensorWatch",
                                    "Whether tensors lie in memory as they did; see csrc/tensor_watch.h.")
      .def(py::init(&make_watch), py::arg("tensors"), py::arg("counted") = py::list())
      .def("unchanged", &quantopt::TensorWatch::unchanged)
      .def("note_writes", &quantopt::TensorWatch::note_writes)
      .def("version", &quantopt::TensorWatch::version);
  py::class_<quantopt::StepPlan>(m, "StepPlan",
                                 "The steps of one list of parameters, checked once; see csrc/step_plan.h.")
      .def(py::init(&make_plan), py::arg("record"), py::arg("left_out") = py::list(),
           py::arg("counted") = py::list())
      .def_property_readonly("watched", &quantopt::StepPlan::watched,
                             py::return_value_policy::reference_internal)
      .def("valid", &plan_valid, py::arg("grads") = py::none())
      .def("step", &plan_step, py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none());
  m.def("conv_takes_tiles", &quantopt::conv_takes_tiles);
  m.def("rules", &rules);
  m.def("bases", [] { return names(quantopt::kBaseNames); });
  m.def("hyper_names", [] { return names(quantopt::kHyperNames); });
}

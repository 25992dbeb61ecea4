// The module quantopt._C. Importing it loads the library, which registers the operators. It has a few
// functions of its own, for what cannot wait: whether the plan of a step over many small tensors holds, the
// step itself, and the call of a small packed layer.
#include <Python.h>

#include <exception>

#include "direct_call.h"
#include "step_plan.h"

namespace {

// holds(states, keys, values): whether states[i][keys[k]] is values[i][k] for all i and k. states is a list
// of dicts, keys a tuple of str, values a list of tuples; anything else gives False.
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

// plan_ready(number) and plan_step(number) of csrc/step_plan.h.
PyObject* plan_ready(PyObject*, PyObject* number) {
  const long long plan = PyLong_AsLongLong(number);
  if (plan == -1 && PyErr_Occurred()) return nullptr;
  try {
    return PyBool_FromLong(quantopt::step_plan_ready(plan));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* plan_step(PyObject*, PyObject* number) {
  const long long plan = PyLong_AsLongLong(number);
  if (plan == -1 && PyErr_Occurred()) return nullptr;
  PyThreadState* const others = PyEval_SaveThread();
  try {
    quantopt::step_plan_step(plan);
  } catch (const std::exception& error) {
    PyEval_RestoreThread(others);
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  PyEval_RestoreThread(others);
  Py_RETURN_NONE;
}

// A function that takes an array of arguments, as a method table wants it.
PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"binary_linear_direct", fast(quantopt::binary_linear_direct), METH_FASTCALL,
     "binary_linear_direct(x, weight, compute, activation) -> Tensor | None: the operator's result; None: "
     "torch.ops "
     "must call it"},
    {"holds", fast(holds), METH_FASTCALL,
     "holds(states, keys, values) -> bool: whether states[i][keys[k]] is values[i][k] for all i and k"},
    {"same", fast(same), METH_FASTCALL,
     "same(a, b) -> bool: whether two lists hold the same objects in the same order"},
    {"plan_ready", plan_ready, METH_O,
     "plan_ready(number) -> bool: whether the step plan of this number still fits"},
    {"plan_step", plan_step, METH_O, "plan_step(number): one step of the plan"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
  return PyModule_Create(&definition);
}

#pragma once

#include <Python.h>

// binary_linear(x, bits, scale, bias, in_features, plane_weights, group_size, compute, tiles, activation): as
// torch.ops.quantopt.binary_linear, or NotImplemented where something overrides operators in Python: for a
// tensor of a subclass, or in a TorchFunctionMode.
PyObject* quantopt_binary_linear(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

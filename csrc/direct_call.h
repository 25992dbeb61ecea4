// A call of quantopt::binary_linear from Python that parses its arguments itself: torch.ops takes longer for
// that than a small layer for its product.
#pragma once

#include <Python.h>

namespace quantopt {

// binary_linear_direct(x, weight, compute, activation), weight a quantopt.packed_weight.PackedWeight: the
// result of the operator; None where torch.ops must call it (see the source).
PyObject* binary_linear_direct(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace quantopt

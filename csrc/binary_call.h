// The call of quantopt::binary_linear from Python, without the general parsing of arguments by torch.ops.
#pragma once

#include <Python.h>

namespace quantopt {

// binary_linear(...) with the operator's arguments, all of them, by position: its result for a plain call
// (see the source), else None.
PyObject* binary_linear_call(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace quantopt

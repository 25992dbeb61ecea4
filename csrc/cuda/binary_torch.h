// Errors of the launchers as exceptions.
#pragma once

#include <c10/util/Exception.h>

namespace quantopt {

inline void check(const char* error) { TORCH_CHECK(error == nullptr, "quantopt: CUDA: ", error); }

}  // namespace quantopt

// What setup.py generates for csrc/ops.cpp, for the host.
#pragma once

#define QUANTOPT_BUILD_INFO "{}"

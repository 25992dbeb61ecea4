// Quantisation of rows of x to int8, compiled for every instruction set. No torch here.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

QUANTOPT_DECLARE_PER_ISA(
    // The largest |x| of a row (core/quantize.h: an infinity or NaN counts as the largest).
    float row_magnitude(const float* x, int64_t inputs);
    // Symmetric quantisation of a row: s = max|x| / 127, q = x / s rounded half to even, within +-127. A row
    // of zeros gives s = 0 and q = 0; one with an infinity or NaN gives s = NaN and q = 0. Returns s.
    float quantize_row(const float* x, int64_t inputs, int8_t* q);)

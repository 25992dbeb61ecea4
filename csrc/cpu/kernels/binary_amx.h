// Linear and conv2d with packed +-1 weights and int8 or bfloat16 activations on AMX. No torch here.
#pragma once

#include <cstdint>

#include "cpu/kernels/binary_conv.h"

namespace quantopt::amx {

// Rows from which AMX is used in place of lookups, estimated: a prototype with int8 took, for 4096x4096 on a
// processor with AMX, 0.24 ms for 8 rows and 1.70 ms for 128 (bfloat16 has twice as much to multiply);
// lookups in fp32 take 0.84 ms for 8 rows and 13 ms for 128 on Zen 4.
constexpr int64_t kLeastRows = 8;

// Whether the products are ones for this kernel: enough rows of y, and levels that are exact as a signed byte
// (with int8 activations) or as bfloat16.
bool binary_amx_covers(bool int8, const int32_t* plane_weights, int64_t planes, int64_t rows);

// Parts of the work, of about as many operations each: bands of outputs of a block of rows, block after
// block.
int64_t binary_amx_parts(const ConvProblem& conv);

// Bytes of working memory, aligned to 64, for one call.
int64_t binary_amx_memory(const ConvProblem& conv);

// Parts [begin, end). conv.channels is not 0. Each sum is taken in an order that depends on the channels and
// the kernel alone.
void binary_amx(const ConvProblem& conv, int64_t begin, int64_t end, void* memory);

}  // namespace quantopt::amx

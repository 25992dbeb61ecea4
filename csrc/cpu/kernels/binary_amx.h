// Linear and conv2d with packed +-1 weights and int8 or bfloat16 activations on AMX. No torch here.
#pragma once

#include <cstdint>

#include "cpu/kernels/binary_conv.h"

namespace quantopt::amx {

// Fewest rows with which tiles take less time than lookups. Measured for 4096x4096 on an Intel Xeon (family
// 6, model 207), one thread, while its tile loads and products overlapped: in int8 lookups took 0.73 ms with
// 8 rows and 1.54 with 16, tiles 1.26 and 1.35; in bf16 1.12 and 2.38, 1.58 and 1.87. The lines meet at these
// rows. Other sizes and processors are not measured.
constexpr int64_t least_rows(bool int8) { return int8 ? 14 : 13; }

// Whether the levels are exact as a signed byte (with int8 activations) or as bfloat16.
bool binary_amx_covers(bool int8, const int32_t* plane_weights, int64_t planes);

// Parts of the work, of about as many operations each: bands of outputs of a block of rows, block after
// block.
int64_t binary_amx_parts(const ConvProblem& conv);

// Bytes of working memory, aligned to 64, for one call.
int64_t binary_amx_memory(const ConvProblem& conv);

// Parts [begin, end). conv.channels is not 0. Each sum is taken in an order that depends on the channels and
// the kernel alone.
void binary_amx(const ConvProblem& conv, int64_t begin, int64_t end, void* memory);

}  // namespace quantopt::amx

// Linear and conv2d with packed +-1 weights and int8 or bfloat16 activations on AMX tiles. No torch here.
#pragma once

#include <cstdint>

#include "cpu/kernels/binary_conv.h"

namespace quantopt::amx {

// Rows from which tiles are faster than lookups. Never measured with these kernels. int8: a prototype on a
// processor with AMX took, for 4096x4096, 0.24 ms for 8 rows, 1.70 ms for 128 and 6.9 ms for 512; one row by
// dot products took 0.09 ms. bfloat16 has twice as many tiles to multiply, so 0.48 ms for up to 16 rows and
// 3.4 ms for 128, by arithmetic; lookups in fp32 take 0.84 ms for 8 rows and 13 ms for 128 on Zen 4.
constexpr int64_t kLeastRows = 8;

// Whether the products are ones for this kernel: enough rows of y, and levels that are exact as a signed byte
// (with int8 activations) or as bfloat16.
bool binary_amx_covers(bool int8, const int32_t* plane_weights, int64_t planes, int64_t rows);

// Parts of the work, of about as many operations each: bands of outputs of a block of rows, block after
// block.
int64_t binary_amx_parts(const BinaryConv& conv);

// Bytes of working memory, aligned to 64, for one call.
int64_t binary_amx_memory(const BinaryConv& conv);

// Parts [begin, end). conv.channels is not 0. Each sum is taken in an order that depends on the channels and
// the kernel alone.
void binary_amx(const BinaryConv& conv, int64_t begin, int64_t end, void* memory);

}  // namespace quantopt::amx

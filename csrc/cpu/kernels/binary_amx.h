// Linear and conv2d with packed +-1 weights and int8 activations on AMX tiles. No torch here.
#pragma once

#include <cstdint>

#include "cpu/kernels/binary_conv.h"

namespace quantopt::amx {

// Rows from which tiles are faster than lookups. Measured on a processor with AMX with a prototype only,
// 4096x4096: 0.24 ms for 8 rows, 1.70 ms for 128, 6.9 ms for 512; one row by dot products took 0.09 ms.
constexpr int64_t kLeastRows = 8;

// Rows of y that share the weights that are expanded for them.
constexpr int64_t kBlockRows = 256;

// Whether the product is one for this kernel: enough rows, int8 activations, and levels that fit a signed
// byte.
bool binary_amx_covers(const BinaryConv& conv);

// Bytes of working memory, aligned to 64, for one call on `rows` rows.
int64_t binary_amx_memory(const BinaryConv& conv, int64_t rows);

// Rows [row_begin, row_end) of the images * out_height * out_width rows of y, outputs [begin, end); begin is
// a multiple of kBandRows, and so is end unless it is the last.
void binary_amx(const BinaryConv& conv, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                void* memory);

}  // namespace quantopt::amx

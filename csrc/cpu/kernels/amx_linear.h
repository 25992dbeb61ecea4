// y = x W^T + b with packed +-1 weights on the tile registers of AMX. No torch here.
#pragma once

#include <cstdint>

#include "cpu/kernels/binary_linear.h"

namespace quantopt::amx {

// How x is multiplied: quantised to int8 row by row, as the bfloat16 that it is, or, in fp32, as the three
// bfloat16 parts that add up to it. Products of bfloat16 and whole numbers up to 256 are exact, and so is
// each row's multiplication by a power of two before and after: "exact" in the sense of fp32 sums.
enum class Form : int32_t { int8, bfloat16, parts };

// One product of packed weights with M rows of x on registers.
struct Product {
  LinearProblem p;  // without x, q and y
  Form form;
  const float* x;          // [M, K], or null
  const uint16_t* x_bf16;  // the same in bfloat16, or null
  const float* x_scale;    // the scales to quantise each row by; null: those of the rows
  float* y;                // [M, N], or null
  uint16_t* y_bf16;        // the same in bfloat16, or null
  int64_t y_stride;        // elements from one row of y to the next
};

// Whether there is a kernel for these weights. With groups of scales: levels of a multiple of 32 weights,
// else groups of whole steps, 64 weights in int8 and 32 in bfloat16.
bool takes(const LinearProblem& weights, Form form, bool levels);

// Bytes of the rows of x as registers, and of working memory of one call, both aligned to 64 bytes and faster
// on whole pages.
int64_t rows_memory(const Product& product);
int64_t working_memory(const Product& product);

// Rows [begin, end) of x.
constexpr int64_t kRowsTogether = 32;  // of a block: `multiply` begins at multiples of it
void put_rows(const Product& product, int64_t begin, int64_t end, void* rows);
// y of rows [row_begin, row_end) and tiles [begin, end) of outputs. The sums of a row depend on K alone.
void multiply(const Product& product, const void* rows, int64_t row_begin, int64_t row_end, int64_t begin,
              int64_t end, void* memory);

}  // namespace quantopt::amx

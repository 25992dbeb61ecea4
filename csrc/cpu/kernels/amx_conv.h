// conv2d with packed +-1 weights on the tile registers of AMX. No torch here.
//
// An image is laid out in slots, zero around it, so that the 16 pixels of a register are slots one after
// another whatever the stride, and those that a kernel position meets are some slots further on
// (cpu/conv_plan.h makes the plan of it). A slot holds the channels of a pixel; or, where those fill a step
// badly, those of all columns of the kernel side by side.
#pragma once

#include <cstdint>

#include "cpu/kernels/amx_linear.h"
#include "cpu/kernels/binary_conv.h"

namespace quantopt::amx {

// A kernel position that meets the image: its number, among rows of the kernel alone where columns are side
// by side, and how many slots from that of y's pixel its own is.
struct ConvTap {
  int64_t number, slots;
};

// A line of slots: pixels of row `row` of the image (less than 0: none) in [begin, end), the first of which
// is in column `column`, zeros beside them.
struct ConvLine {
  int64_t row, column, begin, end;
};

// What a row of a register is: a pixel of y, counted in the images that are laid out together; -1: none.
struct ConvPlace {
  int32_t pixel, image;
};

// One or two registers, from which slots on, and which taps meet an image in them.
struct ConvBlock {
  int64_t slot[2];
  int32_t registers;
  int32_t consecutive;  // all rows are pixels, one behind the other, of one image
  int32_t row_begin, row_end, column_begin, column_end;
  ConvPlace places[2 * 16];
};

// The layout of some images whose slots alternate.
struct ConvSlots {
  int64_t images;
  bool side_by_side;  // columns of the kernel
  int64_t count;      // of slots, those included that are read behind the last line
  int64_t width;      // of a line, for each image
  int64_t line_count, tap_rows, tap_columns, block_count;
  const ConvLine* lines;
  const ConvTap* taps;  // [tap_rows, tap_columns]
  const ConvBlock* blocks;
};

// A convolution of x or x_bf16 of `p`, whose scales are not used.
struct Convolution {
  ConvProblem p;
  Form form;
  uint16_t* y_bf16;  // y in bfloat16, in place of p.y; or null
  int64_t group;     // weights of a row of W that share a level, its tiles being those of whole rows; or 0
  const int8_t* levels;  // with it, in int8: those of all groups, in the order of tiles (group_index)
};

// Whether there is a kernel for these weights.
bool takes(const Convolution& conv);

// Kernel columns side by side are weights in another order: `tiles`, of so many words, which take the place
// of p.tiles.
int64_t side_by_side_words(const Convolution& conv);
void put_side_by_side(const Convolution& conv, uint16_t* tiles);

// The largest magnitude in rows of an image, in the channels of all groups; an infinity or NaN if there is
// one.
float largest_value(const Convolution& conv, int64_t image, int64_t row_begin, int64_t row_end);
// What an image is divided by in int8, else multiplied by, and what its sums are multiplied by.
struct ImageFactor {
  float of_x, of_y;
};
ImageFactor factor_for(Form form, float largest);

// Bytes of a slot, and of working memory of one call; to be aligned to 64.
int64_t slot_bytes(const Convolution& conv, const ConvSlots& slots);
int64_t putting_memory(const Convolution& conv, const ConvSlots& slots);
int64_t working_memory(const Convolution& conv, const ConvSlots& slots);

// Lines [begin, end) of the images from `image` on into their slots.
void put_lines(const Convolution& conv, const ConvSlots& slots, const ImageFactor* factors, int64_t image,
               int64_t begin, int64_t end, char* to, void* memory);

// y of blocks [block_begin, block_end) of each of `groups` layouts, one behind the other, whose first image
// is `image`, in tiles [begin, end) of outputs. A sum's order depends on the kernel,
// the channels and the order of positions alone.
void multiply(const Convolution& conv, const ConvSlots& slots, const ImageFactor* factors, int64_t image,
              int64_t groups, int64_t block_begin, int64_t block_end, int64_t begin, int64_t end,
              const char* from, void* memory);

}  // namespace quantopt::amx

// Products of int8 activations with +-1 weights on AMX tiles.
//
// The weights are expanded on the fly, 32 outputs and 512 weights of each at a time, to signed bytes that
// serve a block of rows of x. The rows of the block are gathered once as tiles: 16 rows of 64 bytes each, for
// a convolution those that the kernel meets, position after position, zero outside the image. Two by two
// tiles of sums, so that each tile that is loaded is used twice. Sums are whole numbers: no order changes
// them.
#include "cpu/kernels/binary_amx.h"

#include <immintrin.h>

#include <cstring>

#include "cpu/kernels/amx_tile.h"
#include "cpu/kernels/binary_expand.h"
#include "cpu/kernels/binary_finish.h"

namespace quantopt::amx {
namespace {

constexpr int64_t kTile = kQuarters;  // rows of a tile
constexpr int64_t kTileBytes = kTile * kStep;
constexpr int64_t kPanelSteps = 8;  // steps that are expanded together

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

struct Memory {
  int8_t* rows;   // [tile of rows][step][row][byte]
  int8_t* panel;  // [step][half of the outputs][quarter of the step][output][4 weights]
  int32_t* sums;  // [row][output]
};

int64_t lay_out(const BinaryConv& c, int64_t rows, char* base, Memory* memory) {
  const int64_t block = up(least(rows, kBlockRows), kTile);
  const int64_t row_bytes = block * row_steps(c) * kStep, panel_bytes = kPanelSteps * 2 * kTileBytes;
  if (memory != nullptr) {
    memory->rows = reinterpret_cast<int8_t*>(base);
    memory->panel = reinterpret_cast<int8_t*>(base + row_bytes);
    memory->sums = reinterpret_cast<int32_t*>(base + row_bytes + panel_bytes);
  }
  return row_bytes + panel_bytes + block * kTileRows * static_cast<int64_t>(sizeof(int32_t));
}

// Where the kernel position `tap` meets the image for row `row` of y, or null outside.
inline const int8_t* pixel_at(const BinaryConv& c, int64_t row, int64_t tap) {
  const int64_t image = row / (c.out_height * c.out_width), pixel = row % (c.out_height * c.out_width);
  const int64_t iy = pixel / c.out_width * c.stride[0] - c.padding[0] + tap / c.kernel[1] * c.dilation[0];
  const int64_t ix = pixel % c.out_width * c.stride[1] - c.padding[1] + tap % c.kernel[1] * c.dilation[1];
  if (iy < 0 || iy >= c.height || ix < 0 || ix >= c.width) return nullptr;
  return c.q + ((image * c.height + iy) * c.width + ix) * c.x_stride;
}

// `size` words of 16 bytes, of which `bytes` are read and the rest is zero.
template <int64_t size>
inline void copy(const int8_t* from, int64_t bytes, int8_t* to) {
  static_assert(size == 1 || size == kStepWords);
  if constexpr (size == 1) {
    const __mmask16 mask = static_cast<__mmask16>(bytes >= 16 ? 0xFFFF : (1u << bytes) - 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_loadu_epi8(from == nullptr ? 0 : mask, from));
  } else {
    const __mmask64 mask = bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(from == nullptr ? 0 : mask, from));
  }
}

// Rows [begin, end) of y: what they are products of, as tiles.
template <int64_t size>
void gather(const BinaryConv& c, int64_t begin, int64_t end, int8_t* out) {
  const int64_t steps = row_steps(c), taps = c.kernel[0] * c.kernel[1];
  for (int64_t row = begin; row < end; ++row) {
    int8_t* to = out + (row - begin) / kTile * steps * kTileBytes + (row - begin) % kTile * kStep;
    int64_t word = 0;  // of the row
    const auto place = [&] { return to + word / kStepWords * kTileBytes + word % kStepWords * 16; };
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int8_t* from = pixel_at(c, row, tap);
      for (int64_t k = 0; k < c.channels; k += 16 * size, word += size) {
        copy<size>(from == nullptr ? nullptr : from + k, c.channels - k, place());
      }
    }
    for (; word < steps * kStepWords; word += size) copy<size>(nullptr, 0, place());
  }
}

// Tiles: sums 0 to 3 (rows x outputs), rows 4 and 5, weights 6 and 7.
TileConfig config_of(int64_t rows0, int64_t rows1) {
  TileConfig config;
  for (int half = 0; half < 2; ++half) {
    config.shape(half, rows0, kStep);
    config.shape(2 + half, rows1, kStep);
    config.shape(6 + half, kTile, kStep);
  }
  config.shape(4, rows0, kStep);
  config.shape(5, rows1, kStep);
  return config;
}

// sums += rows * panel over `steps` steps, for one tile of rows or two; they begin at zero if `fresh`.
template <bool two>
void multiply(const int8_t* rows, int64_t next_rows, const int8_t* panel, int64_t steps, bool fresh,
              int32_t* sums) {
  constexpr int64_t kStride = kTileRows * sizeof(int32_t);
  int32_t* below = sums + kTile * kTileRows;
  if (fresh) {
    tile_zero<0>();
    tile_zero<1>();
    if constexpr (two) {
      tile_zero<2>();
      tile_zero<3>();
    }
  } else {
    tile_load<0>(sums, kStride);
    tile_load<1>(sums + kTile, kStride);
    if constexpr (two) {
      tile_load<2>(below, kStride);
      tile_load<3>(below + kTile, kStride);
    }
  }
  for (int64_t step = 0; step < steps; ++step, rows += kTileBytes, panel += 2 * kTileBytes) {
    tile_load<4>(rows, kStep);
    tile_load<6>(panel, kStep);
    tile_load<7>(panel + kTileBytes, kStep);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    if constexpr (two) {
      tile_load<5>(rows + next_rows, kStep);
      tile_multiply<2, 5, 6>();
      tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(sums, kStride);
  tile_store<1>(sums + kTile, kStride);
  if constexpr (two) {
    tile_store<2>(below, kStride);
    tile_store<3>(below + kTile, kStride);
  }
}

// One tile of outputs for a block of gathered rows.
void tile_of_outputs(const BinaryConv& c, int64_t row, int64_t rows, int64_t tile, const Memory& memory) {
  const int64_t steps = row_steps(c), pairs = rows / (2 * kTile) * (2 * kTile), rest = rows - pairs;
  const Words words(c, tile);
  const TileConfig full = config_of(kTile, kTile);
  const TileConfig last = config_of(least(rest, kTile), rest > kTile ? rest - kTile : 0);
  for (int64_t step = 0; step < steps; step += kPanelSteps) {
    const int64_t count = least(kPanelSteps, steps - step);
    expand<false>(c, words, step, count, memory.panel);
    for (int64_t m = 0; m < rows; m += 2 * kTile) {
      if (m == 0 && pairs > 0) tile_configure(full);
      if (m == pairs) tile_configure(last);
      const int8_t* from = memory.rows + (m / kTile * steps + step) * kTileBytes;
      int32_t* sums = memory.sums + m * kTileRows;
      if (rows - m > kTile) {
        multiply<true>(from, steps * kTileBytes, memory.panel, count, step == 0, sums);
      } else {
        multiply<false>(from, steps * kTileBytes, memory.panel, count, step == 0, sums);
      }
    }
  }
  const int64_t pixels = c.out_height * c.out_width;
  const int64_t first = tile * kTileRows, count = least(kTileRows, c.outputs - first);
  for (int64_t m = 0; m < rows; ++m) {
    const int32_t* sums = memory.sums + m * kTileRows;
    float* y = c.y + (row + m) * c.y_stride;
    for (int64_t n = 0; n < count; ++n) y[first + n] = static_cast<float>(sums[n]);
    finish_row(y, first, first + count,
               {c.scale, c.scale_stride, c.x_scale[(row + m) / pixels], c.bias, c.activation});
  }
}

}  // namespace

bool binary_amx_covers(const BinaryConv& c) {
  int64_t most = 0;
  for (int64_t plane = 0; plane < c.planes; ++plane) most += c.plane_weights[plane];
  return c.q != nullptr && c.channels > 0 && most <= 127 &&
         c.images * c.out_height * c.out_width >= kLeastRows;
}

int64_t binary_amx_memory(const BinaryConv& c, int64_t rows) { return lay_out(c, rows, nullptr, nullptr); }

void binary_amx(const BinaryConv& c, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                void* base) {
  Memory memory;
  lay_out(c, row_end - row_begin, static_cast<char*>(base), &memory);
  for (int64_t row = row_begin; row < row_end; row += kBlockRows) {
    const int64_t rows = least(kBlockRows, row_end - row);
    if (c.channels % kStep == 0) {
      gather<kStepWords>(c, row, row + rows, memory.rows);
    } else {
      gather<1>(c, row, row + rows, memory.rows);
    }
    for (int64_t tile = begin / kTileRows; tile < tile_count(end); ++tile) {
      tile_of_outputs(c, row, rows, tile, memory);
    }
  }
  tile_release();
}

}  // namespace quantopt::amx

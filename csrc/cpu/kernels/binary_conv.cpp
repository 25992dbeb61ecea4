// conv2d with packed weights by lookups (binary_lookup.h), with AVX2 and AVX-512.
//
// The tables of a pixel are made once and serve all kernel positions and outputs that meet it: a ring of
// tables holds the rows of the image that the present row of y needs. Four neighbouring pixels of y are
// computed together. Each sum is taken in an order that depends on the kernel alone: the same bits for any
// number of threads.
#include "cpu/kernels/binary_conv.h"

#include "cpu/kernels/binary_lookup.h"

namespace quantopt::QUANTOPT_ISA {

#if defined(QUANTOPT_LOOKUPS)

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of the image from the first to the last that a row of y meets.
inline int64_t ring_rows(const BinaryConv& c) {
  return least((c.kernel[0] - 1) * c.dilation[0] + 1, c.height);
}

// Types of the exact and of the whole-number form.
struct Exact {
  using Value = float;
  using Entry = float;
  using Total = Pair;
  static const Value* values(const BinaryConv& c) { return c.x; }
  static int64_t entries(int64_t words) { return kFloatTables * words; }
};
struct Whole {
  using Value = int8_t;
  using Entry = int16_t;
  using Total = IntegerPair;
  static const Value* values(const BinaryConv& c) { return c.q; }
  static int64_t entries(int64_t words) { return integer_entries(words); }
};

// Entries of the tables of one pixel, chunk after chunk.
template <class Form>
int64_t pixel_entries(const BinaryConv& c) {
  int64_t entries = 0;
  for (int64_t first = 0; first < c.channels; first += kChunkWidth) {
    entries += Form::entries(chunk_words(c.channels, first));
  }
  return entries;
}

template <class Form>
struct Memory {
  typename Form::Entry* tables;  // [ring rows, width, entries of a pixel], then those of a pixel of zeros
  int32_t* sums;                 // [ring rows, width] sums of the whole numbers of a pixel
  int64_t* present;              // [ring rows] which row of which image is there, or -1
};

inline int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class Form>
int64_t lay_out(const BinaryConv& c, char* base, Memory<Form>* memory) {
  const int64_t ring = ring_rows(c), entry = static_cast<int64_t>(sizeof(typename Form::Entry));
  const int64_t tables = up((ring * c.width + 1) * pixel_entries<Form>(c) * entry);
  const int64_t sums = up(ring * c.width * static_cast<int64_t>(sizeof(int32_t)));
  if (memory != nullptr) {
    memory->tables = reinterpret_cast<typename Form::Entry*>(base);
    memory->sums = reinterpret_cast<int32_t*>(base + tables);
    memory->present = reinterpret_cast<int64_t*>(base + tables + sums);
  }
  return tables + sums + up(ring * static_cast<int64_t>(sizeof(int64_t)));
}

inline int32_t pixel_tables(const float* x, int64_t width, float* tables) {
  make_tables(x, width, tables);
  return 0;
}
inline int32_t pixel_tables(const int8_t* q, int64_t width, int16_t* tables) {
  return make_tables(q, width, tables);
}

// Tables of row `row` of image `image`, unless they are there.
template <class Form>
void fill_row(const BinaryConv& c, int64_t image, int64_t row, const Memory<Form>& memory) {
  const int64_t slot = row % ring_rows(c), pixel = pixel_entries<Form>(c);
  if (memory.present[slot] == image * c.height + row) return;
  memory.present[slot] = image * c.height + row;
  const typename Form::Value* x = Form::values(c) + (image * c.height + row) * c.width * c.x_stride;
  typename Form::Entry* tables = memory.tables + slot * c.width * pixel;
  for (int64_t i = 0; i < c.width; ++i, x += c.x_stride) {
    int32_t sum = 0;
    for (int64_t first = 0; first < c.channels; first += kChunkWidth) {
      sum += pixel_tables(x + first, least(kChunkWidth, c.channels - first), tables);
      tables += Form::entries(chunk_words(c.channels, first));
    }
    memory.sums[slot * c.width + i] = sum;
  }
}

// A kernel position that MR pixels of y meet, and the tables of their pixels of x there.
template <class Entry, int MR>
struct Tap {
  int64_t index;
  const Entry* tables[MR];
};

// Adds the products of some kernel positions to the totals of the tiles [begin, begin + count). With few
// channels several positions make up one segmented sum: totals are then read and written less often.
template <class Form, int MR>
void add_taps(const BinaryConv& c, const Tap<typename Form::Entry, MR>* taps, int64_t tap_count,
              int64_t begin, int64_t count, typename Form::Total* total) {
  const int64_t all_taps = c.kernel[0] * c.kernel[1];
  const int64_t tap_size = tile_count(c.outputs) * kTileRows * tile_words(c.channels);
  int64_t offset = 0;  // of the chunk's tables
  for (int64_t first = 0; first < c.channels; first += kChunkWidth) {
    const int64_t words = chunk_words(c.channels, first);
    for (int64_t plane = 0; plane < c.planes; ++plane) {
      Segment<typename Form::Entry, MR> segments[kChunkWords];
      for (int64_t t = 0; t < tap_count; ++t) {
        segments[t].w = c.tiles + (plane * all_taps + taps[t].index) * tap_size +
                        band_offset(c.outputs, c.channels, 0, first, begin);
        for (int i = 0; i < MR; ++i) segments[t].tables[i] = taps[t].tables[i] + offset;
      }
      span_tiles<MR>(segments, tap_count, words, count, c.plane_weights[plane], total);
    }
    offset += Form::entries(words);
  }
}

// MR pixels of y from (oy, ox) times the tiles [begin, end), at most kBlockTiles.
template <class Form, int MR>
void pixels(const BinaryConv& c, int64_t image, int64_t oy, int64_t ox, int64_t begin, int64_t end,
            const Memory<Form>& memory) {
  typename Form::Total total[kBlockTiles * MR];
  for (int64_t i = 0; i < (end - begin) * MR; ++i) clear(total[i]);
  const int64_t pixel = pixel_entries<Form>(c);
  const int64_t together = c.channels < kChunkWidth ? kChunkWords / tile_words(c.channels) : 1;
  const typename Form::Entry* zeros = memory.tables + ring_rows(c) * c.width * pixel;
  Tap<typename Form::Entry, MR> taps[kChunkWords];
  int64_t waiting = 0;
  int32_t sum[MR] = {};
  int32_t weights = 0;
  for (int64_t plane = 0; plane < c.planes; ++plane) weights += c.plane_weights[plane];
  for (int64_t index = 0; index < c.kernel[0] * c.kernel[1]; ++index) {
    const int64_t iy = oy * c.stride[0] - c.padding[0] + index / c.kernel[1] * c.dilation[0];
    if (iy < 0 || iy >= c.height) continue;
    const int64_t slot = iy % ring_rows(c);
    Tap<typename Form::Entry, MR>& tap = taps[waiting];
    tap.index = index;
    bool inside = false;
    for (int i = 0; i < MR; ++i) {
      const int64_t ix = (ox + i) * c.stride[1] - c.padding[1] + index % c.kernel[1] * c.dilation[1];
      tap.tables[i] = zeros;
      if (ix < 0 || ix >= c.width) continue;
      inside = true;
      tap.tables[i] = memory.tables + (slot * c.width + ix) * pixel;
      sum[i] += memory.sums[slot * c.width + ix];
    }
    waiting += inside;
    if (waiting < together) continue;
    add_taps<Form, MR>(c, taps, waiting, begin, end - begin, total);
    waiting = 0;
  }
  if (waiting > 0) add_taps<Form, MR>(c, taps, waiting, begin, end - begin, total);
  for (int i = 0; i < MR; ++i) {
    const Finish finish(c.scale, c.scale_stride, c.q != nullptr ? c.x_scale[image] : 1.0f, c.bias,
                        c.activation);
    float* y = c.y + ((image * c.out_height + oy) * c.out_width + ox + i) * c.y_stride;
    finish_tiles(total + i, MR, weights * sum[i], begin, end, c.outputs, finish, y);
  }
}

template <class Form>
void rows(const BinaryConv& c, int64_t begin, int64_t end, void* base) {
  Memory<Form> memory;
  lay_out(c, static_cast<char*>(base), &memory);
  const int64_t ring = ring_rows(c), pixel = pixel_entries<Form>(c);
  for (int64_t slot = 0; slot < ring; ++slot) memory.present[slot] = -1;
  std::memset(memory.tables + ring * c.width * pixel, 0,
              static_cast<size_t>(pixel) * sizeof(typename Form::Entry));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / c.out_height, oy = row % c.out_height;
    for (int64_t r = 0; r < c.kernel[0]; ++r) {
      const int64_t iy = oy * c.stride[0] - c.padding[0] + r * c.dilation[0];
      if (iy >= 0 && iy < c.height) fill_row(c, image, iy, memory);
    }
    for (int64_t tile = 0; tile < tile_count(c.outputs); tile += kBlockTiles) {
      const int64_t last = least(tile + kBlockTiles, tile_count(c.outputs));
      for (int64_t ox = 0; ox < c.out_width; ox += kRowsTogether) {
        switch (least(kRowsTogether, c.out_width - ox)) {
          case 1: pixels<Form, 1>(c, image, oy, ox, tile, last, memory); break;
          case 2: pixels<Form, 2>(c, image, oy, ox, tile, last, memory); break;
          case 3: pixels<Form, 3>(c, image, oy, ox, tile, last, memory); break;
          default: pixels<Form, 4>(c, image, oy, ox, tile, last, memory);
        }
      }
    }
  }
}

}  // namespace

bool binary_conv_available() { return true; }

int64_t binary_conv_memory(const BinaryConv& c) {
  return c.q != nullptr ? lay_out<Whole>(c, nullptr, nullptr) : lay_out<Exact>(c, nullptr, nullptr);
}

void binary_conv2d(const BinaryConv& c, int64_t begin, int64_t end, void* memory) {
  if (c.q != nullptr) {
    rows<Whole>(c, begin, end, memory);
  } else {
    rows<Exact>(c, begin, end, memory);
  }
}

#else

bool binary_conv_available() { return false; }
int64_t binary_conv_memory(const BinaryConv&) { return 0; }
void binary_conv2d(const BinaryConv&, int64_t, int64_t, void*) {}

#endif

}  // namespace quantopt::QUANTOPT_ISA

// conv2d with packed weights by lookups (binary_lookup.h), with AVX-512.
//
// The tables of a pixel are made once and serve all kernel positions and outputs that meet it: a ring of
// tables holds the rows of the image that the present row of y needs. Four neighbouring pixels of y are
// computed together. Each sum is taken in an order that depends on the kernel alone: the same bits for any
// number of threads.
#include "cpu/kernels/binary_conv.h"

#include "cpu/kernels/binary_lookup.h"

namespace quantopt::QUANTOPT_ISA {

#if defined(__AVX512BW__)

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of the image from the first to the last that a row of y meets.
inline int64_t ring_rows(const BinaryConv& c) { return (c.kernel[0] - 1) * c.dilation[0] + 1; }

// Types of the exact and of the whole-number form.
struct Exact {
  using Entry = float;
  using Total = Pair;
  static int64_t entries(int64_t words) { return kFloatTables * words; }
};
struct Whole {
  using Entry = int16_t;
  using Total = IntegerPair;
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

inline void pixel_tables(const float* x, int64_t width, float* tables, __m512i&) {
  make_tables(x, width, tables);
}
inline void pixel_tables(const float* x, int64_t width, int16_t* tables, __m512i& sum) {
  make_tables(x, width, tables, sum);
}

// Tables of row `row` of image `image`, unless they are there.
template <class Form>
void fill_row(const BinaryConv& c, int64_t image, int64_t row, const Memory<Form>& memory) {
  const int64_t slot = row % ring_rows(c), pixel = pixel_entries<Form>(c);
  if (memory.present[slot] == image * c.height + row) return;
  memory.present[slot] = image * c.height + row;
  const float* x = c.x + (image * c.height + row) * c.width * c.channels;
  typename Form::Entry* tables = memory.tables + slot * c.width * pixel;
  for (int64_t i = 0; i < c.width; ++i, x += c.channels) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t first = 0; first < c.channels; first += kChunkWidth) {
      pixel_tables(x + first, least(kChunkWidth, c.channels - first), tables, sum);
      tables += Form::entries(chunk_words(c.channels, first));
    }
    memory.sums[slot * c.width + i] = _mm512_reduce_add_epi32(sum);
  }
}

inline void clear(Pair& total) { total.even = total.odd = _mm512_setzero_ps(); }
inline void clear(IntegerPair& total) { total.even = total.odd = _mm512_setzero_si512(); }
inline Pair value_of(const Pair& total, int32_t) { return total; }
inline Pair value_of(const IntegerPair& total, int32_t sum) { return signed_sums(total, sum); }

// MR pixels of y from (oy, ox) times the tiles [begin, end), at most kBlockTiles.
template <class Form, int MR>
void pixels(const BinaryConv& c, int64_t image, int64_t oy, int64_t ox, int64_t begin, int64_t end,
            const Memory<Form>& memory) {
  typename Form::Total total[kBlockTiles * MR];
  for (int64_t i = 0; i < (end - begin) * MR; ++i) clear(total[i]);
  const int64_t pixel = pixel_entries<Form>(c), taps = c.kernel[0] * c.kernel[1];
  const int64_t tap_size = tile_count(c.outputs) * kTileRows * tile_words(c.channels);
  const typename Form::Entry* zeros = memory.tables + ring_rows(c) * c.width * pixel;
  int32_t sum[MR] = {};
  int32_t weights = 0;
  for (int64_t plane = 0; plane < c.planes; ++plane) weights += c.plane_weights[plane];
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t iy = oy * c.stride[0] - c.padding[0] + tap / c.kernel[1] * c.dilation[0];
    if (iy < 0 || iy >= c.height) continue;
    const int64_t slot = iy % ring_rows(c);
    const typename Form::Entry* at[MR];
    bool inside = false;
    for (int i = 0; i < MR; ++i) {
      const int64_t ix = (ox + i) * c.stride[1] - c.padding[1] + tap % c.kernel[1] * c.dilation[1];
      at[i] = zeros;
      if (ix < 0 || ix >= c.width) continue;
      inside = true;
      at[i] = memory.tables + (slot * c.width + ix) * pixel;
      sum[i] += memory.sums[slot * c.width + ix];
    }
    if (!inside) continue;
    for (int64_t first = 0; first < c.channels; first += kChunkWidth) {
      const int64_t words = chunk_words(c.channels, first);
      for (int64_t plane = 0; plane < c.planes; ++plane) {
        const uint16_t* w =
            c.tiles + (plane * taps + tap) * tap_size + tile_offset(c.outputs, c.channels, 0, first, begin);
        span_tiles<MR>(w, words, end - begin, at, c.plane_weights[plane], total);
      }
      for (int i = 0; i < MR; ++i) at[i] += Form::entries(words);
    }
  }
  for (int i = 0; i < MR; ++i) {
    float* y = c.y + ((image * c.out_height + oy) * c.out_width + ox + i) * c.outputs;
    for (int64_t tile = begin; tile < end; ++tile) {
      finish_tile(value_of(total[(tile - begin) * MR + i], weights * sum[i]), tile, c.outputs, c.scale,
                  c.scale_stride, c.x_scale != nullptr ? c.x_scale[image] : 1.0f, c.bias, c.activation, y);
    }
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
  return c.x_scale != nullptr ? lay_out<Whole>(c, nullptr, nullptr) : lay_out<Exact>(c, nullptr, nullptr);
}

void binary_conv2d(const BinaryConv& c, int64_t begin, int64_t end, void* memory) {
  if (c.x_scale != nullptr) {
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

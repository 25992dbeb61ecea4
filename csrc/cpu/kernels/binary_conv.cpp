// conv2d with packed weights by lookups (binary_lookup.h), with AVX2 and AVX-512.
//
// y is computed block by block, of about 64 pixels. The tables of a pixel of x are made once and serve all
// kernel positions and outputs that meet it: a ring of tables holds the rows of the image that the present
// block needs. Four pixels of y are computed together, such that meet the same kernel positions within the
// image where there are: no lookups go to the padding then, and all positions are one run of lookups, whose
// 16-bit sums are added to the totals when one of the pixels might overflow them. Totals of floats are taken
// in an order that depends on the kernel alone: the same bits for any number of threads.
#include "cpu/kernels/binary_conv.h"

#include <type_traits>

#include "cpu/kernels/binary_lookup.h"

namespace quantopt::QUANTOPT_ISA {

#if defined(QUANTOPT_LOOKUPS)

namespace {

constexpr int64_t kBlockPixels = 64;  // of y
constexpr int64_t kTableBytes =
    576 << 10;                       // of one chunk of the rows of a block: they fit the second-level cache
constexpr int64_t kTotalTiles = 32;  // whose totals of a block are kept
constexpr int64_t kMostTaps = 32;    // kernel positions of a run of lookups

// Types of the exact and of the whole-number form.
struct Exact {
  using Value = float;
  using Entry = float;
  using Total = Pair;
  static const Value* values(const ConvProblem& c) { return c.x; }
  static int64_t entries(int64_t words) { return kFloatTables * words; }
};
struct Whole {
  using Value = int8_t;
  using Entry = int16_t;
  using Total = IntegerPair;
  static const Value* values(const ConvProblem& c) { return c.q; }
  static int64_t entries(int64_t words) { return integer_entries(words); }
};

// How y is cut into blocks: of several images where those are small, else of rows, else of parts of a row.
struct Blocks {
  int64_t images, rows, columns;                 // of y in a block
  int64_t image_count, row_count, column_count;  // blocks
  int64_t ring;                                  // rows of x that a block meets

  int64_t count() const { return image_count * row_count * column_count; }
};

// Rows of an image that some neighbouring rows of y meet.
inline int64_t rows_met(const ConvProblem& c, int64_t rows) {
  return least((rows - 1) * c.stride[0] + (c.kernel[0] - 1) * c.dilation[0] + 1, c.height);
}

template <class Form>
Blocks blocks_of(const ConvProblem& c) {
  const int64_t entry = static_cast<int64_t>(sizeof(typename Form::Entry));
  const int64_t row = c.width * Form::entries(chunk_words(c.channels, 0)) * entry;  // bytes of a row's tables
  Blocks b;
  b.images = 1;
  b.columns = least(c.out_width, kBlockPixels);
  b.rows = least(c.out_height, kBlockPixels / b.columns);
  while (b.rows > 1 && rows_met(c, b.rows) * row > kTableBytes) --b.rows;
  if (b.rows == c.out_height && b.columns == c.out_width) {
    const int64_t most = least(kBlockPixels / (b.rows * b.columns), kTableBytes / (c.height * row));
    if (most > 1) b.images = least(most, c.images);
  }
  b.ring = b.images > 1 ? b.images * c.height : rows_met(c, b.rows);
  b.image_count = (c.images + b.images - 1) / b.images;
  b.row_count = (c.out_height + b.rows - 1) / b.rows;
  b.column_count = (c.out_width + b.columns - 1) / b.columns;
  return b;
}

template <class Form>
struct Memory {
  typename Form::Entry* tables;  // [chunks, ring rows, width, entries of a pixel]
  typename Form::Entry* zeros;   // the tables of a chunk of zeros
  typename Form::Total* totals;  // [pixels, tiles]: of a group tile after tile
  WholeSums* sums;               // [chunks, ring rows, width]
  int64_t* present;              // [chunks, ring rows] which row of which image is there, or -1
};

inline int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class Form>
int64_t lay_out(const ConvProblem& c, const Blocks& blocks, char* base, Memory<Form>* memory) {
  const int64_t chunks = (c.channels + kChunkWidth - 1) / kChunkWidth;
  const int64_t pixels = least(kBlockPixels, blocks.images * blocks.rows * blocks.columns);
  int64_t entries = 0;
  for (int64_t first = 0; first < c.channels; first += kChunkWidth) {
    entries += Form::entries(chunk_words(c.channels, first));
  }
  int64_t bytes = 0;
  const auto take = [&](auto*& place, int64_t count) {
    if (base != nullptr) place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(base + bytes);
    bytes += up(count * static_cast<int64_t>(sizeof *place));
  };
  Memory<Form> m{};
  take(m.tables, blocks.ring * c.width * entries);
  take(m.zeros, Form::entries(chunk_words(c.channels, 0)));
  take(m.totals, pixels * least(tile_count(c.outputs), kTotalTiles));
  take(m.sums, chunks * blocks.ring * c.width);
  take(m.present, chunks * blocks.ring);
  if (memory != nullptr) *memory = m;
  return bytes;
}

inline WholeSums pixel_tables(const float* x, int64_t width, float* tables) {
  make_tables(x, width, tables);
  return {};
}
inline WholeSums pixel_tables(const int8_t* q, int64_t width, int16_t* tables) {
  return make_tables(q, width, tables);
}

// What the present call computes.
template <class Form>
struct Call {
  const ConvProblem& c;
  Blocks blocks;
  Memory<Form> memory;
};

// A chunk of the channels.
template <class Form>
struct Chunk {
  int64_t first, width, words, entries;
  typename Form::Entry* tables;  // of the ring
  WholeSums* sums;
  int64_t* present;

  Chunk(const Call<Form>& call, int64_t first)
      : first(first),
        width(least(kChunkWidth, call.c.channels - first)),
        words(chunk_words(call.c.channels, first)),
        entries(Form::entries(words)) {
    const int64_t before = first / kChunkWidth * call.blocks.ring;  // rows; chunks before the last are whole
    tables = call.memory.tables + before * call.c.width * Form::entries(kChunkWords);
    sums = call.memory.sums + before * call.c.width;
    present = call.memory.present + before;
  }
};

// Tables of a chunk of row `row` of image `image`, in row `slot` of the ring, unless they are there.
template <class Form>
void fill_row(const Call<Form>& call, const Chunk<Form>& chunk, int64_t image, int64_t row, int64_t slot) {
  const ConvProblem& c = call.c;
  const int64_t line = image * c.height + row;
  if (chunk.present[slot] == line) return;
  chunk.present[slot] = line;
  const typename Form::Value* x = Form::values(c) + line * c.width * c.x_stride + chunk.first;
  for (int64_t i = slot * c.width; i < (slot + 1) * c.width; ++i, x += c.x_stride) {
    chunk.sums[i] = pixel_tables(x, chunk.width, chunk.tables + i * chunk.entries);
  }
}

// Kernel positions along one axis.
struct Range {
  int64_t begin, end;

  int64_t size() const { return begin < end ? end - begin : 0; }
  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};
inline Range both(const Range& a, const Range& b) {
  return {least(a.begin, b.begin), a.end > b.end ? a.end : b.end};
}

// The kernel positions that lie within an image of `size` where position 0 is at `origin`.
inline Range positions(int64_t origin, int64_t size, int64_t kernel, int64_t dilation) {
  const Range inside{origin < 0 ? (-origin + dilation - 1) / dilation : 0,
                     least(kernel, origin < size ? (size - origin + dilation - 1) / dilation : 0)};
  return inside.size() > 0 ? inside : Range{0, 0};
}

struct Pixel {
  int64_t image, origin[2];  // where kernel position 0 lies
  int64_t index;             // of y
  int64_t slot;              // row i of its image is row i + slot of the ring, modulo its length
  Range taps[2];
};

// Pixels that are computed together, and the kernel positions that they meet.
struct Group {
  int64_t begin, count;
  Range taps[2];
  bool alike;  // each pixel meets all of them
};

// Pixels of y from one number to another, along one axis or of images.
struct Part {
  int64_t begin, end;
};

inline Part part_of(int64_t number, int64_t size, int64_t all) {
  return {number * size, least((number + 1) * size, all)};
}

// The pixels of a block in groups.
struct Plan {
  Part images, rows, columns;
  Pixel pixels[kBlockPixels];
  Group groups[kBlockPixels];
  int64_t pixel_count = 0, group_count = 0;

  void add(int64_t count, const Range& rows, const Range& columns, bool alike) {
    groups[group_count++] = {pixel_count, count, {rows, columns}, alike};
    pixel_count += count;
  }
};

// Divides pixels into groups of neighbours with the fewest cycles.
void add_groups(const Pixel* pixels, int64_t count, Plan& plan) {
  constexpr int64_t kCost[] = {0, 33, 56, 83, 103};  // of a kernel position of a group of so many pixels
  static_assert(kRowsTogether == 4);
  int64_t best[kBlockPixels + 1] = {}, size[kBlockPixels];  // of the pixels from each on
  Range taps[kBlockPixels][2];
  for (int64_t i = count - 1; i >= 0; --i) {
    Range rows = pixels[i].taps[0], columns = pixels[i].taps[1];
    for (int64_t n = 1; n <= least(kRowsTogether, count - i); ++n) {
      rows = both(rows, pixels[i + n - 1].taps[0]);
      columns = both(columns, pixels[i + n - 1].taps[1]);
      const int64_t cost = kCost[n] * rows.size() * columns.size() + best[i + n];
      if (n > 1 && cost >= best[i]) continue;
      best[i] = cost;
      size[i] = n;
      taps[i][0] = rows;
      taps[i][1] = columns;
    }
  }
  for (int64_t i = 0; i < count; i += size[i]) {
    for (int64_t n = 0; n < size[i]; ++n) plan.pixels[plan.pixel_count + n] = pixels[i + n];
    plan.add(size[i], taps[i][0], taps[i][1], size[i] == 1);
  }
}

// The longest part from its beginning that meets the same kernel positions, which `taps` is set to.
inline Part alike(const ConvProblem& c, int axis, const Part& part, Range& taps) {
  const int64_t size = axis == 0 ? c.height : c.width;
  const auto met = [&](int64_t o) {
    return positions(o * c.stride[axis] - c.padding[axis], size, c.kernel[axis], c.dilation[axis]);
  };
  taps = met(part.begin);
  int64_t end = part.begin + 1;
  while (end < part.end && met(end) == taps) ++end;
  return {part.begin, end};
}

// Rows of one image in the ring.
inline int64_t image_rows(const ConvProblem& c, const Blocks& blocks) {
  return blocks.images > 1 ? c.height : blocks.ring;
}

void make_plan(const ConvProblem& c, const Blocks& blocks, int64_t number, Plan& plan) {
  plan.images = part_of(number / blocks.column_count / blocks.row_count, blocks.images, c.images);
  plan.rows = part_of(number / blocks.column_count % blocks.row_count, blocks.rows, c.out_height);
  plan.columns = part_of(number % blocks.column_count, blocks.columns, c.out_width);
  plan.pixel_count = plan.group_count = 0;
  Pixel rest[kBlockPixels];
  int64_t rest_count = 0;
  Range taps[2];
  for (Part y = plan.rows; y.begin < plan.rows.end; y = {y.end, plan.rows.end}) {
    y = alike(c, 0, y, taps[0]);
    for (Part x = plan.columns; x.begin < plan.columns.end; x = {x.end, plan.columns.end}) {
      x = alike(c, 1, x, taps[1]);
      const int64_t all = (plan.images.end - plan.images.begin) * (y.end - y.begin) * (x.end - x.begin);
      const int64_t grouped = all / kRowsTogether * kRowsTogether, first = plan.pixel_count;
      int64_t added = 0;
      for (int64_t image = plan.images.begin; image < plan.images.end; ++image) {
        for (int64_t oy = y.begin; oy < y.end; ++oy) {
          const int64_t origin = oy * c.stride[0] - c.padding[0], rows = image_rows(c, blocks);
          const int64_t met = origin + taps[0].begin * c.dilation[0];  // the first row of x, if any
          const int64_t slot = (image - plan.images.begin) * c.height - met / rows * rows;
          for (int64_t ox = x.begin; ox < x.end; ++ox, ++added) {
            Pixel& to = added < grouped ? plan.pixels[first + added] : rest[rest_count++];
            to = {image,
                  {origin, ox * c.stride[1] - c.padding[1]},
                  (image * c.out_height + oy) * c.out_width + ox,
                  slot,
                  {taps[0], taps[1]}};
          }
        }
      }
      for (int64_t i = 0; i < grouped; i += kRowsTogether) plan.add(kRowsTogether, taps[0], taps[1], true);
    }
  }
  add_groups(rest, rest_count, plan);
}

// A kernel position that MR pixels of y meet, and the tables of their pixels of x there.
template <class Entry, int MR>
struct Tap {
  int64_t index;
  const Entry* tables[MR];
};

// Adds the products of some kernel positions to the totals of the tiles [begin, begin + count).
template <class Form, int MR>
void add_taps(const Call<Form>& call, const Chunk<Form>& chunk, const Tap<typename Form::Entry, MR>* taps,
              int64_t tap_count, int64_t begin, int64_t count, typename Form::Total* total) {
  const ConvProblem& c = call.c;
  const int64_t all_taps = c.kernel[0] * c.kernel[1];
  const int64_t tap_size = tile_count(c.outputs) * kTileRows * tile_words(c.channels);
  const int64_t offset = tile_offset(c.outputs, c.channels, 0, chunk.first, begin);
  for (int64_t plane = 0; plane < c.planes; ++plane) {
    Segment<typename Form::Entry, MR> segments[kMostTaps];
    for (int64_t t = 0; t < tap_count; ++t) {
      segments[t].w = c.tiles + (plane * all_taps + taps[t].index) * tap_size + offset;
      for (int i = 0; i < MR; ++i) segments[t].tables[i] = taps[t].tables[i];
    }
    span_tiles<MR>(segments, tap_count, chunk.words, count, c.plane_weights[plane], total);
  }
}

// One chunk of a group of MR pixels times the tiles [begin, begin + count).
template <class Form, int MR>
void add_group(const Call<Form>& call, const Chunk<Form>& chunk, const Group& group, const Pixel* pixels,
               int64_t begin, int64_t count, typename Form::Total* total, int32_t* sum) {
  constexpr bool kWhole = std::is_same_v<Form, Whole>;
  const ConvProblem& c = call.c;
  const int64_t together = kChunkWords / chunk.words;  // kernel positions of a sum of floats
  Tap<typename Form::Entry, MR> taps[kMostTaps];
  int64_t waiting = 0;
  int32_t most[MR] = {};  // size of the 16-bit sums of those waiting
  const auto add = [&] {
    if (waiting > 0) add_taps<Form, MR>(call, chunk, taps, waiting, begin, count, total);
    waiting = 0;
  };
  for (int64_t r = group.taps[0].begin; r < group.taps[0].end; ++r) {
    int64_t row[MR];  // where it begins in the ring
    bool met[MR];
    for (int i = 0; i < MR; ++i) {
      const int64_t iy = pixels[i].origin[0] + r * c.dilation[0], slot = iy + pixels[i].slot;
      met[i] = iy >= 0 && iy < c.height;
      row[i] = (slot < call.blocks.ring ? slot : slot - call.blocks.ring) * c.width;
    }
    for (int64_t s = group.taps[1].begin; s < group.taps[1].end; ++s) {
      const int64_t index = r * c.kernel[1] + s;
      int64_t at[MR];  // in the ring, or -1
      int32_t size = 0;
      bool inside = group.alike;
      for (int i = 0; i < MR; ++i) {
        const int64_t ix = pixels[i].origin[1] + s * c.dilation[1];
        const bool here = group.alike || (met[i] && ix >= 0 && ix < c.width);
        at[i] = here ? row[i] + ix : -1;
        inside |= here;
        if (!kWhole || !here) continue;
        const WholeSums& sums = chunk.sums[at[i]];
        sum[i] += sums.all;
        most[i] += sums.most;
        size = most[i] > size ? most[i] : size;
      }
      if (!inside) continue;
      bool full = waiting == kMostTaps || size > INT16_MAX;
      if (!kWhole && waiting > 0) full |= index / together != taps[0].index / together;
      if (full) {
        add();
        for (int i = 0; kWhole && i < MR; ++i) most[i] = at[i] < 0 ? 0 : chunk.sums[at[i]].most;
      }
      Tap<typename Form::Entry, MR>& tap = taps[waiting++];
      tap.index = index;
      for (int i = 0; i < MR; ++i) {
        tap.tables[i] = at[i] < 0 ? call.memory.zeros : chunk.tables + at[i] * chunk.entries;
      }
    }
  }
  add();
}

// The tiles [begin, end) of a block's pixels of y, from their totals and the sums of the numbers they met.
template <class Form>
void epilogue(const Call<Form>& call, const Plan& plan, int64_t begin, int64_t end, const int32_t* sums) {
  const ConvProblem& c = call.c;
  const int32_t weights = largest_level(c.plane_weights, c.planes);
  for (int64_t g = 0; g < plan.group_count; ++g) {
    const Group& group = plan.groups[g];
    const auto* total = call.memory.totals + group.begin * (end - begin);
    for (int64_t i = group.begin; i < group.begin + group.count; ++i, ++total) {
      const Pixel& pixel = plan.pixels[i];
      const float x_scale = c.q != nullptr ? c.x_scale[pixel.image] : 1.0f;
      epilogue_tiles(total, group.count, weights * sums[i], begin, end, c.outputs,
                     {c.scale, c.scale_stride, x_scale, c.bias, c.activation},
                     c.y + pixel.index * c.y_stride);
    }
  }
}

// Tables of a chunk of all rows that a block meets.
template <class Form>
void fill(const Call<Form>& call, const Chunk<Form>& chunk, const Plan& plan) {
  const ConvProblem& c = call.c;
  for (int64_t image = plan.images.begin; image < plan.images.end; ++image) {
    for (int64_t oy = plan.rows.begin; oy < plan.rows.end; ++oy) {
      for (int64_t r = 0; r < c.kernel[0]; ++r) {
        const int64_t iy = oy * c.stride[0] - c.padding[0] + r * c.dilation[0];
        if (iy < 0 || iy >= c.height) continue;
        const int64_t slot = (image - plan.images.begin) * c.height + iy % image_rows(c, call.blocks);
        fill_row(call, chunk, image, iy, slot);
      }
    }
  }
}

// The tiles [begin, end), at most kTotalTiles, of a block.
template <class Form>
void block(const Call<Form>& call, const Plan& plan, int64_t begin, int64_t end) {
  const ConvProblem& c = call.c;
  const int64_t tiles = end - begin;
  typename Form::Total* const totals = call.memory.totals;
  int32_t sums[kBlockPixels] = {};
  for (int64_t i = 0; i < plan.pixel_count * tiles; ++i) clear(totals[i]);
  for (int64_t first = 0; first < c.channels; first += kChunkWidth) {
    const Chunk<Form> chunk(call, first);
    fill(call, chunk, plan);
    for (int64_t g = 0; g < plan.group_count; ++g) {
      const Group& group = plan.groups[g];
      const Pixel* pixels = plan.pixels + group.begin;
      typename Form::Total* total = totals + group.begin * tiles;
      int32_t* sum = sums + group.begin;
      switch (group.count) {
        case 1: add_group<Form, 1>(call, chunk, group, pixels, begin, tiles, total, sum); break;
        case 2: add_group<Form, 2>(call, chunk, group, pixels, begin, tiles, total, sum); break;
        case 3: add_group<Form, 3>(call, chunk, group, pixels, begin, tiles, total, sum); break;
        default: add_group<Form, 4>(call, chunk, group, pixels, begin, tiles, total, sum);
      }
    }
  }
  epilogue(call, plan, begin, end, sums);
}

inline int64_t band_count(const ConvProblem& c) { return (c.outputs + kBandRows - 1) / kBandRows; }

template <class Form>
void pieces(const ConvProblem& c, int64_t begin, int64_t end, void* base) {
  Call<Form> call{c, blocks_of<Form>(c), {}};
  lay_out(c, call.blocks, static_cast<char*>(base), &call.memory);
  const int64_t chunks = (c.channels + kChunkWidth - 1) / kChunkWidth;
  for (int64_t i = 0; i < chunks * call.blocks.ring; ++i) call.memory.present[i] = -1;
  std::memset(call.memory.zeros, 0,
              static_cast<size_t>(Form::entries(chunk_words(c.channels, 0))) * sizeof(typename Form::Entry));
  Plan plan;
  const int64_t bands = band_count(c);
  while (begin < end) {
    const int64_t number = begin / bands, first = begin % bands, last = least(bands, first + end - begin);
    begin += last - first;
    make_plan(c, call.blocks, number, plan);
    const int64_t tiles = least(last * kBandTiles, tile_count(c.outputs));
    for (int64_t tile = first * kBandTiles; tile < tiles; tile += kTotalTiles) {
      block(call, plan, tile, least(tile + kTotalTiles, tiles));
    }
  }
}

}  // namespace

bool binary_conv_available() { return true; }

int64_t binary_conv_memory(const ConvProblem& c) {
  return c.q != nullptr ? lay_out<Whole>(c, blocks_of<Whole>(c), nullptr, nullptr)
                        : lay_out<Exact>(c, blocks_of<Exact>(c), nullptr, nullptr);
}

int64_t binary_conv_pieces(const ConvProblem& c) {
  return band_count(c) * (c.q != nullptr ? blocks_of<Whole>(c) : blocks_of<Exact>(c)).count();
}

void binary_conv2d(const ConvProblem& c, int64_t begin, int64_t end, void* memory) {
  if (c.q != nullptr) {
    pieces<Whole>(c, begin, end, memory);
  } else {
    pieces<Exact>(c, begin, end, memory);
  }
}

#else

bool binary_conv_available() { return false; }
int64_t binary_conv_memory(const ConvProblem&) { return 0; }
int64_t binary_conv_pieces(const ConvProblem&) { return 0; }
void binary_conv2d(const ConvProblem&, int64_t, int64_t, void*) {}

#endif

}  // namespace quantopt::QUANTOPT_ISA

// Products with +-1 weights: by lookups (binary_lookup.h) with AVX2 and AVX-512, or with VNNI by bytes
// (binary_bytes.h) for many rows of x or few outputs; elsewhere, and for groups of scales that are no
// multiple of 16, rows of W are expanded to floats in a panel. Each output is summed in an order that depends
// on K alone: any split over threads or rows gives the same bits.
#include "cpu/kernels/binary_linear.h"

#include <cmath>
#include <cstring>

#include "cpu/kernels/binary_epilogue.h"
#include "cpu/kernels/binary_lookup.h"
#include "cpu/kernels/quantize.h"
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define QUANTOPT_BYTES
#include "cpu/kernels/binary_bytes.h"
#endif

namespace quantopt::QUANTOPT_ISA {
namespace {

inline int64_t row_bytes(int64_t inputs) { return (inputs + 7) / 8; }

// ---- panels ---

typedef float Vector __attribute__((vector_size(32)));

constexpr int64_t kPanelWidth = 256;  // a multiple of 8
constexpr int64_t kPanelRows = 8;
constexpr int64_t kLanes = 8;

struct SignTable {
  alignas(32) float value[256][8];
};
constexpr SignTable make_signs() {
  SignTable table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int j = 0; j < 8; ++j) table.value[byte][j] = (byte >> j) & 1 ? 1.0f : -1.0f;
  }
  return table;
}
constexpr SignTable kSigns = make_signs();

inline void load(const float* p, Vector& v) { std::memcpy(&v, p, sizeof v); }
inline double sum(const Vector& v) {
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// Weights [first, first + width) of one row, times the scales or levels of groups; zero up to the next
// multiple of 8.
void expand(const LinearProblem& p, int64_t n, int64_t first, int64_t width, float* out) {
  const int64_t bytes = (width + 7) / 8;
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    const uint8_t* bits = p.bits + (plane * p.outputs + n) * row_bytes(p.inputs) + first / 8;
    const float weight = static_cast<float>(p.plane_weights[plane]);
    for (int64_t i = 0; i < bytes; ++i) {
      const float* signs = kSigns.value[bits[i]];
      for (int j = 0; j < 8; ++j) {
        const float w = signs[j] * weight;
        out[8 * i + j] = plane == 0 ? w : out[8 * i + j] + w;
      }
    }
  }
  for (int64_t k = width; k < 8 * bytes; ++k) out[k] = 0.0f;
  if (p.group == 0) return;
  const int64_t groups = group_count(p);
  for (int64_t k = 0; k < width; ++k) {
    const int64_t at = group_index(n, (first + k) / p.group, groups);
    out[k] *= p.levels != nullptr ? static_cast<float>(p.levels[at]) : p.group_scales[at];
  }
}

// total[m][r] += x[m] . panel[r] over one panel. Whole numbers stay exact: a lane's sum of 32 products is
// below 2^24 for levels up to 4128.
template <int Rows>
void multiply_panel(const float* const* x, const float* panel, int64_t width, int64_t outputs,
                    double (*total)[kPanelRows]) {
  for (int64_t r = 0; r < outputs; ++r) {
    Vector acc[Rows] = {};
    for (int64_t k = 0; k < width; k += kLanes) {
      Vector w, v;
      load(panel + r * kPanelWidth + k, w);
      for (int m = 0; m < Rows; ++m) {
        load(x[m] + k, v);
        acc[m] += v * w;
      }
    }
    for (int m = 0; m < Rows; ++m) total[m][r] += sum(acc[m]);
  }
}

void linear_by_panels(const LinearProblem& p, int64_t row_begin, int64_t row_end, int64_t begin,
                      int64_t end) {
  constexpr int kRows = 4;
  constexpr int64_t kMost = 64;  // rows of x that share an expanded panel
  alignas(32) float panel[kPanelRows * kPanelWidth];
  alignas(32) float tail[kRows][kPanelWidth];  // x as floats, padded with zeros to a multiple of 8
  double total[kMost][kPanelRows];
  for (int64_t first = row_begin; first < row_end; first += kMost) {
    const int64_t rows = least(kMost, row_end - first);
    for (int64_t n = begin; n < end; n += kPanelRows) {
      const int64_t outputs = least(kPanelRows, end - n);
      std::memset(total, 0, sizeof total);
      for (int64_t k = 0; k < p.inputs; k += kPanelWidth) {
        const int64_t width = least(kPanelWidth, p.inputs - k);
        for (int64_t r = 0; r < outputs; ++r) expand(p, n + r, k, width, panel + r * kPanelWidth);
        const int64_t padded = (width + 7) / 8 * 8;
        for (int64_t m = 0; m < rows; m += kRows) {
          const int count = static_cast<int>(least(kRows, rows - m));
          const float* x[kRows];
          for (int i = 0; i < count; ++i) {
            const int64_t at = (first + m + i) * p.inputs + k;
            x[i] = tail[i];
            if (p.q != nullptr) {
              for (int64_t j = 0; j < width; ++j) tail[i][j] = p.q[at + j];
            } else if (padded == width) {
              x[i] = p.x + at;
              continue;
            } else {
              std::memcpy(tail[i], p.x + at, sizeof(float) * static_cast<size_t>(width));
            }
            for (int64_t j = width; j < padded; ++j) tail[i][j] = 0.0f;
          }
          switch (count) {
            case 1: multiply_panel<1>(x, panel, padded, outputs, total + m); break;
            case 2: multiply_panel<2>(x, panel, padded, outputs, total + m); break;
            case 3: multiply_panel<3>(x, panel, padded, outputs, total + m); break;
            default: multiply_panel<4>(x, panel, padded, outputs, total + m);
          }
        }
      }
      for (int64_t m = 0; m < rows; ++m) {
        float* y = p.y + (first + m) * p.outputs;
        for (int64_t r = 0; r < outputs; ++r) y[n + r] = static_cast<float>(total[m][r]);
        epilogue_row(y, n, n + outputs, epilogue_of(p, first + m));
      }
    }
  }
}

// ---- lookups ---

#if defined(QUANTOPT_LOOKUPS)

// The scales of a group, times the plane's weight, for the 32 rows of a tile.
inline Pair scales_of(const LinearProblem& p, int64_t tile, int64_t group, float weight) {
  const float* from = p.group_scales + group_index(tile * kTileRows, group, group_count(p));
  float scales[kTileRows];
  for (int i = 0; i < kTileRows; ++i) scales[i] = from[i] * weight;
  return load_tile(scales);
}

// The words [begin, end) that group `group` of scales has in a chunk.
struct Part {
  int64_t group, begin, end;
};
// The groups in the chunk whose first weight is `first`.
struct Parts {
  int64_t count = 0;
  Part part[kChunkWords];
  Parts(const LinearProblem& p, int64_t first) {
    const int64_t words = chunk_words(p.inputs, first);
    for (int64_t k = 0; k < words; ++count) {
      const int64_t g = (first + 16 * k) / p.group, last = least(words, ((g + 1) * p.group - first) / 16);
      part[count] = {g, k, last};
      k = last;
    }
  }
  const Part* begin() const { return part; }
  const Part* end() const { return part + count; }
};

// One chunk of the tiles [tile, end), with a scale for each group of p.group weights.
template <int MR>
void grouped_tiles(const LinearProblem& p, const uint16_t* w, int64_t first, int64_t plane, int64_t tile,
                   int64_t end, const float* const* tables, Pair* total) {
  const float weight = static_cast<float>(p.plane_weights[plane]);
  const Parts parts(p, first);
  for (; tile < end; ++tile, total += MR) {
    for (const Part& part : parts) {
      const Pair scales = scales_of(p, tile, part.group, weight);
      Segment<float, MR> segment;
      segment.w = w + part.begin * kTileRows;
      for (int i = 0; i < MR; ++i) segment.tables[i] = tables[i] + part.begin * kFloatTables;
      float_span<MR, 1>(&segment, 1, 0, part.end - part.begin, &scales, total);
    }
    w += chunk_words(p.inputs, first) * kTileRows;
  }
}

// Tables of MR rows of whole numbers in a chunk, apart for each of its groups of scales.
template <int MR>
struct GroupTables {
  alignas(64) int16_t tables[MR][kChunkWords * integer_entries(1)];  // groups may be of one word
  int64_t offset[kChunkWords];
  int32_t all[kChunkWords][MR];

  template <bool whole>
  void make(const LinearProblem& p, int64_t m, int64_t first, const Parts& parts) {
    int64_t next = 0;
    for (int64_t g = 0; g < parts.count; ++g) {
      const Part& part = parts.part[g];
      const int64_t from = first + 16 * part.begin, width = least(first + 16 * part.end, p.inputs) - from;
      offset[g] = next;
      for (int i = 0; i < MR; ++i) {
        all[g][i] = make_tables<whole>(p.q + (m + i) * p.inputs + from, width, tables[i] + next).all;
      }
      next += integer_entries(part.end - part.begin);
    }
  }
  // Sums of group g for `count` tiles, at most a band, whose words in the chunk begin at w.
  void sum(const Parts& parts, int64_t g, const uint16_t* w, int64_t pitch, int64_t count,
           ShortSums* sums) const {
    const Part& part = parts.part[g];
    Segment<int16_t, MR> segment;
    segment.w = w + part.begin * kTileRows;
    for (int i = 0; i < MR; ++i) segment.tables[i] = tables[i] + offset[g];
    span_tiles<MR>(&segment, 1, pitch, part.end - part.begin, count, false, sums);
  }
};

// MR rows of whole numbers from m times the tiles [begin, end), at most kBlockTiles, with a scale for each
// group of p.group weights: the sum of each is exact.
template <int MR>
void grouped_integer_block(const LinearProblem& p, int64_t m, int64_t begin, int64_t end) {
  GroupTables<MR> tables;
  Pair total[kBlockTiles * MR];
  for (int64_t i = 0; i < (end - begin) * MR; ++i) clear(total[i]);
  for (int64_t first = 0; first < p.inputs; first += kChunkWidth) {
    const Parts parts(p, first);
    tables.template make<false>(p, m, first, parts);
    const int64_t pitch = chunk_words(p.inputs, first);
    for (int64_t plane = 0; plane < p.planes; ++plane) {
      const float weight = static_cast<float>(p.plane_weights[plane]);
      const uint16_t* w = p.tiles + tile_offset(p.outputs, p.inputs, plane, first, begin);
      Pair* to = total;
      for (int64_t tile = begin; tile < end; tile += kBandTiles) {
        const int64_t width = band_tiles(p.outputs, tile);
        for (int64_t g = 0; g < parts.count; ++g) {
          ShortSums sums[kBandTiles * MR];
          tables.sum(parts, g, w, pitch, width, sums);
          for (int64_t r = 0; r < width; ++r) {
            const Pair scales = scales_of(p, tile + r, parts.part[g].group, weight);
            for (int i = 0; i < MR; ++i) {
              add_scaled(sums[r * MR + i], tables.all[g][i], scales, to[r * MR + i]);
            }
          }
        }
        w += width * pitch * kTileRows;
        to += width * MR;
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    epilogue_tiles(total + i, MR, 0, begin, end, p.outputs, epilogue_of(p, m + i), p.y + (m + i) * p.outputs);
  }
}

// The same with levels for scales: all of the sum is exact.
template <int MR>
void level_block(const LinearProblem& p, int64_t m, int64_t begin, int64_t end) {
  GroupTables<MR> tables;
  IntegerPair total[kBlockTiles * MR];
  for (int64_t i = 0; i < (end - begin) * MR; ++i) clear(total[i]);
  for (int64_t first = 0; first < p.inputs; first += kChunkWidth) {
    const Parts parts(p, first);
    tables.template make<true>(p, m, first, parts);
    const int64_t pitch = chunk_words(p.inputs, first);
    for (int64_t plane = 0; plane < p.planes; ++plane) {
      const uint16_t* w = p.tiles + tile_offset(p.outputs, p.inputs, plane, first, begin);
      IntegerPair* to = total;
      for (int64_t tile = begin; tile < end; tile += kBandTiles) {
        const int64_t width = band_tiles(p.outputs, tile);
        for (int64_t g = 0; g < parts.count; ++g) {
          ShortSums sums[kBandTiles * MR];
          tables.sum(parts, g, w, pitch, width, sums);
          for (int64_t r = 0; r < width; ++r) {
            const int64_t at = group_index((tile + r) * kTileRows, parts.part[g].group, group_count(p));
            const RowLevels of = load_levels(p.levels + at);
            for (int i = 0; i < MR; ++i) add_sums(sums[r * MR + i], of, to[r * MR + i]);
          }
        }
        w += width * pitch * kTileRows;
        to += width * MR;
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    epilogue_tiles(total + i, MR, 0, begin, end, p.outputs, epilogue_of(p, m + i), p.y + (m + i) * p.outputs,
                   p.plane_weights[0]);
  }
}

// MR rows of x from m times the tiles [begin, end), at most kBlockTiles.
template <int MR>
void integer_block(const LinearProblem& p, int64_t m, int64_t begin, int64_t end) {
  alignas(64) int16_t tables[MR][integer_entries(kChunkWords)];
  ShortSums sums[kBlockTiles * MR];
  IntegerPair total[kBlockTiles * MR];
  int32_t sum[MR] = {}, most[MR] = {};  // most: size of the sums of 16 bits
  const int32_t weight = largest_level(p.plane_weights, p.planes);
  const int64_t count = (end - begin) * MR;
  bool waiting = false, totals = false;
  const auto clear_totals = [&] {
    for (int64_t i = 0; i < count; ++i) clear(total[i]);
  };
  const auto add = [&](int32_t plane_weight) {
    if (!totals) clear_totals();
    for (int64_t i = 0; i < count; ++i) add_sums(sums[i], plane_weight, total[i]);
    totals = true;
    waiting = false;
  };
  for (int64_t first = 0; first < p.inputs; first += kChunkWidth) {
    const int64_t width = least(kChunkWidth, p.inputs - first), words = chunk_words(p.inputs, first);
    bool fit = true;
    int32_t sizes[MR];
    for (int i = 0; i < MR; ++i) {
      const WholeSums of = make_tables(p.q + (m + i) * p.inputs + first, width, tables[i]);
      sum[i] += of.all;
      sizes[i] = of.most;
      fit &= most[i] + of.most <= INT16_MAX;
    }
    if (waiting && !fit) add(weight);
    for (int i = 0; i < MR; ++i) most[i] = sizes[i] + (waiting ? most[i] : 0);
    for (int64_t plane = 0; plane < p.planes; ++plane) {
      Segment<int16_t, MR> segment;
      segment.w = p.tiles + tile_offset(p.outputs, p.inputs, plane, first, begin);
      for (int i = 0; i < MR; ++i) segment.tables[i] = tables[i];
      span_tiles<MR>(&segment, 1, words, words, end - begin, waiting, sums);
      waiting = true;
      if (p.planes > 1) add(p.plane_weights[plane]);
    }
  }
  if (waiting && (totals || weight != 1)) add(weight);
  if (p.inputs == 0) clear_totals();
  for (int i = 0; i < MR; ++i) {
    const Epilogue epilogue = epilogue_of(p, m + i);
    float* y = p.y + (m + i) * p.outputs;
    if (waiting) {
      epilogue_tiles(sums + i, MR, sum[i], begin, end, p.outputs, epilogue, y);
    } else {
      epilogue_tiles(total + i, MR, weight * sum[i], begin, end, p.outputs, epilogue, y);
    }
  }
}

template <int MR>
void float_block(const LinearProblem& p, int64_t m, int64_t begin, int64_t end) {
  alignas(64) float tables[MR][kChunkWords * kFloatTables];
  const float* at[MR];
  Pair total[kBlockTiles * MR];
  for (int64_t i = 0; i < (end - begin) * MR; ++i) clear(total[i]);
  for (int i = 0; i < MR; ++i) at[i] = tables[i];
  for (int64_t first = 0; first < p.inputs; first += kChunkWidth) {
    const int64_t width = least(kChunkWidth, p.inputs - first), words = chunk_words(p.inputs, first);
    for (int i = 0; i < MR; ++i) {
      make_tables(p.x + (m + i) * p.inputs + first, width, tables[i]);
    }
    for (int64_t plane = 0; plane < p.planes; ++plane) {
      const uint16_t* w = p.tiles + tile_offset(p.outputs, p.inputs, plane, first, begin);
      if (p.group != 0) {
        grouped_tiles<MR>(p, w, first, plane, begin, end, at, total);
      } else {
        Segment<float, MR> segment;
        segment.w = w;
        for (int i = 0; i < MR; ++i) segment.tables[i] = tables[i];
        span_tiles<MR>(&segment, 1, words, end - begin, p.plane_weights[plane], total);
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    epilogue_tiles(total + i, MR, 0, begin, end, p.outputs, epilogue_of(p, m + i), p.y + (m + i) * p.outputs);
  }
}

template <int MR>
inline void block(const LinearProblem& p, int64_t m, int64_t begin, int64_t end) {
  if (p.q == nullptr) return float_block<MR>(p, m, begin, end);
  if (p.levels != nullptr) return level_block<MR>(p, m, begin, end);
  if (p.group != 0) return grouped_integer_block<MR>(p, m, begin, end);
  integer_block<MR>(p, m, begin, end);
}

void linear_by_lookups(const LinearProblem& p, int64_t row_begin, int64_t row_end, int64_t begin,
                       int64_t end) {
  for (int64_t tile = begin / kTileRows; tile < tile_count(end); tile += kBlockTiles) {
    const int64_t last = least(tile + kBlockTiles, tile_count(end));
    for (int64_t m = row_begin; m < row_end; m += kRowsTogether) {
      switch (least(kRowsTogether, row_end - m)) {
        case 1: block<1>(p, m, tile, last); break;
        case 2: block<2>(p, m, tile, last); break;
        case 3: block<3>(p, m, tile, last); break;
        default: block<4>(p, m, tile, last);
      }
    }
  }
}

#endif

}  // namespace

bool binary_uses_tiles([[maybe_unused]] const LinearProblem& p) {
#if defined(QUANTOPT_LOOKUPS)
  return p.group % 16 == 0;
#else
  return false;
#endif
}

void binary_linear(const LinearProblem& p, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
#if defined(QUANTOPT_BYTES)
  if (takes_bytes(p)) return linear_by_bytes(p, row_begin, row_end, begin, end);
#endif
#if defined(QUANTOPT_LOOKUPS)
  if (p.tiles != nullptr && binary_uses_tiles(p)) {
    linear_by_lookups(p, row_begin, row_end, begin, end);
    if (p.planes == 1 || p.q != nullptr) return;
    // Summed plane by plane, an infinity becomes NaN where planes differ: such rows are multiplied by levels.
    for (int64_t m = row_begin; m < row_end; ++m) {
      if (row_magnitude(p.x + m * p.inputs, p.inputs) < INFINITY) continue;
      linear_by_panels(p, m, m + 1, begin, end);
    }
    return;
  }
#endif
  linear_by_panels(p, row_begin, row_end, begin, end);
}

}  // namespace quantopt::QUANTOPT_ISA

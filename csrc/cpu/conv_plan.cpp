#include "cpu/conv_plan.h"

#include <algorithm>

namespace quantopt {
namespace {

using amx::ConvBlock;
using amx::ConvLine;
using amx::ConvPlace;
using amx::ConvTap;

constexpr int64_t kRegister = 16;  // rows

// A kernel position along one axis that meets the image for some outputs, [begin, end) of them.
struct AxisTap {
  int64_t number, plane, shift, begin, end;
};

// Pixel `stride * u + remainder - padding` of the image is slot u - first of the plane of that remainder.
struct Plane {
  int64_t remainder, begin, end;  // the slots that are pixels
};

struct Axis {
  std::vector<AxisTap> taps;
  std::vector<Plane> planes;
  int64_t first = 0;  // what u begins with
  int64_t need = 0;   // slots that are read
  int64_t left = 0;   // slots before the pixels in all planes
  int64_t stride = 0, padding = 0;
};

int64_t up(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

Axis axis_of(const ConvProblem& c, int i) {
  const int64_t size = i == 0 ? c.height : c.width, out = i == 0 ? c.out_height : c.out_width;
  Axis axis;
  axis.stride = c.stride[i];
  axis.padding = c.padding[i];
  int64_t last = 0;
  for (int64_t k = 0; k < c.kernel[i]; ++k) {
    const int64_t at = k * c.dilation[i], u = at / c.stride[i], remainder = at % c.stride[i];
    AxisTap tap{k, 0, u, up(c.padding[i] - at, c.stride[i]), 0};
    tap.end = std::min(out, up(size + c.padding[i] - at, c.stride[i]));
    if (tap.begin >= tap.end) continue;
    while (tap.plane < static_cast<int64_t>(axis.planes.size()) &&
           axis.planes[static_cast<size_t>(tap.plane)].remainder != remainder) {
      ++tap.plane;
    }
    if (tap.plane == static_cast<int64_t>(axis.planes.size())) axis.planes.push_back({remainder, 0, 0});
    if (axis.taps.empty()) axis.first = u;
    last = u;
    axis.taps.push_back(tap);
  }
  for (AxisTap& tap : axis.taps) tap.shift -= axis.first;
  axis.need = out + last - axis.first;
  axis.left = axis.need;
  for (Plane& plane : axis.planes) {
    const auto slot = [&](int64_t x) {  // of the first pixel from x on
      const int64_t u = up(x + c.padding[i] - plane.remainder, c.stride[i]) - axis.first;
      return std::clamp<int64_t>(u, 0, axis.need);
    };
    plane.begin = slot(0);
    plane.end = slot(size);
    axis.left = std::min(axis.left, plane.begin);
  }
  return axis;
}

// Columns that are side by side in slots, one for each of y.
Axis side_by_side_axis(const ConvProblem& c) {
  Axis axis;
  axis.taps.push_back({0, 0, 0, 0, c.out_width});
  axis.planes.push_back({0, 0, c.out_width});
  axis.need = c.out_width;
  axis.stride = c.stride[1];
  axis.padding = c.padding[1];
  return axis;
}

// A line ends where its pixels and its outputs do, and where zeros of the next are as good as its own.
int64_t line_width(const Axis& columns, int64_t out_width) {
  int64_t width = std::max(out_width, columns.need - columns.left);
  for (const Plane& plane : columns.planes) width = std::max(width, plane.end);
  return width;
}

// Registers of a line, and of all lines in one run that goes on over what is between them.
int64_t registers_of_lines(const ConvProblem& c, int64_t images) {
  return c.out_height * up(c.out_width * images, kRegister);
}
int64_t registers_of_run(const ConvProblem& c, int64_t width, int64_t images) {
  return up(((c.out_height - 1) * width + c.out_width) * images, kRegister);
}

// The taps that meet the image at the outputs [begin, end]; those are neighbours.
void range_of(const std::vector<AxisTap>& taps, int64_t begin, int64_t end, int32_t& first, int32_t& last) {
  for (size_t i = 0; i < taps.size(); ++i) {
    if (taps[i].begin > end || taps[i].end <= begin) continue;
    first = std::min(first, static_cast<int32_t>(i));
    last = std::max(last, static_cast<int32_t>(i + 1));
  }
}

class Blocks {
 public:
  Blocks(const ConvProblem& c, const Axis& rows, const Axis& columns, int64_t images, int64_t width,
         std::vector<ConvBlock>& to)
      : c_(c), rows_(rows), columns_(columns), images_(images), width_(width), to_(to) {}

  // Registers of the slots [begin, end).
  void add(int64_t begin, int64_t end) {
    for (; begin < end; begin += kRegister) add_register(begin, std::min(end, begin + kRegister));
  }

 private:
  void add_register(int64_t begin, int64_t end) {
    if (to_.empty() || to_.back().registers == 2) {
      constexpr int32_t kMost = INT32_MAX;
      to_.push_back({{begin, begin}, 0, 1, kMost, 0, kMost, 0, {}});
    }
    ConvBlock& block = to_.back();
    const int64_t r = block.registers++;
    block.slot[r] = begin;
    ConvPlace* const places = block.places + r * kRegister;
    int64_t image = begin % images_, column = begin / images_ % width_, row = begin / images_ / width_;
    const int64_t first_row = row, first_column = column;
    int64_t last_row = row, last_column = column;
    for (int64_t i = 0; i < kRegister; ++i) {
      const bool some = begin + i < end && column < c_.out_width;
      places[i] = {-1, 0};
      if (some) {
        places[i] = {static_cast<int32_t>((image * c_.out_height + row) * c_.out_width + column),
                     static_cast<int32_t>(image)};
        last_row = row;
        last_column = std::max(last_column, column);
      }
      if (++image < images_) continue;
      image = 0;
      if (++column < width_) continue;
      column = 0;
      ++row;
    }
    for (int64_t i = 0; i < kRegister; ++i) {
      const ConvPlace& first = block.places[0];
      const auto behind = static_cast<int32_t>(r * kRegister + i);
      if (first.pixel < 0 || places[i].pixel != first.pixel + behind || places[i].image != first.image) {
        block.consecutive = 0;
      }
    }
    const bool one_row = first_row == last_row;
    range_of(rows_.taps, first_row, last_row, block.row_begin, block.row_end);
    range_of(columns_.taps, one_row ? first_column : 0, one_row ? last_column : c_.out_width - 1,
             block.column_begin, block.column_end);
  }

  const ConvProblem& c_;
  const Axis &rows_, &columns_;
  int64_t images_, width_;
  std::vector<ConvBlock>& to_;
};

}  // namespace

ConvPlan plan_conv(const ConvProblem& c, int64_t images, bool side_by_side) {
  ConvPlan plan;
  const Axis rows = axis_of(c, 0), columns = side_by_side ? side_by_side_axis(c) : axis_of(c, 1);
  const int64_t width = line_width(columns, c.out_width), plane_slots = rows.need * width * images;
  for (const Plane& down : rows.planes) {
    for (const Plane& across : columns.planes) {
      for (int64_t u = 0; u < rows.need; ++u) {
        const bool some = u >= down.begin && u < down.end;
        const int64_t row = (u + rows.first) * rows.stride + down.remainder - rows.padding;
        const int64_t column =
            (across.begin + columns.first) * columns.stride + across.remainder - columns.padding;
        plan.lines.push_back({some ? row : -1, column, across.begin, across.end});
      }
    }
  }
  const auto plane_count = static_cast<int64_t>(columns.planes.size());
  int64_t furthest = 0;
  for (const AxisTap& down : rows.taps) {
    for (const AxisTap& across : columns.taps) {
      const int64_t slots = (down.plane * plane_count + across.plane) * plane_slots +
                            (down.shift * width + across.shift) * images;
      plan.taps.push_back({side_by_side ? down.number : down.number * c.kernel[1] + across.number, slots});
      furthest = std::max(furthest, slots);
    }
  }
  Blocks blocks(c, rows, columns, images, width, plan.blocks);
  const int64_t run = ((c.out_height - 1) * width + c.out_width) * images;
  if (registers_of_run(c, width, images) < registers_of_lines(c, images)) {
    blocks.add(0, run);
  } else {
    for (int64_t oy = 0; oy < c.out_height; ++oy) {
      blocks.add(oy * width * images, (oy * width + c.out_width) * images);
    }
  }
  const auto lines = static_cast<int64_t>(plan.lines.size());
  const int64_t count = std::max((lines * width + columns.left) * images, run + kRegister + furthest);
  plan.slots = {images,
                side_by_side,
                count,
                width,
                lines,
                static_cast<int64_t>(rows.taps.size()),
                static_cast<int64_t>(columns.taps.size()),
                static_cast<int64_t>(plan.blocks.size()),
                plan.lines.data(),
                plan.taps.data(),
                plan.blocks.data()};
  return plan;
}

int64_t images_together(const ConvProblem& c, int64_t most, int64_t image_bytes, bool side_by_side) {
  constexpr int64_t kBytes = 512 << 10;  // of a second-level cache
  const Axis rows = axis_of(c, 0), columns = side_by_side ? side_by_side_axis(c) : axis_of(c, 1);
  const int64_t width = line_width(columns, c.out_width);
  const auto met = [](const Axis& axis) {  // pairs of a tap and an output that meet the image
    int64_t sum = 0;
    for (const AxisTap& tap : axis.taps) sum += tap.end - tap.begin;
    return sum;
  };
  int64_t best = 1;
  double least = 0.0;
  for (int64_t images = 1; images <= 2 * kRegister && images <= most; images *= 2) {
    if (images > 1 && images * image_bytes > kBytes) break;
    const int64_t lines = registers_of_lines(c, images), run = registers_of_run(c, width, images);
    const auto all = static_cast<double>(rows.taps.size() * columns.taps.size());
    double cost = static_cast<double>(std::min(lines, run)) * all;
    if (lines <= run) {  // registers of a line leave out taps beyond the image
      cost *= static_cast<double>(met(rows)) / static_cast<double>(c.out_height) /
              static_cast<double>(rows.taps.size());
      if (images == 2 * kRegister) {
        cost *= static_cast<double>(met(columns)) / static_cast<double>(c.out_width) /
                static_cast<double>(columns.taps.size());
      }
    }
    cost /= static_cast<double>(images);
    if (images > 1 && cost > 0.98 * least) continue;
    best = images;
    least = cost;
  }
  return best;
}

}  // namespace quantopt

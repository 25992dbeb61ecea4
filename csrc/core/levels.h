// Uniform grids of K levels on [-hi, hi] and the coordinates of a weight in its cell.
//
//   half = hi / (K - 1)                      half the distance between two levels, Grid::half_step
//   j    = clamp(floor((w + hi) / (2 half)), 0, K - 2)
//   mid  = -hi + (2 j + 1) half = (2 j - (K - 2)) half,   t = (w - mid) / half
// Levels are at t = -1 and t = +1; |t| may exceed 1 in the outer cells.
// sgn(0) = +1 everywhere. Source: docs/algorithms.md, section 1.
#pragma once

#include "host_device.h"
#include "scalar.h"

namespace quantopt {

constexpr int kMostLevels = 17;

// hi = max_level_factor(K) * scale. Binary: 1; else (K-1)/2 times the step of the best uniform
// quantiser of a unit Gaussian (Max 1960).
inline float max_level_factor(int levels) {
  switch (levels) {
    case 2: return 1.0f;
    case 3: return 1.224f;
    case 4: return 1.5f * 0.9957f;
    case 8: return 3.5f * 0.5860f;
    case 16: return 7.5f * 0.3352f;
    case 17: return 8.0f * 0.3189f;
    default: return 0.0f;  // not a grid of this package; callers check
  }
}

struct Grid {
  float hi;         // largest level
  float half_step;  // half = hi / (K - 1)
  float last;       // K - 2, the index of the last cell
  float full_step;  // 2 half
};

QUANTOPT_HOST_DEVICE Grid make_grid(float scale, float factor, int levels) {
  Grid grid;
  grid.hi = scale * factor;
  grid.half_step = grid.hi / static_cast<float>(levels - 1);
  grid.last = static_cast<float>(levels - 2);
  grid.full_step = 2.0f * grid.half_step;
  return grid;
}

// The middle of w's cell. Binary grids have one cell, with its middle at 0.
template <bool Binary, class F>
QUANTOPT_HOST_DEVICE F cell_middle(F w, const Grid& grid) {
  if (Binary) return fill<F>(0.0f);
  const F j = clamp(round_down((w + grid.hi) / grid.full_step), 0.0f, grid.last);
  return (2.0f * j - grid.last) * grid.half_step;  // exactly 0 in the centre cell of an even K
}

// Nearest level; a tie goes away from zero, a tie at zero to the positive level.
template <bool Binary, class F>
QUANTOPT_HOST_DEVICE F project(F w, const Grid& grid) {
  if (Binary) return with_sign_of(fill<F>(grid.hi), w);
  const F mid = cell_middle<false>(w, grid);
  const F offset = w - mid;
  const F away = select(mid < 0.0f, offset - 1.0f, offset + 1.0f);
  return mid + with_sign_of(fill<F>(grid.half_step), select(offset == 0.0f, away, offset));
}

}  // namespace quantopt

// Positions in grids of the plane, and linear equations of two unknowns.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

struct Vec {
  float x, y;
};

// Cell and position along one axis of a grid of `side` vertices over [-extent, extent]. Outside the grid the border value
// is used, and the slope is 0 there.
struct Position {
  int64_t cell;
  float share;  // position in the cell, in [0, 1]
  float slope;  // cells per unit; 0 outside the grid

  Position(float place, float extent, int64_t side) {
    const float cells = (side - 1) / (2 * extent);
    const float last = static_cast<float>(side - 1);
    const float at = (place + extent) * cells;
    const float inside = at > 0 ? (at < last ? at : last) : 0;  // 0 for NaN
    cell = std::min(static_cast<int64_t>(inside), side - 2);
    share = inside - cell;
    slope = inside == at ? cells : 0;
  }
};

// M^-1 v for M = (a b; c d)
inline Vec solve(float a, float b, float c, float d, Vec v) {
  const float determinant = a * d - b * c;
  return {(d * v.x - b * v.y) / determinant, (a * v.y - c * v.x) / determinant};
}

}  // namespace

// Levels of displacement grids at a point: forward, inverse and backward. PyTorch version and notation:
// models/kernels/warp.py.
#pragma once

#include "plane.h"

#include <torch/types.h>

#include <algorithm>
#include <cmath>

namespace {

using at::Tensor;

constexpr int MAX_LEVELS = 12;
constexpr int MAX_ITERATIONS = 200;       // this and the next two as in models/kernels/warp.py
constexpr float TOLERANCE = 2e-7f;        // normalized units: residual at which the iteration ends
constexpr float SUFFICIENT_DECREASE = 0.5f;  // of the residual, for a Newton step to be taken

// A cell and the position in it. Outside the grid the nearest border value is used, and the slope is 0 there.
struct Place {
  int64_t corner;        // index of the cell's first vertex in one component's (R, R) values
  float right, down;     // position in the cell, in [0, 1]
  float slope_x, slope_y;  // cells per unit; 0 outside the grid
};

struct Level {
  const float* values;  // of one frame and layer: (2, R, R)
  int64_t side;

  Place place(Vec p, float extent) const {
    const Position x(p.x, extent, side), y(p.y, extent, side);
    return {y.cell * side + x.cell, x.share, y.share, x.slope, y.slope};
  }

  // Displacement, and with `slopes` its derivatives: J = (dx/dx, dx/dy, dy/dx, dy/dy)
  template <bool slopes>
  Vec displacement(const Place& at, float* J) const {
    float out[2];
    for (int component = 0; component < 2; ++component) {
      const float* v = values + component * side * side + at.corner;
      const float top = v[1] - v[0];
      const float bottom = v[side + 1] - v[side];
      const float above = v[0] + at.right * top;
      const float below = v[side] + at.right * bottom;
      out[component] = above + at.down * (below - above);
      if (slopes) {
        J[2 * component] = (top + at.down * (bottom - top)) * at.slope_x;
        J[2 * component + 1] = (below - above) * at.slope_y;
      }
    }
    return {out[0], out[1]};
  }
};

// (I + J)^-1 v, or with `transposed` (I + J)^-T v
template <bool transposed>
Vec solve(const float* J, Vec v) {
  return solve(1 + J[0], transposed ? J[2] : J[1], transposed ? J[1] : J[2], 1 + J[3], v);
}

float size_of(Vec v) { return std::max(std::abs(v.x), std::abs(v.y)); }

// x with x + d(x) = y: Newton's method; where it does not halve the residual, a fixed-point step, which always reduces it
Vec inverse(const Level& level, Vec y, float extent) {
  float J[4];
  const auto residual = [&](Vec x) {
    const Vec d = level.displacement<true>(level.place(x, extent), J);
    return Vec{y.x - x.x - d.x, y.y - x.y - d.y};
  };
  Vec x = y;
  Vec r = residual(x);
  const float tolerance = TOLERANCE * std::max(1.f, size_of(y));
  for (int k = 0; k < MAX_ITERATIONS && size_of(r) > tolerance; ++k) {
    const Vec step = solve<false>(J, r);
    const Vec guess{x.x + step.x, x.y + step.y};
    const Vec left = residual(guess);
    if (size_of(left) <= SUFFICIENT_DECREASE * size_of(r)) {
      x = guess;
      r = left;
    } else {
      x = {x.x + r.x, x.y + r.y};
      r = residual(x);
    }
  }
  return x;
}

// Values of all levels at a frame and layer
struct Tables {
  int64_t levels, frames, layers;
  const float* values[MAX_LEVELS];
  int64_t sides[MAX_LEVELS];

  Tables(int64_t levels, int64_t frames, int64_t layers) : levels(levels), frames(frames), layers(layers) {}
  explicit Tables(at::TensorList tables) : Tables(tables.size(), tables[0].size(0), tables[0].size(1)) {
    TORCH_CHECK(levels <= MAX_LEVELS, "at most ", MAX_LEVELS, " levels");
    for (int64_t l = 0; l < levels; ++l) {
      const auto& t = tables[l];
      TORCH_CHECK(t.is_contiguous() && t.dim() == 5 && t.scalar_type() == at::kFloat, "tables must be contiguous float32 (B, S, 2, R, R)");
      TORCH_CHECK(t.size(0) == frames && t.size(1) == layers, "tables differ in frames or layers");
      values[l] = t.const_data_ptr<float>();
      sides[l] = t.size(4);
    }
  }
  int64_t offset(int64_t l, int64_t frame, int64_t layer) const {
    return (frame * layers + layer) * 2 * sides[l] * sides[l];
  }
  Level level(int64_t l, int64_t frame, int64_t layer) const { return {values[l] + offset(l, frame, layer), sides[l]}; }
};

// Check that points are (B, M, 2) and their layers (B, M), with B = `frames`
void check_points(const Tensor& points, const Tensor& layer, int64_t frames) {
  TORCH_CHECK(points.is_contiguous() && points.dim() == 3 && points.size(0) == frames && points.size(2) == 2,
              "points must be contiguous (", frames, ", M, 2)");
  TORCH_CHECK(layer.is_contiguous() && layer.sizes() == points.sizes().slice(0, 2), "layers must be contiguous (B, M)");
}

// Add g times the weights of the cell's corners to the gradient of a level's values (2, R, R)
void add_to_corners(float* gradient, int64_t side, const Place& at, Vec g) {
  for (int component = 0; component < 2; ++component) {
    float* v = gradient + component * side * side + at.corner;
    const float value = component ? g.y : g.x;
    const float below = value * at.down;
    const float above = value - below;
    v[0] += above * (1 - at.right);
    v[1] += above * at.right;
    v[side] += below * (1 - at.right);
    v[side + 1] += below * at.right;
  }
}

// The cells of all levels on the way of one point, for the backward pass
struct Trace {
  Place places[MAX_LEVELS];
  float J[MAX_LEVELS][4];
  Vec end;  // the point after all levels

  Trace(const Tables& grids, int64_t frame, int64_t layer, Vec x, float extent) {
    for (int64_t l = 0; l < grids.levels; ++l) {
      const Level level = grids.level(l, frame, layer);
      places[l] = level.place(x, extent);
      const Vec d = level.displacement<true>(places[l], J[l]);
      x = {x.x + d.x, x.y + d.y};
    }
    end = x;
  }
};

// Gradient at one end of the levels from the gradient g at the other end, from the first level to the last one if
// `inverted`. The gradients of the tables are added to `sums`.
Vec through_levels(const Tables& grids, float* const* sums, int64_t frame, int64_t layer, const Trace& trace, Vec g,
                   bool inverted) {
  const auto add = [&](int64_t l, Vec value) {
    add_to_corners(sums[l] + grids.offset(l, frame, layer), grids.sides[l], trace.places[l], value);
  };
  if (inverted) {
    for (int64_t l = 0; l < grids.levels; ++l) {
      g = solve<true>(trace.J[l], g);
      add(l, {-g.x, -g.y});
    }
  } else {
    for (int64_t l = grids.levels - 1; l >= 0; --l) {
      const float* J = trace.J[l];
      add(l, g);
      g = {g.x + J[0] * g.x + J[2] * g.y, g.y + J[1] * g.x + J[3] * g.y};
    }
  }
  return g;
}

}  // namespace

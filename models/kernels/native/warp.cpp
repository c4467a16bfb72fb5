// Composed displacement grids and their inverse, forward and backward. PyTorch version and notation:
// models/kernels/warp.py.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

constexpr int MAX_LEVELS = 12;
constexpr int64_t POINTS_PER_TASK = 256;  // of a thread, at least
constexpr int MAX_ITERATIONS = 200;       // this and the next two as in models/kernels/warp.py
constexpr float TOLERANCE = 2e-7f;        // normalized units: residual at which the iteration ends
constexpr float SUFFICIENT_DECREASE = 0.5f;  // of the residual, for a Newton step to be taken

struct Vec {
  float x, y;
};

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
    const float cells = (side - 1) / (2 * extent);
    const float last = static_cast<float>(side - 1);
    const float x = (p.x + extent) * cells;
    const float y = (p.y + extent) * cells;
    const float cx = x > 0 ? (x < last ? x : last) : 0;  // 0 for NaN
    const float cy = y > 0 ? (y < last ? y : last) : 0;
    const int64_t i = std::min(static_cast<int64_t>(cx), side - 2);
    const int64_t j = std::min(static_cast<int64_t>(cy), side - 2);
    return {j * side + i, cx - i, cy - j, cx == x ? cells : 0, cy == y ? cells : 0};
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
  const float a = 1 + J[0], d = 1 + J[3];
  const float b = transposed ? J[2] : J[1];
  const float c = transposed ? J[1] : J[2];
  const float determinant = a * d - b * c;
  return {(d * v.x - b * v.y) / determinant, (a * v.y - c * v.x) / determinant};
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
  int64_t levels, layers;
  const float* values[MAX_LEVELS];
  int64_t sides[MAX_LEVELS];

  explicit Tables(at::TensorList tables) : levels(tables.size()), layers(tables[0].size(1)) {
    TORCH_CHECK(levels <= MAX_LEVELS, "at most ", MAX_LEVELS, " levels");
    for (int64_t l = 0; l < levels; ++l) {
      const auto& t = tables[l];
      TORCH_CHECK(t.is_contiguous() && t.dim() == 5 && t.scalar_type() == at::kFloat, "tables must be contiguous float32 (B, S, 2, R, R)");
      TORCH_CHECK(t.size(0) == tables[0].size(0) && t.size(1) == layers, "tables differ in frames or layers");
      values[l] = t.const_data_ptr<float>();
      sides[l] = t.size(4);
    }
  }
  int64_t offset(int64_t l, int64_t frame, int64_t layer) const {
    return (frame * layers + layer) * 2 * sides[l] * sides[l];
  }
  Level level(int64_t l, int64_t frame, int64_t layer) const { return {values[l] + offset(l, frame, layer), sides[l]}; }
};

// map(frame, layer, point) of all points (B, M, 2)
template <class Map>
Tensor map_points(const Tensor& points, const Tensor& layer, const Map& map) {
  const int64_t count = points.size(1);
  Tensor out = at::empty_like(points);
  const Vec* p = reinterpret_cast<const Vec*>(points.const_data_ptr<float>());
  const int64_t* s = layer.const_data_ptr<int64_t>();
  Vec* q = reinterpret_cast<Vec*>(out.data_ptr<float>());
  at::parallel_for(0, points.size(0) * count, POINTS_PER_TASK, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) q[m] = map(m / count, s[m], p[m]);
  });
  return out;
}

Tensor warp(const Tensor& points, const Tensor& layer, at::TensorList tables, double extent) {
  const Tables grids(tables);
  return map_points(points, layer, [&](int64_t b, int64_t s, Vec x) {
    for (int64_t l = 0; l < grids.levels; ++l) {
      const Level level = grids.level(l, b, s);
      const Vec d = level.displacement<false>(level.place(x, extent), nullptr);
      x = {x.x + d.x, x.y + d.y};
    }
    return x;
  });
}

Tensor unwarp(const Tensor& points, const Tensor& layer, at::TensorList tables, double extent) {
  const Tables grids(tables);
  return map_points(points, layer, [&](int64_t b, int64_t s, Vec x) {
    for (int64_t l = grids.levels - 1; l >= 0; --l) x = inverse(grids.level(l, b, s), x, extent);
    return x;
  });
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

// Gradients of tables
struct Sums {
  std::vector<Tensor> tensors;
  std::vector<float*> values;

  explicit Sums(at::TensorList tables) {
    for (const auto& table : tables) {
      tensors.push_back(at::zeros_like(table));
      values.push_back(tensors.back().data_ptr<float>());
    }
  }
};

// Gradient at one end of the levels from the gradient g at the other end, from the first level to the last one if
// `inverted`. The gradients of the tables are added to `sums`.
Vec through_levels(const Tables& grids, const Sums& sums, int64_t frame, int64_t layer, const Trace& trace, Vec g,
                   bool inverted) {
  const auto add = [&](int64_t l, Vec value) {
    add_to_corners(sums.values[l] + grids.offset(l, frame, layer), grids.sides[l], trace.places[l], value);
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

// Gradients of `warp` (inverted = false) or `unwarp` (true). `local`: points before the levels, that is the input of
// `warp` or the output of `unwarp`.
std::tuple<Tensor, std::vector<Tensor>> backward(const Tensor& local, const Tensor& layer, at::TensorList tables,
                                                 double extent, const Tensor& gradient, bool inverted) {
  const Tables grids(tables);
  const Sums sums(tables);
  Tensor out = at::empty_like(local);
  const Vec* p = reinterpret_cast<const Vec*>(local.const_data_ptr<float>());
  const Vec* g_in = reinterpret_cast<const Vec*>(gradient.const_data_ptr<float>());
  const int64_t* s = layer.const_data_ptr<int64_t>();
  Vec* g_out = reinterpret_cast<Vec*>(out.data_ptr<float>());
  const int64_t count = local.size(1);
  at::parallel_for(0, local.size(0), 1, [&](int64_t begin, int64_t end) {  // no two threads add to the same frame
    for (int64_t b = begin; b < end; ++b)
      for (int64_t m = b * count; m < (b + 1) * count; ++m)
        g_out[m] = through_levels(grids, sums, b, s[m], Trace(grids, b, s[m], p[m], extent), g_in[m], inverted);
  });
  return {out, sums.tensors};
}

// Affine map of a layer and frame: x' = a x + b y + tx, y' = c x + d y + ty
struct Affine {
  float a, b, c, d, tx, ty;

  Vec apply(Vec v) const { return {a * v.x + b * v.y + tx, c * v.x + d * v.y + ty}; }
  Vec solve(Vec v) const {
    const float x = v.x - tx, y = v.y - ty, determinant = a * d - b * c;
    return {(d * x - b * y) / determinant, (a * y - c * x) / determinant};
  }
  // M^T g and M^-T g, where M is the matrix
  Vec gradient(Vec g) const { return {a * g.x + c * g.y, b * g.x + d * g.y}; }
  Vec gradient_of_solution(Vec g) const {
    const float determinant = a * d - b * c;
    return {(d * g.x - c * g.y) / determinant, (a * g.y - b * g.x) / determinant};
  }
  // Add the gradient of the map, from the gradient g of its value at v
  void add(Vec g, Vec v) {
    a += g.x * v.x;
    b += g.x * v.y;
    tx += g.x;
    c += g.y * v.x;
    d += g.y * v.y;
    ty += g.y;
  }
};

Affine* affine_of(const Tensor& affine) { return reinterpret_cast<Affine*>(affine.data_ptr<float>()); }

// From points (B, M, 2) of the first half of the tables' 2 B frames to canonical points, and to the other half's.
// affine: (2 B, S, 6)
std::tuple<Tensor, Tensor> transfer(const Tensor& points, const Tensor& layer, const Tensor& affine,
                                    at::TensorList tables, double extent) {
  const Tables grids(tables);
  const int64_t frames = points.size(0), S = grids.layers;
  const Affine* const maps = affine_of(affine);
  const Tensor before_affine = warp(points, layer, tables, extent);
  const Tensor canonical =
      map_points(before_affine, layer, [&](int64_t b, int64_t s, Vec x) { return maps[b * S + s].apply(x); });
  const Tensor target = map_points(canonical, layer, [&](int64_t b, int64_t s, Vec u) {
    Vec x = maps[(b + frames) * S + s].solve(u);
    for (int64_t l = grids.levels - 1; l >= 0; --l) x = inverse(grids.level(l, b + frames, s), x, extent);
    return x;
  });
  return {canonical, target};
}

// Gradients of the points, affine maps and tables of `transfer`
std::tuple<Tensor, Tensor, std::vector<Tensor>> transfer_backward(
    const Tensor& points, const Tensor& layer, const Tensor& affine, at::TensorList tables, double extent,
    const Tensor& canonical, const Tensor& target, const Tensor& of_canonical, const Tensor& of_target) {
  const Tables grids(tables);
  const Sums sums(tables);
  const Tensor of_points = at::empty_like(points), of_affine = at::zeros_like(affine);
  const auto vectors = [](const Tensor& t) { return reinterpret_cast<const Vec*>(t.const_data_ptr<float>()); };
  const Vec *p = vectors(points), *u = vectors(canonical), *x = vectors(target);
  const Vec *g_u = vectors(of_canonical), *g_x = vectors(of_target);
  const int64_t* s = layer.const_data_ptr<int64_t>();
  const Affine* const maps = affine_of(affine);
  Affine* const of_maps = affine_of(of_affine);
  Vec* const out = reinterpret_cast<Vec*>(of_points.data_ptr<float>());
  const int64_t frames = points.size(0), count = points.size(1), S = grids.layers;
  at::parallel_for(0, frames, 1, [&](int64_t begin, int64_t end) {  // no two threads add to the same frame
    for (int64_t b = begin; b < end; ++b)
      for (int64_t m = b * count; m < (b + 1) * count; ++m) {
        const int64_t first = b * S + s[m], second = (b + frames) * S + s[m];
        const Trace at_target(grids, b + frames, s[m], x[m], extent);
        Vec g = through_levels(grids, sums, b + frames, s[m], at_target, g_x[m], true);
        g = maps[second].gradient_of_solution(g);
        of_maps[second].add({-g.x, -g.y}, maps[second].solve(u[m]));
        g = {g.x + g_u[m].x, g.y + g_u[m].y};
        const Trace at_source(grids, b, s[m], p[m], extent);
        of_maps[first].add(g, at_source.end);
        out[m] = through_levels(grids, sums, b, s[m], at_source, maps[first].gradient(g), false);
      }
  });
  return {of_points, of_affine, sums.tensors};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(omnimotion_turbo_warp, library) {
  library.def("warp(Tensor points, Tensor layer, Tensor[] tables, float extent) -> Tensor", warp);
  library.def("unwarp(Tensor points, Tensor layer, Tensor[] tables, float extent) -> Tensor", unwarp);
  library.def("backward(Tensor points, Tensor layer, Tensor[] tables, float extent, Tensor gradient, bool inverted)"
              " -> (Tensor, Tensor[])", backward);
  library.def("transfer(Tensor points, Tensor layer, Tensor affine, Tensor[] tables, float extent) -> (Tensor, Tensor)",
              transfer);
  library.def("transfer_backward(Tensor points, Tensor layer, Tensor affine, Tensor[] tables, float extent,"
              " Tensor canonical, Tensor target, Tensor of_canonical, Tensor of_target) -> (Tensor, Tensor, Tensor[])",
              transfer_backward);
}

// Composed displacement grids and their inverse, forward and backward. PyTorch version and notation:
// models/kernels/warp.py.
//
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

// Gradients of `warp` (inverted = false) or `unwarp` (true). `local`: points before the levels, that is the input of
// `warp` or the output of `unwarp`.
std::tuple<Tensor, std::vector<Tensor>> backward(const Tensor& local, const Tensor& layer, at::TensorList tables,
                                                 double extent, const Tensor& gradient, bool inverted) {
  const Tables grids(tables);
  Tensor out = at::empty_like(local);
  std::vector<Tensor> sums;
  std::vector<float*> sum;
  for (const auto& table : tables) {
    sums.push_back(at::zeros_like(table));
    sum.push_back(sums.back().data_ptr<float>());
  }
  const Vec* p = reinterpret_cast<const Vec*>(local.const_data_ptr<float>());
  const Vec* g_in = reinterpret_cast<const Vec*>(gradient.const_data_ptr<float>());
  const int64_t* s = layer.const_data_ptr<int64_t>();
  Vec* g_out = reinterpret_cast<Vec*>(out.data_ptr<float>());
  const int64_t count = local.size(1);
  const auto of_point = [&](int64_t b, int64_t m) {
    Place places[MAX_LEVELS];
    float J[MAX_LEVELS][4];
    Vec x = p[m];
    for (int64_t l = 0; l < grids.levels; ++l) {
      const Level level = grids.level(l, b, s[m]);
      places[l] = level.place(x, extent);
      const Vec d = level.displacement<true>(places[l], J[l]);
      x = {x.x + d.x, x.y + d.y};
    }
    Vec g = g_in[m];
    const auto add = [&](int64_t l, Vec value) {
      add_to_corners(sum[l] + grids.offset(l, b, s[m]), grids.sides[l], places[l], value);
    };
    if (inverted) {
      for (int64_t l = 0; l < grids.levels; ++l) {
        g = solve<true>(J[l], g);
        add(l, {-g.x, -g.y});
      }
    } else {
      for (int64_t l = grids.levels - 1; l >= 0; --l) {
        add(l, g);
        g = {g.x + J[l][0] * g.x + J[l][2] * g.y, g.y + J[l][1] * g.x + J[l][3] * g.y};
      }
    }
    g_out[m] = g;
  };
  at::parallel_for(0, local.size(0), 1, [&](int64_t begin, int64_t end) {  // no two threads add to the same frame
    for (int64_t b = begin; b < end; ++b)
      for (int64_t m = b * count; m < (b + 1) * count; ++m) of_point(b, m);
  });
  return {out, sums};
}

// Tables of one level: (B, C, R, R) displacements of B frames, from grids in time (moments, C, R, R).
//
// In time, a frame's value is that of moment `before` and, with weight `share`, of the moment after it.

// one frame's pair of moments in one grid
struct Moments {
  int64_t before, after;
  float weight_before, weight_after;  // times the grid's scale
};

std::vector<Moments> moments_of(const Tensor& ids, const Tensor& before, const Tensor& share, int64_t count,
                                double scale) {
  std::vector<Moments> out;
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < ids.size(0); ++b)
    TORCH_CHECK(id[b] >= 0 && id[b] < before.size(0), "frame ", id[b], " of ", before.size(0));
  for (int64_t b = 0; b < ids.size(0); ++b) {
    const int64_t first = before.const_data_ptr<int64_t>()[id[b]];
    const float weight = share.const_data_ptr<float>()[id[b]];
    out.push_back({first, std::min(first + 1, count - 1), static_cast<float>((1 - weight) * scale),
                   static_cast<float>(weight * scale)});
  }
  return out;
}

Tensor bounded_sum(const Tensor& ids, at::TensorList grids, at::TensorList before, at::TensorList share,
                   at::ArrayRef<double> scales, double largest) {
  const int64_t frames = ids.size(0), channels = grids[0].size(1), area = grids[0][0][0].numel();
  Tensor out = at::empty({frames, channels, grids[0].size(2), grids[0].size(3)}, grids[0].options());
  float* const result = out.data_ptr<float>();
  std::vector<std::vector<Moments>> moments;
  for (size_t k = 0; k < grids.size(); ++k)
    moments.push_back(moments_of(ids, before[k], share[k], grids[k].size(0), scales[k]));
  const float inverse_square = static_cast<float>(1 / (largest * largest));
  at::parallel_for(0, frames, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* const v = result + b * channels * area;
      for (size_t k = 0; k < grids.size(); ++k) {
        const Moments& m = moments[k][b];
        const float* const values = grids[k].const_data_ptr<float>();
        const float* const p = values + m.before * channels * area;
        const float* const q = values + m.after * channels * area;
        const float wp = m.weight_before, wq = m.weight_after;
        if (k == 0) std::fill(v, v + channels * area, 0.f);
        for (int64_t n = 0; n < channels * area; ++n) v[n] += wp * p[n];
        if (wq != 0)
          for (int64_t n = 0; n < channels * area; ++n) v[n] += wq * q[n];
      }
      for (int64_t n = 0; n < channels * area; ++n) v[n] /= std::sqrt(1 + v[n] * v[n] * inverse_square);
    }
  });
  return out;
}

// Gradients of the grids. `tables`: the result of `bounded_sum`; `gradient`: its gradient.
std::vector<Tensor> bounded_sum_backward(const Tensor& ids, at::TensorList grids, at::TensorList before,
                                         at::TensorList share, at::ArrayRef<double> scales, double largest,
                                         const Tensor& tables, const Tensor& gradient) {
  const int64_t frames = ids.size(0), channels = grids[0].size(1), area = grids[0][0][0].numel();
  std::vector<Tensor> out;
  std::vector<std::vector<Moments>> moments;
  for (size_t k = 0; k < grids.size(); ++k) {
    out.push_back(at::zeros_like(grids[k]));
    moments.push_back(moments_of(ids, before[k], share[k], grids[k].size(0), scales[k]));
  }
  const float* const d = tables.const_data_ptr<float>();
  const float* const g = gradient.const_data_ptr<float>();
  const float inverse_square = static_cast<float>(1 / (largest * largest));
  at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {  // frames share moments, channels do not
    std::vector<float> slope(area);
    for (int64_t c = begin; c < end; ++c)
      for (int64_t b = 0; b < frames; ++b) {
        const int64_t here = (b * channels + c) * area;
        for (int64_t n = 0; n < area; ++n) {
          const float rest = std::max(0.f, 1 - d[here + n] * d[here + n] * inverse_square);
          slope[n] = g[here + n] * rest * std::sqrt(rest);
        }
        for (size_t k = 0; k < grids.size(); ++k) {
          const Moments& m = moments[k][b];
          float* const values = out[k].data_ptr<float>();
          float* const p = values + (m.before * channels + c) * area;
          float* const q = values + (m.after * channels + c) * area;
          for (int64_t n = 0; n < area; ++n) p[n] += m.weight_before * slope[n];
          if (m.weight_after != 0) for (int64_t n = 0; n < area; ++n) q[n] += m.weight_after * slope[n];
        }
      }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(omnimotion_turbo_warp, library) {
  library.def("warp(Tensor points, Tensor layer, Tensor[] tables, float extent) -> Tensor", warp);
  library.def("unwarp(Tensor points, Tensor layer, Tensor[] tables, float extent) -> Tensor", unwarp);
  library.def("backward(Tensor points, Tensor layer, Tensor[] tables, float extent, Tensor gradient, bool inverted)"
              " -> (Tensor, Tensor[])", backward);
  library.def("bounded_sum(Tensor ids, Tensor[] grids, Tensor[] before, Tensor[] share, float[] scales, float largest)"
              " -> Tensor", bounded_sum);
  library.def("bounded_sum_backward(Tensor ids, Tensor[] grids, Tensor[] before, Tensor[] share, float[] scales,"
              " float largest, Tensor tables, Tensor gradient) -> Tensor[]", bounded_sum_backward);
}

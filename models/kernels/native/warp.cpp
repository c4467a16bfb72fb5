// Composed displacement grids and their inverse, forward and backward, from tables. PyTorch version and notation:
// models/kernels/warp.py.

#include "levels.h"
#include "time_grids.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace {

constexpr int64_t POINTS_PER_TASK = 256;  // of a thread, at least

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
  check_points(points, layer, grids.frames);
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
  check_points(points, layer, grids.frames);
  return map_points(points, layer, [&](int64_t b, int64_t s, Vec x) {
    for (int64_t l = grids.levels - 1; l >= 0; --l) x = inverse(grids.level(l, b, s), x, extent);
    return x;
  });
}

// Gradients of `warp` (inverted = false) or `unwarp` (true). `local`: points before the levels, that is the input of
// `warp` or the output of `unwarp`.
std::tuple<Tensor, std::vector<Tensor>> backward(const Tensor& local, const Tensor& layer, at::TensorList tables,
                                                 double extent, const Tensor& gradient, bool inverted) {
  const Tables grids(tables);
  check_points(local, layer, grids.frames);
  const GridSums sums(tables);
  Tensor out = at::empty_like(local);
  const Vec* p = reinterpret_cast<const Vec*>(local.const_data_ptr<float>());
  const Vec* g_in = reinterpret_cast<const Vec*>(gradient.const_data_ptr<float>());
  const int64_t* s = layer.const_data_ptr<int64_t>();
  Vec* g_out = reinterpret_cast<Vec*>(out.data_ptr<float>());
  const int64_t count = local.size(1);
  at::parallel_for(0, local.size(0), 1, [&](int64_t begin, int64_t end) {  // no two threads add to the same frame
    for (int64_t b = begin; b < end; ++b)
      for (int64_t m = b * count; m < (b + 1) * count; ++m)
        g_out[m] = through_levels(grids, sums.values.data(), b, s[m], Trace(grids, b, s[m], p[m], extent), g_in[m], inverted);
  });
  return {out, sums.tensors};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(omnimotion_turbo_warp, library) {
  library.def("warp(Tensor points, Tensor layer, Tensor[] tables, float extent) -> Tensor", warp);
  library.def("unwarp(Tensor points, Tensor layer, Tensor[] tables, float extent) -> Tensor", unwarp);
  library.def("backward(Tensor points, Tensor layer, Tensor[] tables, float extent, Tensor gradient, bool inverted)"
              " -> (Tensor, Tensor[])", backward);
}

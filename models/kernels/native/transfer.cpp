// From points of frames through the canonical plane to other frames, forward and backward, from grids in time. PyTorch
// version: models.layer_warps.WarpMaps.transfer.

#include "levels.h"
#include "time_grids.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace {

// Affine map of a layer and frame: x' = a x + b y + tx, y' = c x + d y + ty
struct Affine {
  float a, b, c, d, tx, ty;

  Vec apply(Vec v) const { return {a * v.x + b * v.y + tx, c * v.x + d * v.y + ty}; }
  Vec invert(Vec v) const { return solve(a, b, c, d, {v.x - tx, v.y - ty}); }
  // M^T g and M^-T g, where M is the matrix
  Vec gradient(Vec g) const { return {a * g.x + c * g.y, b * g.x + d * g.y}; }
  Vec gradient_of_inverse(Vec g) const { return solve(a, c, b, d, g); }
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

// All levels in some frames, as grids in time (models.kernels.warp.TimeGrids)
struct Pyramid {
  std::vector<TimeGrids> levels;
  std::vector<int64_t> sides;
  int64_t layers;

  Pyramid(const Tensor& ids, at::TensorList grids, at::TensorList before, at::TensorList share,
          at::ArrayRef<double> scales, at::ArrayRef<double> largest)
      : layers(grids[0].size(1) / 2) {
    const size_t n = before.size();
    TORCH_CHECK(largest.size() <= MAX_LEVELS && grids.size() == n * largest.size() && scales.size() == grids.size(),
                "lists of levels differ in length, or more than ", MAX_LEVELS, " levels");
    for (size_t l = 0; l < largest.size(); ++l) {
      levels.emplace_back(ids, grids.slice(l * n, n), before, share, scales.slice(l * n, n), largest[l]);
      sides.push_back(grids[l * n].size(3));
    }
  }
};

// Check that points, their layers and affine maps are those of the 2 B frames `ids`
void check_frames(const Tensor& points, const Tensor& layer, const Tensor& affine, const Tensor& ids, int64_t layers) {
  TORCH_CHECK(ids.size(0) % 2 == 0, "ids must be (2 B,)");
  check_points(points, layer, ids.size(0) / 2);
  TORCH_CHECK(affine.is_contiguous() && affine.sizes() == at::IntArrayRef({ids.size(0), layers, 6}),
              "affine maps must be contiguous (2 B, S, 6)");
}

// Values of all levels at one frame and layer, such as tables or their gradients
struct LayerTables {
  Tables tables;
  float* values[MAX_LEVELS];
  std::vector<float> memory;

  explicit LayerTables(const Pyramid& pyramid) : tables(pyramid.levels.size(), 1, 1) {
    int64_t total = 0;
    for (int64_t side : pyramid.sides) total += 2 * side * side;
    memory.resize(total);
    float* next = memory.data();
    for (int64_t l = 0; l < tables.levels; ++l) {
      tables.sides[l] = pyramid.sides[l];
      tables.values[l] = values[l] = next;
      next += count(l);
    }
  }
  int64_t count(int64_t l) const { return 2 * tables.sides[l] * tables.sides[l]; }
  Level level(int64_t l) const { return tables.level(l, 0, 0); }
  void compute(const Pyramid& pyramid, int64_t frame, int64_t layer) {
    for (int64_t l = 0; l < tables.levels; ++l)
      pyramid.levels[l].displacements(values[l], frame, layer * count(l), count(l));
  }
};

// From points (B, M, 2) of the first B of 2 B frames to canonical points, and to the last B frames. affine: (2 B, S, 6)
std::tuple<Tensor, Tensor> transfer(const Tensor& points, const Tensor& layer, const Tensor& affine, double extent,
                                    const Tensor& ids, at::TensorList grids, at::TensorList before,
                                    at::TensorList share, at::ArrayRef<double> scales, at::ArrayRef<double> largest) {
  const Pyramid pyramid(ids, grids, before, share, scales, largest);
  check_frames(points, layer, affine, ids, pyramid.layers);
  const Tensor canonical = at::empty_like(points), target = at::empty_like(points);
  const Vec* const p = reinterpret_cast<const Vec*>(points.const_data_ptr<float>());
  Vec* const u = reinterpret_cast<Vec*>(canonical.data_ptr<float>());
  Vec* const x = reinterpret_cast<Vec*>(target.data_ptr<float>());
  const int64_t* const s = layer.const_data_ptr<int64_t>();
  const Affine* const maps = affine_of(affine);
  const int64_t frames = points.size(0), count = points.size(1), S = pyramid.layers;
  at::parallel_for(0, frames, 1, [&](int64_t begin, int64_t end) {
    LayerTables source(pyramid), other(pyramid);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t layer = 0; layer < S; ++layer) {
        source.compute(pyramid, b, layer);
        other.compute(pyramid, b + frames, layer);
        for (int64_t m = b * count; m < (b + 1) * count; ++m) {
          if (s[m] != layer) continue;
          u[m] = maps[b * S + layer].apply(Trace(source.tables, 0, 0, p[m], extent).end);
          x[m] = maps[(b + frames) * S + layer].invert(u[m]);
          for (int64_t l = source.tables.levels - 1; l >= 0; --l) x[m] = inverse(other.level(l), x[m], extent);
        }
      }
  });
  return {canonical, target};
}

// Gradients of the points, affine maps and grids of `transfer`
std::tuple<Tensor, Tensor, std::vector<Tensor>> transfer_backward(
    const Tensor& points, const Tensor& layer, const Tensor& affine, double extent, const Tensor& ids,
    at::TensorList grids, at::TensorList before, at::TensorList share, at::ArrayRef<double> scales,
    at::ArrayRef<double> largest, const Tensor& canonical, const Tensor& target, const Tensor& of_canonical,
    const Tensor& of_target) {
  const Pyramid pyramid(ids, grids, before, share, scales, largest);
  check_frames(points, layer, affine, ids, pyramid.layers);
  const GridSums sums(grids);
  const Tensor of_points = at::empty_like(points), of_affine = at::zeros_like(affine);
  const auto vectors = [](const Tensor& t) { return reinterpret_cast<const Vec*>(t.const_data_ptr<float>()); };
  const Vec *p = vectors(points), *u = vectors(canonical), *x = vectors(target);
  const Vec *g_u = vectors(of_canonical), *g_x = vectors(of_target);
  const int64_t* s = layer.const_data_ptr<int64_t>();
  const Affine* const maps = affine_of(affine);
  Affine* const of_maps = affine_of(of_affine);
  Vec* const out = reinterpret_cast<Vec*>(of_points.data_ptr<float>());
  const int64_t frames = points.size(0), count = points.size(1), S = pyramid.layers, n = before.size();
  at::parallel_for(0, S, 1, [&](int64_t begin, int64_t end) {  // frames share moments, layers do not
    LayerTables source(pyramid), other(pyramid), of_source(pyramid), of_other(pyramid);
    const auto add_to_grids = [&](const LayerTables& tables, LayerTables& gradient, int64_t frame, int64_t layer) {
      for (int64_t l = 0; l < tables.tables.levels; ++l) {
        const std::vector<float*> of_level(sums.values.begin() + l * n, sums.values.begin() + (l + 1) * n);
        pyramid.levels[l].add_gradient(of_level, gradient.values[l], tables.values[l], frame,
                                       layer * tables.count(l), tables.count(l));
      }
      std::fill(gradient.memory.begin(), gradient.memory.end(), 0.f);
    };
    for (int64_t layer = begin; layer < end; ++layer)
      for (int64_t b = 0; b < frames; ++b) {
        const Affine &first = maps[b * S + layer], &second = maps[(b + frames) * S + layer];
        source.compute(pyramid, b, layer);
        other.compute(pyramid, b + frames, layer);
        for (int64_t m = b * count; m < (b + 1) * count; ++m) {
          if (s[m] != layer) continue;
          const Trace at_target(other.tables, 0, 0, x[m], extent);
          Vec g = through_levels(other.tables, of_other.values, 0, 0, at_target, g_x[m], true);
          g = second.gradient_of_inverse(g);
          of_maps[(b + frames) * S + layer].add({-g.x, -g.y}, second.invert(u[m]));
          g = {g.x + g_u[m].x, g.y + g_u[m].y};
          const Trace at_source(source.tables, 0, 0, p[m], extent);
          of_maps[b * S + layer].add(g, at_source.end);
          out[m] = through_levels(source.tables, of_source.values, 0, 0, at_source, first.gradient(g), false);
        }
        add_to_grids(source, of_source, b, layer);
        add_to_grids(other, of_other, b + frames, layer);
      }
  });
  return {of_points, of_affine, sums.tensors};
}

}  // namespace

#define TIME_GRIDS " Tensor ids, Tensor[] grids, Tensor[] before, Tensor[] share, float[] scales, float[] largest"

TORCH_LIBRARY_FRAGMENT(omnimotion_turbo_warp, library) {
  library.def("transfer(Tensor points, Tensor layer, Tensor affine, float extent," TIME_GRIDS ") -> (Tensor, Tensor)",
              transfer);
  library.def("transfer_backward(Tensor points, Tensor layer, Tensor affine, float extent," TIME_GRIDS ", Tensor canonical,"
              " Tensor target, Tensor of_canonical, Tensor of_target) -> (Tensor, Tensor, Tensor[])", transfer_backward);
}

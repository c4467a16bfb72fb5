// Look-up in the layers' images of all resolutions, forward and backward. PyTorch version and notation:
// models/kernels/images.py.

#include "plane.h"

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

constexpr int CHANNELS = 4;
constexpr float EXTENT = 1;               // places are in [-EXTENT, EXTENT] inside the images
constexpr int64_t POINTS_PER_TASK = 256;  // of a thread, at least

struct Levels {
  std::vector<const float*> values;  // (S, CHANNELS, R, R)
  std::vector<int64_t> sides;

  explicit Levels(at::TensorList levels) {
    for (const Tensor& t : levels) {
      TORCH_CHECK(t.is_contiguous() && t.dim() == 4 && t.size(1) == CHANNELS && t.scalar_type() == at::kFloat,
                  "levels must be contiguous float32 (S, 4, R, R)");
      values.push_back(t.const_data_ptr<float>());
      sides.push_back(t.size(3));
    }
  }
};

// Calls visit(m, x, y, v, side) for every point m and level. v: the vertex before the point, in the first channel.
template <typename Visit>
void at_points(const Levels& images, const Tensor& places, const Tensor& layer, const Visit& visit) {
  const float* const p = places.const_data_ptr<float>();
  const int64_t* const s = layer.const_data_ptr<int64_t>();
  at::parallel_for(0, places.size(0), POINTS_PER_TASK, [&](int64_t begin, int64_t end) {
    for (size_t l = 0; l < images.sides.size(); ++l) {
      const int64_t side = images.sides[l];
      for (int64_t m = begin; m < end; ++m) {
        const Position x(p[2 * m], EXTENT, side), y(p[2 * m + 1], EXTENT, side);
        visit(m, x, y, images.values[l] + (s[m] * CHANNELS * side + y.cell) * side + x.cell, side);
      }
    }
  });
}

Tensor layer_images(const Tensor& places, const Tensor& layer, at::TensorList levels) {
  const Levels images(levels);
  const Tensor out = at::zeros({places.size(0), CHANNELS}, places.options());
  float* const sum = out.data_ptr<float>();
  at_points(images, places, layer,
            [&](int64_t m, const Position& x, const Position& y, const float* v, int64_t side) {
    for (int c = 0; c < CHANNELS; ++c, v += side * side) {
      const float above = v[0] + x.share * (v[1] - v[0]);
      const float below = v[side] + x.share * (v[side + 1] - v[side]);
      sum[CHANNELS * m + c] += above + y.share * (below - above);
    }
  });
  return out;
}

// Gradients of the places and of the levels
std::tuple<Tensor, std::vector<Tensor>> layer_images_backward(const Tensor& places, const Tensor& layer,
                                                              at::TensorList levels, const Tensor& gradient) {
  const Levels images(levels);
  const int64_t count = places.size(0), num_layers = levels[0].size(0);
  const Tensor of_places = at::zeros_like(places);
  const float* const p = places.const_data_ptr<float>();
  const float* const g = gradient.const_data_ptr<float>();
  const int64_t* const s = layer.const_data_ptr<int64_t>();
  float* const out = of_places.data_ptr<float>();
  at_points(images, places, layer,
            [&](int64_t m, const Position& x, const Position& y, const float* v, int64_t side) {
    for (int c = 0; c < CHANNELS; ++c, v += side * side) {
      const float top = v[1] - v[0], bottom = v[side + 1] - v[side];
      const float value = g[CHANNELS * m + c];
      out[2 * m] += value * (top + y.share * (bottom - top)) * x.slope;
      out[2 * m + 1] += value * (v[side] - v[0] + x.share * (bottom - top)) * y.slope;
    }
  });
  std::vector<Tensor> sums;
  for (const Tensor& level : levels) sums.push_back(at::empty_like(level));
  // no two threads add to the same layer of a level
  at::parallel_for(0, levels.size() * num_layers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t l = task / num_layers, this_layer = task % num_layers;
      const int64_t side = images.sides[l], area = side * side;
      float* const sum = sums[l].data_ptr<float>() + this_layer * CHANNELS * area;
      std::fill(sum, sum + CHANNELS * area, 0.f);
      for (int64_t m = 0; m < count; ++m) {
        if (s[m] != this_layer) continue;
        const Position x(p[2 * m], EXTENT, side), y(p[2 * m + 1], EXTENT, side);
        float* v = sum + y.cell * side + x.cell;
        for (int c = 0; c < CHANNELS; ++c, v += area) {
          const float below = g[CHANNELS * m + c] * y.share, above = g[CHANNELS * m + c] - below;
          v[0] += above * (1 - x.share);
          v[1] += above * x.share;
          v[side] += below * (1 - x.share);
          v[side + 1] += below * x.share;
        }
      }
    }
  });
  return {of_places, sums};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(omnimotion_turbo_warp, library) {
  library.def("layer_images(Tensor places, Tensor layer, Tensor[] levels) -> Tensor", layer_images);
  library.def("layer_images_backward(Tensor places, Tensor layer, Tensor[] levels, Tensor gradient)"
              " -> (Tensor, Tensor[])", layer_images_backward);
}

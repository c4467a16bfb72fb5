// Displacements of a level from its grids in time, forward and backward. PyTorch version: models/kernels/warp.py.
//
// In time, a frame's value is that of moment `before` and, with weight `share`, of the moment after it.
#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <vector>

// one frame's pair of moments in one grid: the places of their values (C, ...), and weights times the grid's scale
struct Moments {
  int64_t before, after;
  float weight_before, weight_after;
};

// A level: the sum v of grids (moments, C, ...) in some frames, as displacements v / sqrt(1 + (v / b)^2)
struct TimeGrids {
  int64_t values;        // of a frame
  float inverse_square;  // 1 / b^2
  std::vector<const float*> grids;
  std::vector<std::vector<Moments>> moments;  // of each grid and frame

  TimeGrids(const at::Tensor& ids, at::TensorList tensors, at::TensorList before, at::TensorList share,
            at::ArrayRef<double> scales, double largest)
      : values(tensors[0][0].numel()), inverse_square(static_cast<float>(1 / (largest * largest))) {
    TORCH_CHECK(ids.is_contiguous() && ids.dim() == 1, "ids must be contiguous (B,)");
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < ids.size(0); ++b)
      TORCH_CHECK(id[b] >= 0 && id[b] < before[0].size(0), "frame ", id[b], " of ", before[0].size(0));
    for (size_t k = 0; k < tensors.size(); ++k) {
      TORCH_CHECK(tensors[k].is_contiguous() && tensors[k].scalar_type() == at::kFloat && tensors[k][0].numel() == values,
                  "grids must be contiguous, float32 and of one shape");
      grids.push_back(tensors[k].const_data_ptr<float>());
      std::vector<Moments> of_frames;
      for (int64_t b = 0; b < ids.size(0); ++b) {
        const int64_t first = before[k].const_data_ptr<int64_t>()[id[b]];
        const float weight = share[k].const_data_ptr<float>()[id[b]];
        of_frames.push_back({first * values, std::min(first + 1, tensors[k].size(0) - 1) * values,
                             static_cast<float>((1 - weight) * scales[k]), static_cast<float>(weight * scales[k])});
      }
      moments.push_back(std::move(of_frames));
    }
  }

  // d = displacements `first` to `first + count` of a frame
  void displacements(float* d, int64_t frame, int64_t first, int64_t count) const {
    std::fill(d, d + count, 0.f);
    for (size_t k = 0; k < grids.size(); ++k) {
      const Moments& m = moments[k][frame];
      const float *p = grids[k] + m.before + first, *q = grids[k] + m.after + first;
      for (int64_t n = 0; n < count; ++n) d[n] += m.weight_before * p[n];
      if (m.weight_after != 0)
        for (int64_t n = 0; n < count; ++n) d[n] += m.weight_after * q[n];
    }
    for (int64_t n = 0; n < count; ++n) d[n] /= std::sqrt(1 + d[n] * d[n] * inverse_square);
  }

  // Add the gradient of these displacements to those of the grids, `sums`. `g`, their gradient, is overwritten.
  void add_gradient(const std::vector<float*>& sums, float* g, const float* d, int64_t frame, int64_t first,
                    int64_t count) const {
    for (int64_t n = 0; n < count; ++n) {
      const float rest = std::max(0.f, 1 - d[n] * d[n] * inverse_square);
      g[n] *= rest * std::sqrt(rest);
    }
    for (size_t k = 0; k < grids.size(); ++k) {
      const Moments& m = moments[k][frame];
      float *p = sums[k] + m.before + first, *q = sums[k] + m.after + first;
      for (int64_t n = 0; n < count; ++n) p[n] += m.weight_before * g[n];
      if (m.weight_after != 0)
        for (int64_t n = 0; n < count; ++n) q[n] += m.weight_after * g[n];
    }
  }
};

// Gradients of grids, zero at first
struct GridSums {
  std::vector<at::Tensor> tensors;
  std::vector<float*> values;

  explicit GridSums(at::TensorList grids) {
    for (const auto& grid : grids) {
      tensors.push_back(at::zeros_like(grid));
      values.push_back(tensors.back().data_ptr<float>());
    }
  }
};

// Displacements of a level from its grids in time, forward and backward. PyTorch version: models/kernels/warp.py.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using at::Tensor;

// Tables of one level: (B, C, R, R) displacements of B frames, from grids in time (moments, C, R, R). Without a bound
// (`largest` infinite), also of other shapes (moments, C, ...).
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
  std::vector<int64_t> shape = grids[0].sizes().vec();
  shape[0] = frames;
  Tensor out = at::empty(shape, grids[0].options());
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

TORCH_LIBRARY_FRAGMENT(omnimotion_turbo_warp, library) {
  library.def("bounded_sum(Tensor ids, Tensor[] grids, Tensor[] before, Tensor[] share, float[] scales, float largest)"
              " -> Tensor", bounded_sum);
  library.def("bounded_sum_backward(Tensor ids, Tensor[] grids, Tensor[] before, Tensor[] share, float[] scales,"
              " float largest, Tensor tables, Tensor gradient) -> Tensor[]", bounded_sum_backward);
}

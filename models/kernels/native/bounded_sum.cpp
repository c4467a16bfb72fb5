// Tables of one level: (B, C, R, R) displacements of B frames, from grids in time (moments, C, R, R), forward and
// backward. Without a bound (`largest` infinite), also of other shapes (moments, C, ...). PyTorch version:
// models/kernels/warp.py.

#include "time_grids.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace {

using at::Tensor;

Tensor bounded_sum(const Tensor& ids, at::TensorList grids, at::TensorList before, at::TensorList share,
                   at::ArrayRef<double> scales, double largest) {
  const TimeGrids level(ids, grids, before, share, scales, largest);
  std::vector<int64_t> shape = grids[0].sizes().vec();
  shape[0] = ids.size(0);
  Tensor out = at::empty(shape, grids[0].options());
  float* const d = out.data_ptr<float>();
  at::parallel_for(0, ids.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) level.displacements(d + b * level.values, b, 0, level.values);
  });
  return out;
}

// Gradients of the grids. `tables`: the result of `bounded_sum`; `gradient`: its gradient.
std::vector<Tensor> bounded_sum_backward(const Tensor& ids, at::TensorList grids, at::TensorList before,
                                         at::TensorList share, at::ArrayRef<double> scales, double largest,
                                         const Tensor& tables, const Tensor& gradient) {
  const TimeGrids level(ids, grids, before, share, scales, largest);
  const GridSums sums(grids);
  const int64_t channels = grids[0].size(1), area = level.values / channels;
  const float* const d = tables.const_data_ptr<float>();
  const float* const g = gradient.const_data_ptr<float>();
  at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {  // frames share moments, channels do not
    std::vector<float> slope(area);
    for (int64_t c = begin; c < end; ++c)
      for (int64_t b = 0; b < ids.size(0); ++b) {
        const int64_t here = b * level.values + c * area;
        std::copy(g + here, g + here + area, slope.begin());
        level.add_gradient(sums.values, slope.data(), d + here, b, c * area, area);
      }
  });
  return sums.tensors;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(omnimotion_turbo_warp, library) {
  library.def("bounded_sum(Tensor ids, Tensor[] grids, Tensor[] before, Tensor[] share, float[] scales, float largest)"
              " -> Tensor", bounded_sum);
  library.def("bounded_sum_backward(Tensor ids, Tensor[] grids, Tensor[] before, Tensor[] share, float[] scales,"
              " float largest, Tensor tables, Tensor gradient) -> Tensor[]", bounded_sum_backward);
}

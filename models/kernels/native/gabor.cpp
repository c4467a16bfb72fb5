// The Gabor network (models/kernels/fused_gabor.py), forward and backward, with bfloat16 products on the CPU's matrix unit.
//
// As in chain.cpp a tile goes through the whole network while it is in the cache, twice: once for its values, once more
// for its gradients. Phases and exponents must keep their digits: their product is the sum of three of halves,
// high v high P + low v high P + high v low P, with an error of 2^-16.

#include "tiles.h"

namespace {

using Lanes = at::vec::Vectorized<float>;

struct Filter {
  const float* bias;                                     // (2F,)
  BFloat16 *forward, *backward;                          // packed: three halves of P^T; P
};

struct Hidden {
  const float* bias;                                     // (F,)
  BFloat16 *forward, *backward;                          // packed: W^T; W
};

struct Net {
  std::vector<Filter> filters;
  std::vector<Hidden> hidden;
  const float *weight, *bias;                            // output layer (out, F)
  BFloat16* forward;                                     // its two halves, packed
  int64_t in, in_padded, halves;                         // columns of v; of its gradient; of its three halves
  int64_t F, out, rows;

  int64_t tiles() const { return (rows + R - 1) / R; }
  int64_t L() const { return filters.size(); }
};

// What a tile computes on its way, each (R, F).
struct Activations {
  BFloat16* v;                                           // (R, halves)
  std::vector<BFloat16*> s, c, z, h;                     // z[0] is not used, h[0] is s[0]
};

Net describe(const Tensor& v, at::TensorList filters, at::TensorList filter_biases,
             at::TensorList weights, at::TensorList biases) {
  Net net;
  net.in = v.size(1);
  net.in_padded = padded(net.in, 2 * LANES);
  net.halves = padded(3 * net.in, 2 * LANES);
  net.F = weights.back().size(1);
  net.out = weights.back().size(0);
  net.rows = v.size(0);
  const int64_t F = net.F, L = filters.size();
  Scratch<WEIGHTS> scratch(L * (2 * F * (2 * net.halves + 2 * net.in_padded) + 3 * F * F) * 2 + 4 * LANES * F * 2 + 4096);
  for (int64_t i = 0; i < L; ++i) {
    const float* p = filters[i].const_data_ptr<float>();
    BFloat16* rounded = scratch.take<BFloat16>(2 * F * net.halves);
    std::fill(rounded, rounded + 2 * F * net.halves, BFloat16(0.f));
    for (int64_t n = 0; n < 2 * F; ++n)
      for (int64_t k = 0; k < net.in; ++k) {
        BFloat16* row = rounded + n * net.halves;
        row[k] = row[net.in + k] = BFloat16(p[n * net.in + k]);
        row[2 * net.in + k] = BFloat16(p[n * net.in + k] - static_cast<float>(row[k]));
      }
    Filter filter{filter_biases[i].const_data_ptr<float>(), scratch.take<BFloat16>(2 * F * net.halves),
                  scratch.take<BFloat16>(2 * F * net.in_padded)};
    pack_transposed(rounded, 2 * F, net.halves, filter.forward);
    BFloat16* high = scratch.take<BFloat16>(2 * F * net.in_padded);
    std::fill(high, high + 2 * F * net.in_padded, BFloat16(0.f));
    round_rows(p, 2 * F, net.in, net.in_padded, high);
    at::vec::pack_vnni2(high, filter.backward, net.in_padded, 2 * F, net.in_padded);
    net.filters.push_back(filter);
  }
  for (int64_t i = 0; i + 1 < static_cast<int64_t>(weights.size()); ++i) {
    BFloat16* rounded = scratch.take<BFloat16>(F * F);
    round_rows(weights[i].const_data_ptr<float>(), F, F, F, rounded);
    Hidden layer{biases[i].const_data_ptr<float>(), scratch.take<BFloat16>(F * F), scratch.take<BFloat16>(F * F)};
    pack_transposed(rounded, F, F, layer.forward);
    at::vec::pack_vnni2(rounded, layer.backward, F, F, F);
    net.hidden.push_back(layer);
  }
  net.weight = weights.back().const_data_ptr<float>();
  net.bias = biases.back().const_data_ptr<float>();
  net.forward = scratch.take<BFloat16>(LANES * F);
  pack_halves(net.weight, net.out, F, scratch.take<BFloat16>(LANES * F), net.forward);
  return net;
}

int64_t scratch_bytes(const Net& net) {
  return R * net.halves * 2 + 4 * net.L() * R * net.F * 2 + 8 * R * net.F * 2 + R * net.F * 4 + R * net.in_padded * 4 +
         R * 4 * LANES * 4 + BLOCK * 2 * net.F * 4 + (4 * net.L() + 16) * 64;
}

Activations take_activations(const Net& net, Scratch<TILES>& scratch) {
  Activations a{scratch.take<BFloat16>(R * net.halves), {}, {}, {}, {}};
  for (int64_t i = 0; i < net.L(); ++i) {
    for (auto* list : {&a.s, &a.c, &a.z}) list->push_back(scratch.take<BFloat16>(R * net.F));
    a.h.push_back(i ? scratch.take<BFloat16>(R * net.F) : a.s[0]);
  }
  return a;
}

// One filter on a block of rows: s and c from phases and exponents, which `block` (BLOCK, 2F) is scratch for.
void filter(const Net& net, int64_t i, const BFloat16* v, float* block, BFloat16* s, BFloat16* c) {
  const int64_t F = net.F;
  const float* bias = net.filters[i].bias;
  product(BLOCK, 2 * F, net.halves, v, net.halves, net.filters[i].forward, block, 2 * F, false);
  for (int64_t r = 0; r < BLOCK; ++r)
    for (int64_t j = 0; j < F; j += LANES) {
      const Lanes phase = Lanes::loadu(block + r * 2 * F + j) + Lanes::loadu(bias + j);
      const Lanes amplitude = (Lanes::loadu(block + r * 2 * F + F + j) + Lanes::loadu(bias + F + j)).exp_u20();
      store(s + r * F + j, phase.sin() * amplitude);
      store(c + r * F + j, phase.cos() * amplitude);
    }
}

void activations(const Net& net, const float* v, int64_t first, int64_t count, Activations& a, float* block) {
  const int64_t F = net.F, in = net.in;
  std::fill(a.v, a.v + R * net.halves, BFloat16(0.f));
  for (int64_t r = 0; r < count; ++r)
    split_row(v + (first + r) * in, in, a.v + r * net.halves, a.v + r * net.halves + in, a.v + r * net.halves + 2 * in);
  for (int64_t row = 0; row < R; row += BLOCK)
    for (int64_t i = 0; i < net.L(); ++i) {
      filter(net, i, a.v + row * net.halves, block, a.s[i] + row * F, a.c[i] + row * F);
      if (i == 0) continue;
      const Hidden& layer = net.hidden[i - 1];
      product(BLOCK, F, F, a.h[i - 1] + row * F, F, layer.forward, block, F, false);
      for (int64_t r = 0; r < BLOCK; ++r)
        for (int64_t j = 0; j < F; j += LANES) {
          const int64_t at = (row + r) * F + j;
          const __m512 z = _mm512_add_ps(_mm512_loadu_ps(block + r * F + j), _mm512_loadu_ps(layer.bias + j));
          store(a.z[i] + at, z);
          store(a.h[i] + at, _mm512_mul_ps(load(a.s[i] + at), z));
        }
    }
}

Tensor gabor_forward(const Tensor& v, at::TensorList filters, at::TensorList filter_biases,
                     at::TensorList weights, at::TensorList biases) {
  const Net net = describe(v, filters, filter_biases, weights, biases);
  Tensor out = at::empty({net.rows, net.out}, v.options());
  in_parts(net.tiles(), [&](int64_t, int64_t begin, int64_t end) {
    Scratch<TILES> scratch(scratch_bytes(net));
    Activations a = take_activations(net, scratch);
    float *block = scratch.take<float>(BLOCK * 2 * net.F), *c = scratch.take<float>(R * LANES);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * R, count = std::min(R, net.rows - first);
      activations(net, v.const_data_ptr<float>(), first, count, a, block);
      product(R, LANES, net.F, a.h.back(), net.F, net.forward, c, LANES, false);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t o = 0; o < net.out; ++o)
          out.mutable_data_ptr<float>()[(first + r) * net.out + o] =
              c[r * LANES + o] + c[r * LANES + net.out + o] + net.bias[o];
    }
  });
  return out;
}

// One part's sums of the gradients.
struct Gradients {
  std::vector<float*> filters, filter_biases, weights, biases;
};

// Adds the rows' gradients to `sums` and gives that of v in `grad_v` (R, in_padded).
void tile_backward(const Net& net, const float* g, int64_t count, const Activations& a, const Gradients& sums, float* gh,
                   BFloat16* gp, BFloat16* gz, BFloat16* gt, BFloat16* xv, float* grad_v, bool add_to) {
  const int64_t F = net.F, L = net.L(), m = net.out;
  std::fill(gh + count * F, gh + R * F, 0.f);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t o = 0; o < m; ++o) sums.biases[L - 1][o] += g[r * m + o];
    for (int64_t j = 0; j < F; j += LANES) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t o = 0; o < m; ++o) {
        const __m512 one = _mm512_set1_ps(g[r * m + o]);
        sum = _mm512_fmadd_ps(one, _mm512_loadu_ps(net.weight + o * F + j), sum);
        add(sums.weights[L - 1] + o * F + j, _mm512_mul_ps(one, load(a.h[L - 1] + r * F + j)));
      }
      _mm512_storeu_ps(gh + r * F + j, sum);
    }
  }
  for (int64_t i = L - 1; i >= 0; --i) {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t j = 0; j < F; j += LANES) {
        const int64_t at = r * F + j;
        const __m512 of_h = _mm512_loadu_ps(gh + at), s = load(a.s[i] + at);
        const __m512 of_s = i ? _mm512_mul_ps(of_h, load(a.z[i] + at)) : of_h;
        const __m512 of_phase = _mm512_mul_ps(of_s, load(a.c[i] + at)), of_exponent = _mm512_mul_ps(of_s, s);
        store(gp + r * 2 * F + j, of_phase);
        store(gp + r * 2 * F + F + j, of_exponent);
        add(sums.filter_biases[i] + j, of_phase);
        add(sums.filter_biases[i] + F + j, of_exponent);
        if (i) {
          const __m512 of_z = _mm512_mul_ps(of_h, s);
          store(gz + at, of_z);
          add(sums.biases[i - 1] + j, of_z);
        }
      }
    weight_gradient(gp, 2 * F, a.v, net.halves, net.in_padded, gt, xv, sums.filters[i], add_to);
    product(R, net.in_padded, 2 * F, gp, 2 * F, net.filters[i].backward, grad_v, net.in_padded, i < L - 1);
    if (i) {
      weight_gradient(gz, F, a.h[i - 1], F, F, gt, xv, sums.weights[i - 1], add_to);
      product(R, F, F, gz, F, net.hidden[i - 1].backward, gh, F, false);
    }
  }
}

// Gradients of v, of each filter, of each filter's bias, of each weight, of each bias.
std::vector<Tensor> gabor_backward(const Tensor& g, const Tensor& v, at::TensorList filters,
                                   at::TensorList filter_biases, at::TensorList weights,
                                   at::TensorList biases) {
  const Net net = describe(v, filters, filter_biases, weights, biases);
  const int64_t parts = num_parts(net.tiles()), F = net.F, L = net.L();
  Tensor grad_v = at::empty_like(v);
  std::vector<Tensor> of_filters, of_filter_biases, of_weights, of_biases;
  for (int64_t i = 0; i < L; ++i) {
    const int64_t out = i < L - 1 ? F : net.out;
    of_filters.push_back(at::empty({parts, 2 * F, net.in_padded}, v.options()));
    of_filter_biases.push_back(at::zeros({parts, 2 * F}, v.options()));
    of_weights.push_back(at::zeros({parts, out, F}, v.options()));
    of_biases.push_back(at::zeros({parts, out}, v.options()));
  }
  auto parts_of = [&](const std::vector<Tensor>& sums, int64_t part) {
    std::vector<float*> out;
    for (const auto& t : sums) out.push_back(t.mutable_data_ptr<float>() + part * t.stride(0));
    return out;
  };
  in_parts(net.tiles(), [&](int64_t part, int64_t begin, int64_t end) {
    Scratch<TILES> scratch(scratch_bytes(net));
    Activations a = take_activations(net, scratch);
    const Gradients sums{parts_of(of_filters, part), parts_of(of_filter_biases, part), parts_of(of_weights, part),
                         parts_of(of_biases, part)};
    float *block = scratch.take<float>(BLOCK * 2 * F), *gh = scratch.take<float>(R * F),
          *of_v = scratch.take<float>(R * net.in_padded);
    BFloat16 *gp = scratch.take<BFloat16>(R * 2 * F), *gz = scratch.take<BFloat16>(R * F),
             *gt = scratch.take<BFloat16>(R * 2 * F), *xv = scratch.take<BFloat16>(R * std::max(F, net.in_padded));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * R, count = std::min(R, net.rows - first);
      activations(net, v.const_data_ptr<float>(), first, count, a, block);
      tile_backward(net, g.const_data_ptr<float>() + first * net.out, count, a, sums, gh, gp, gz, gt, xv, of_v,
                    tile > begin);
      for (int64_t r = 0; r < count; ++r)
        std::copy_n(of_v + r * net.in_padded, net.in, grad_v.mutable_data_ptr<float>() + (first + r) * net.in);
    }
  });
  std::vector<Tensor> out{grad_v};
  for (const auto& t : of_filters) out.push_back(t.sum(0).slice(1, 0, net.in));
  for (const auto* list : {&of_filter_biases, &of_weights, &of_biases})
    for (const auto& t : *list) out.push_back(t.sum(0));
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(omnimotion_turbo, library) {
  library.def("gabor_forward", &gabor_forward);
  library.def("gabor_backward", &gabor_backward);
}

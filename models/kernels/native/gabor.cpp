// The Gabor network, forward and backward, with bfloat16 products on the CPU's matrix unit. PyTorch version and notation:
// models/kernels/fused_gabor.py.
//
// As in chain.cpp, all layers are computed for a tile before the next tile, and the backward pass computes the activations
// again. Phases and exponents v P^T need more precision than bfloat16. v and P are split into rounded values (high) and
// rounded remainders (low), and the product is high v high P + low v high P + high v low P, with a relative error of 2^-16.

#include "tiles.h"

namespace {

using Lanes = at::vec::Vectorized<float>;

struct Filter {
  const float* bias;                                     // (2F,)
  BFloat16 *forward, *backward;                          // packed: P^T in three parts (high, high, low); P
};

struct Hidden {
  const float* bias;                                     // (F,)
  BFloat16 *forward, *backward;                          // packed: W^T; W
};

struct Net {
  std::vector<Filter> filters;
  std::vector<Hidden> hidden;
  const float *weight, *bias;                            // output layer (out, F)
  BFloat16* forward;                                     // its two parts (rounded value, remainder), packed
  int64_t in, in_padded, split;                          // columns of v; of its gradient; of its three parts
  int64_t F, out, rows;

  int64_t tiles() const { return (rows + R - 1) / R; }
  int64_t L() const { return filters.size(); }
};

// Activations of a tile, (R, F) each.
struct Activations {
  BFloat16* v;                                           // (R, split): high, low, high
  std::vector<BFloat16*> s, c, z, h;                     // z[0] is not used, h[0] is s[0]
};

// The network with packed weights. They are in scratch memory, which the thread's next call overwrites.
Net describe(const Tensor& v, at::TensorList filters, at::TensorList filter_biases,
             at::TensorList weights, at::TensorList biases) {
  Net net;
  net.in = v.size(1);
  net.in_padded = padded(net.in, 2 * LANES);
  net.split = padded(3 * net.in, 2 * LANES);
  net.F = weights.back().size(1);
  net.out = weights.back().size(0);
  net.rows = v.size(0);
  const int64_t F = net.F, L = filters.size();
  Scratch<WEIGHTS> scratch(L * (2 * F * (2 * net.split + 2 * net.in_padded) + 3 * F * F) * 2 + 4 * LANES * F * 2 + 4096);
  for (int64_t i = 0; i < L; ++i) {
    const float* p = filters[i].const_data_ptr<float>();
    BFloat16* rounded = scratch.take<BFloat16>(2 * F * net.split);
    std::fill(rounded, rounded + 2 * F * net.split, BFloat16(0.f));
    for (int64_t n = 0; n < 2 * F; ++n)
      for (int64_t k = 0; k < net.in; ++k) {
        BFloat16* row = rounded + n * net.split;
        row[k] = row[net.in + k] = BFloat16(p[n * net.in + k]);
        row[2 * net.in + k] = BFloat16(p[n * net.in + k] - static_cast<float>(row[k]));
      }
    Filter filter{filter_biases[i].const_data_ptr<float>(), scratch.take<BFloat16>(2 * F * net.split),
                  scratch.take<BFloat16>(2 * F * net.in_padded)};
    pack_transposed(rounded, 2 * F, net.split, filter.forward);
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
  pack_split(net.weight, net.out, F, scratch.take<BFloat16>(LANES * F), net.forward);
  return net;
}

// Upper bound of the scratch memory of a forward or backward pass of one part, in bytes.
int64_t scratch_bytes(const Net& net) {
  return R * net.split * 2 + 4 * net.L() * R * net.F * 2 + 8 * R * net.F * 2 + R * net.F * 4 + R * net.in_padded * 4 +
         R * 4 * LANES * 4 + BLOCK * 2 * net.F * 4 + (4 * net.L() + 16) * 64;
}

// Memory for the activations of a tile.
Activations take_activations(const Net& net, Scratch<TILES>& scratch) {
  Activations a{scratch.take<BFloat16>(R * net.split), {}, {}, {}, {}};
  for (int64_t i = 0; i < net.L(); ++i) {
    for (auto* list : {&a.s, &a.c, &a.z}) list->push_back(scratch.take<BFloat16>(R * net.F));
    a.h.push_back(i ? scratch.take<BFloat16>(R * net.F) : a.s[0]);
  }
  return a;
}

// s and c of filter i for a block of rows. `block` (BLOCK, 2F) is scratch memory for phases and exponents.
void filter(const Net& net, int64_t i, const BFloat16* v, float* block, BFloat16* s, BFloat16* c) {
  const int64_t F = net.F;
  const float* bias = net.filters[i].bias;
  product(BLOCK, 2 * F, net.split, v, net.split, net.filters[i].forward, block, 2 * F, false);
  for (int64_t r = 0; r < BLOCK; ++r)
    for (int64_t j = 0; j < F; j += LANES) {
      const Lanes phase = Lanes::loadu(block + r * 2 * F + j) + Lanes::loadu(bias + j);
      const Lanes amplitude = (Lanes::loadu(block + r * 2 * F + F + j) + Lanes::loadu(bias + F + j)).exp_u20();
      store(s + r * F + j, phase.sin() * amplitude);
      store(c + r * F + j, phase.cos() * amplitude);
    }
}

// Compute the activations `a` of rows first to first + count - 1 of v. `block` (BLOCK, 2F) is scratch memory.
void activations(const Net& net, const float* v, int64_t first, int64_t count, Activations& a, float* block) {
  const int64_t F = net.F, in = net.in;
  std::fill(a.v, a.v + R * net.split, BFloat16(0.f));
  for (int64_t r = 0; r < count; ++r)
    split_row(v + (first + r) * in, in, a.v + r * net.split, a.v + r * net.split + in, a.v + r * net.split + 2 * in);
  for (int64_t row = 0; row < R; row += BLOCK)
    for (int64_t i = 0; i < net.L(); ++i) {
      filter(net, i, a.v + row * net.split, block, a.s[i] + row * F, a.c[i] + row * F);
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

// Sums of the gradients over the tiles of one part.
struct Gradients {
  std::vector<float*> filters, filter_biases, weights, biases;
};

// Backward pass of a tile: adds the gradients of the parameters to `sums` and writes that of v to `grad_v`
// (R, in_padded). `add_to`: whether `sums.filters` and `sums.weights` hold earlier tiles. The other arrays are scratch
// memory: gh (R, F) gradient of h, gp (R, 2F) of phases and exponents, gz (R, F) of z.
void tile_backward(const Net& net, const float* g, int64_t count, const Activations& a, const Gradients& sums, float* gh,
                   BFloat16* gp, BFloat16* gz, BFloat16* g_transposed, BFloat16* x_packed, float* grad_v, bool add_to) {
  const int64_t F = net.F, L = net.L(), m = net.out;
  std::fill(gh + count * F, gh + R * F, 0.f);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t o = 0; o < m; ++o) sums.biases[L - 1][o] += g[r * m + o];
    for (int64_t j = 0; j < F; j += LANES) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t o = 0; o < m; ++o) {
        const __m512 g_o = _mm512_set1_ps(g[r * m + o]);
        sum = _mm512_fmadd_ps(g_o, _mm512_loadu_ps(net.weight + o * F + j), sum);
        add(sums.weights[L - 1] + o * F + j, _mm512_mul_ps(g_o, load(a.h[L - 1] + r * F + j)));
      }
      _mm512_storeu_ps(gh + r * F + j, sum);
    }
  }
  for (int64_t i = L - 1; i >= 0; --i) {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t j = 0; j < F; j += LANES) {
        const int64_t at = r * F + j;
        const __m512 grad_h = _mm512_loadu_ps(gh + at), s = load(a.s[i] + at);
        const __m512 grad_s = i ? _mm512_mul_ps(grad_h, load(a.z[i] + at)) : grad_h;
        const __m512 grad_phase = _mm512_mul_ps(grad_s, load(a.c[i] + at)), grad_exponent = _mm512_mul_ps(grad_s, s);
        store(gp + r * 2 * F + j, grad_phase);
        store(gp + r * 2 * F + F + j, grad_exponent);
        add(sums.filter_biases[i] + j, grad_phase);
        add(sums.filter_biases[i] + F + j, grad_exponent);
        if (i) {
          const __m512 grad_z = _mm512_mul_ps(grad_h, s);
          store(gz + at, grad_z);
          add(sums.biases[i - 1] + j, grad_z);
        }
      }
    weight_gradient(gp, 2 * F, a.v, net.split, net.in_padded, g_transposed, x_packed, sums.filters[i], add_to);
    product(R, net.in_padded, 2 * F, gp, 2 * F, net.filters[i].backward, grad_v, net.in_padded, i < L - 1);
    if (i) {
      weight_gradient(gz, F, a.h[i - 1], F, F, g_transposed, x_packed, sums.weights[i - 1], add_to);
      product(R, F, F, gz, F, net.hidden[i - 1].backward, gh, F, false);
    }
  }
}

// Gradients of v, of all P, of all b, of all weights, of all biases.
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
    float* block = scratch.take<float>(BLOCK * 2 * F);
    float* gh = scratch.take<float>(R * F);
    float* grad_rows = scratch.take<float>(R * net.in_padded);
    BFloat16* gp = scratch.take<BFloat16>(R * 2 * F);
    BFloat16* gz = scratch.take<BFloat16>(R * F);
    BFloat16* g_transposed = scratch.take<BFloat16>(R * 2 * F);
    BFloat16* x_packed = scratch.take<BFloat16>(R * std::max(F, net.in_padded));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * R, count = std::min(R, net.rows - first);
      activations(net, v.const_data_ptr<float>(), first, count, a, block);
      tile_backward(net, g.const_data_ptr<float>() + first * net.out, count, a, sums, gh, gp, gz, g_transposed,
                    x_packed, grad_rows, tile > begin);
      for (int64_t r = 0; r < count; ++r)
        std::copy_n(grad_rows + r * net.in_padded, net.in, grad_v.mutable_data_ptr<float>() + (first + r) * net.in);
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

// A chain of linear layers, forward and backward, with bfloat16 products on the CPU's matrix unit. PyTorch version and
// notation: models/kernels/fused_mlp.py.
//
// All layers are computed for a tile of R rows before the next tile, so that it stays in the cache. The backward pass
// computes the activations again, so that only the chain's input is stored.

#include "tiles.h"

namespace {


struct Layer {
  int64_t in, out;              // columns; of layer 0, `in` is both parts of e (rounded value, remainder), padded
  const float* bias;
  int64_t bias_stride;          // numbers from one frame's bias to the next; 0: one bias for all frames
  float slope;                  // of the LeakyReLU after the layer
  BFloat16 *forward, *backward; // packed: W^T; W
};

struct Chain {
  std::vector<Layer> hidden;
  const float *weight, *bias;   // last layer, float32
  BFloat16* forward;            // its weights' two parts (rounded value, remainder), packed
  int64_t in, in_padded;        // columns of e
  int64_t width, out;           // columns of the last activation, of the result
  int64_t frames, rows;         // number of frames, rows of a frame

  int64_t tiles_a_frame() const { return (rows + R - 1) / R; }
  int64_t tiles() const { return frames * tiles_a_frame(); }
  int64_t widest() const {
    int64_t w = 2 * LANES;
    for (const auto& layer : hidden) w = std::max({w, layer.in, layer.out});
    return w;
  }
};

// The chain with packed weights. They are in scratch memory, which the thread's next call overwrites.
Chain describe(const Tensor& e, int64_t frames, at::ArrayRef<double> slopes, at::TensorList weights,
               at::TensorList biases, bool backward) {
  Chain chain;
  chain.in = e.size(1);
  chain.in_padded = padded(chain.in, LANES);
  chain.frames = frames;
  chain.rows = e.size(0) / frames;
  int64_t bytes = 1 << 16;
  for (const auto& w : weights) bytes += 3 * (2 * padded(w.size(1), 2 * LANES) * padded(w.size(0), 2 * LANES)) * 2 + 256;
  Scratch<WEIGHTS> scratch(bytes);
  for (size_t k = 0; k < slopes.size(); ++k) {
    const float* w = weights[k].const_data_ptr<float>();
    const int64_t in = weights[k].size(1), out = weights[k].size(0);
    Layer layer{k ? in : padded(2 * in, 2 * LANES), out, biases[k].const_data_ptr<float>(),
                biases[k].dim() == 3 ? out : 0, static_cast<float>(slopes[k]), nullptr, nullptr};
    BFloat16* rounded = scratch.take<BFloat16>(out * layer.in);
    layer.forward = scratch.take<BFloat16>(out * layer.in);
    if (k == 0) {  // both parts of e are multiplied by the same weights
      std::fill(rounded, rounded + out * layer.in, BFloat16(0.f));
      round_rows(w, out, in, layer.in, rounded);
      for (int64_t n = 0; n < out; ++n)
        std::copy_n(rounded + n * layer.in, in, rounded + n * layer.in + in);
      pack_transposed(rounded, out, layer.in, layer.forward);
      std::fill(rounded, rounded + out * chain.in_padded, BFloat16(0.f));
      round_rows(w, out, in, chain.in_padded, rounded);
    } else {
      round_rows(w, out, in, in, rounded);
      pack_transposed(rounded, out, in, layer.forward);
    }
    if (backward) {
      const int64_t columns = k ? in : chain.in_padded;
      layer.backward = scratch.take<BFloat16>(out * columns);
      at::vec::pack_vnni2(rounded, layer.backward, columns, out, columns);
    }
    chain.hidden.push_back(layer);
  }
  chain.weight = weights.back().const_data_ptr<float>();
  chain.bias = biases.back().const_data_ptr<float>();
  chain.width = weights.back().size(1);
  chain.out = weights.back().size(0);
  chain.forward = scratch.take<BFloat16>(LANES * chain.width);
  pack_split(chain.weight, chain.out, chain.width, scratch.take<BFloat16>(LANES * chain.width), chain.forward);
  return chain;
}

// Rows of a tile: index of the first one, their number, their frame.
struct Span {
  int64_t first, count, frame;
};

Span span(const Chain& chain, int64_t tile) {
  const int64_t frame = tile / chain.tiles_a_frame(), row = tile % chain.tiles_a_frame() * R;
  return {frame * chain.rows + row, std::min(R, chain.rows - row), frame};
}

// Compute the inputs of all layers: x[0] is the two parts of e, zero below the tile's last row, x[k + 1] the activation
// after layer k. `c` is scratch memory.
void activations(const Chain& chain, const float* e, const Span& rows, const std::vector<BFloat16*>& x, float* c) {
  const int64_t D = chain.in, ld = chain.hidden[0].in;
  std::fill(x[0], x[0] + R * ld, BFloat16(0.f));
  for (int64_t r = 0; r < rows.count; ++r)
    split_row(e + (rows.first + r) * D, D, x[0] + r * ld, x[0] + r * ld + D, nullptr);
  for (size_t k = 0; k < chain.hidden.size(); ++k) {
    const Layer& layer = chain.hidden[k];
    const float* bias = layer.bias + rows.frame * layer.bias_stride;
    const __m512 slope = _mm512_set1_ps(layer.slope);
    for (int64_t first = 0; first < R; first += BLOCK) {
      product(BLOCK, layer.out, layer.in, x[k] + first * layer.in, layer.in, layer.forward, c, layer.out, false);
      BFloat16* to = x[k + 1] + first * layer.out;
      for (int64_t r = 0; r < BLOCK; ++r)
        for (int64_t j = 0; j < layer.out; j += LANES) {
          const __m512 v = _mm512_add_ps(_mm512_loadu_ps(c + r * layer.out + j), _mm512_loadu_ps(bias + j));
          store(to + r * layer.out + j, _mm512_max_ps(v, _mm512_mul_ps(v, slope)));
        }
    }
  }
}

// Memory for the activations of a tile.
std::vector<BFloat16*> take_activations(const Chain& chain, Scratch<TILES>& scratch) {
  std::vector<BFloat16*> x{scratch.take<BFloat16>(R * chain.hidden[0].in)};
  for (const auto& layer : chain.hidden) x.push_back(scratch.take<BFloat16>(R * layer.out));
  return x;
}

// Upper bound of the scratch memory of a forward or backward pass of one part, in bytes.
int64_t scratch_bytes(const Chain& chain) {
  return (chain.hidden.size() + 6) * (R * chain.widest() * sizeof(BFloat16) + 64) + 2 * R * chain.widest() * sizeof(float);
}

// From the gradient g (count, out) of the result to the gradient G (R, width) before the last activation x. Adds to the
// gradients of the last layer and to that of the bias of the layer before it.
void last_layer_backward(const Chain& chain, const float* g, const Span& rows, const BFloat16* x, BFloat16* G,
                         float* grad_weight, float* grad_bias, float* grad_bias_before) {
  const int64_t m = chain.out, w = chain.width;
  const __m512 slope = _mm512_set1_ps(chain.hidden.back().slope), zero = _mm512_setzero_ps();
  std::fill(G + rows.count * w, G + R * w, BFloat16(0.f));
  for (int64_t o = 0; o < m; ++o)
    for (int64_t r = 0; r < rows.count; ++r) grad_bias[o] += g[r * m + o];
  for (int64_t r = 0; r < rows.count; ++r)
    for (int64_t j = 0; j < w; j += LANES) {
      const __m512 v = load(x + r * w + j);
      __m512 before = zero;
      for (int64_t o = 0; o < m; ++o) {
        const __m512 g_o = _mm512_set1_ps(g[r * m + o]);
        before = _mm512_fmadd_ps(g_o, _mm512_loadu_ps(chain.weight + o * w + j), before);
        add(grad_weight + o * w + j, _mm512_mul_ps(g_o, v));
      }
      before = _mm512_mask_mul_ps(before, _mm512_cmp_ps_mask(v, zero, _CMP_LE_OQ), before, slope);
      add(grad_bias_before + j, before);
      store(G + r * w + j, before);
    }
}

// From the gradient c (BLOCK, w) of an activation x to the gradient G before the activation. Adds the sum of G over the
// rows to the gradient of the bias.
void activation_backward(const float* c, const BFloat16* x, int64_t w, float negative_slope, BFloat16* G,
                         float* grad_bias) {
  const __m512 slope = _mm512_set1_ps(negative_slope), zero = _mm512_setzero_ps();
  // Row by row: the numbers of a column are a power of two apart, so that they share few sets of the cache.
  for (int64_t r = 0; r < BLOCK; ++r)
    for (int64_t j = 0; j < w; j += LANES) {
      __m512 before = _mm512_loadu_ps(c + r * w + j);
      before = _mm512_mask_mul_ps(before, _mm512_cmp_ps_mask(load(x + r * w + j), zero, _CMP_LE_OQ), before, slope);
      add(grad_bias + j, before);
      store(G + r * w + j, before);
    }
}

Tensor chain_forward(const Tensor& e, int64_t frames, at::ArrayRef<double> slopes,
                     at::TensorList weights, at::TensorList biases) {
  const Chain chain = describe(e, frames, slopes, weights, biases, false);
  Tensor out = at::empty({e.size(0), chain.out}, e.options());
  const float* input = e.const_data_ptr<float>();
  float* result = out.mutable_data_ptr<float>();
  in_parts(chain.tiles(), [&](int64_t, int64_t begin, int64_t end) {
    Scratch<TILES> scratch(scratch_bytes(chain));
    const auto x = take_activations(chain, scratch);
    float* c = scratch.take<float>(R * chain.widest());
    for (int64_t tile = begin; tile < end; ++tile) {
      const Span rows = span(chain, tile);
      activations(chain, input, rows, x, c);
      product(R, LANES, chain.width, x.back(), chain.width, chain.forward, c, LANES, false);
      for (int64_t r = 0; r < rows.count; ++r)
        for (int64_t o = 0; o < chain.out; ++o)
          result[(rows.first + r) * chain.out + o] = c[r * LANES + o] + c[r * LANES + chain.out + o] + chain.bias[o];
    }
  });
  return out;
}

// Gradients of e, and of weight and bias of each layer.
std::vector<Tensor> chain_backward(const Tensor& g, const Tensor& e, int64_t frames, at::ArrayRef<double> slopes,
                                   at::TensorList weights, at::TensorList biases) {
  const Chain chain = describe(e, frames, slopes, weights, biases, true);
  const int64_t parts = num_parts(chain.tiles()), hidden = chain.hidden.size(), D = chain.in;
  Tensor grad_e = at::empty_like(e);
  std::vector<Tensor> grad_w, grad_b;  // of each layer; the first dimension is the part
  for (const auto& layer : chain.hidden) {
    grad_w.push_back(at::empty({parts, layer.out, layer.in}, e.options()));
    grad_b.push_back(at::zeros({parts, layer.bias_stride ? frames : 1, layer.out}, e.options()));
  }
  grad_w.push_back(at::zeros({parts, chain.out, chain.width}, e.options()));
  grad_b.push_back(at::zeros({parts, chain.out}, e.options()));
  const float *input = e.const_data_ptr<float>(), *gradient = g.const_data_ptr<float>();

  in_parts(chain.tiles(), [&](int64_t part, int64_t begin, int64_t end) {
    Scratch<TILES> scratch(scratch_bytes(chain));
    const auto x = take_activations(chain, scratch);
    float* c = scratch.take<float>(R * chain.widest());
    BFloat16* next = scratch.take<BFloat16>(R * chain.widest());
    BFloat16* G = scratch.take<BFloat16>(R * chain.widest());
    BFloat16* g_transposed = scratch.take<BFloat16>(R * chain.widest());
    BFloat16* x_packed = scratch.take<BFloat16>(R * chain.widest());
    // Sum of the gradients of the bias of layer k, for one frame.
    auto bias_of = [&](int64_t k, int64_t frame) {
      const Layer& layer = chain.hidden[k];
      return grad_b[k].mutable_data_ptr<float>() + (part * grad_b[k].size(1) + (layer.bias_stride ? frame : 0)) * layer.out;
    };
    for (int64_t tile = begin; tile < end; ++tile) {
      const Span rows = span(chain, tile);
      activations(chain, input, rows, x, c);
      last_layer_backward(chain, gradient + rows.first * chain.out, rows, x.back(), G,
                          grad_w[hidden].mutable_data_ptr<float>() + part * chain.out * chain.width,
                          grad_b[hidden].mutable_data_ptr<float>() + part * chain.out, bias_of(hidden - 1, rows.frame));
      for (int64_t k = hidden - 1; k >= 0; --k) {
        const Layer& layer = chain.hidden[k];
        weight_gradient(G, layer.out, x[k], layer.in, layer.in, g_transposed, x_packed,
                        grad_w[k].mutable_data_ptr<float>() + part * layer.out * layer.in, tile > begin);
        const int64_t in = k ? layer.in : chain.in_padded;
        for (int64_t row = 0; row < R; row += BLOCK) {
          product(BLOCK, in, layer.out, G + row * layer.out, layer.out, layer.backward, c + (k ? 0 : row * in), in, false);
          if (k)
            activation_backward(c, x[k] + row * in, in, chain.hidden[k - 1].slope, next + row * in,
                                bias_of(k - 1, rows.frame));
        }
        std::swap(G, next);
      }
      for (int64_t r = 0; r < rows.count; ++r)
        std::copy(c + r * chain.in_padded, c + r * chain.in_padded + D,
                  grad_e.mutable_data_ptr<float>() + (rows.first + r) * D);
    }
  });

  std::vector<Tensor> out{grad_e};
  for (int64_t k = 0; k <= hidden; ++k) {
    Tensor w = grad_w[k].sum(0), b = grad_b[k].sum(0);
    out.push_back(k ? w : w.slice(1, 0, D) + w.slice(1, D, 2 * D));
    out.push_back(b.view(biases[k].sizes()));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(omnimotion_turbo, library) {
  library.def("chain_forward", &chain_forward);
  library.def("chain_backward", &chain_backward);
}

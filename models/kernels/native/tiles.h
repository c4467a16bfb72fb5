// Functions that chain.cpp and gabor.cpp share. Rows are processed in tiles that fit a core's cache.
//
// For a product C = A B, the matrix unit takes bfloat16 numbers: A (m, k) row by row, and B (k, n) with its rows in pairs,
// [k / 2][n][2] (called VNNI). C is float32. "Packed" weights are in B's layout.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <vector>

using at::BFloat16;
using at::Tensor;

constexpr int64_t R = 128;      // rows of a tile: its activations and the weights fit a core's second-level cache
constexpr int64_t BLOCK = 32;   // rows of a product: its float32 result fits the first-level cache
constexpr int64_t LANES = 16;   // float32 numbers in a register of 512 bits

// n rounded up to a multiple of `to`.
inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Mask of the first n lanes of a register.
inline __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : (1 << n) - 1; }

inline __m512 load(const BFloat16* p) {
  __m512 out;
  at::vec::cvtbf16_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), out);
  return out;
}

inline void store(BFloat16* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(v));
}

inline void add(float* p, __m512 v) { _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), v)); }

// Scratch memory of a thread, one buffer for each purpose. It is kept after the call, so its pages are allocated once.
enum Purpose { WEIGHTS, TILES };

template <Purpose purpose>
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    static thread_local std::vector<char> memory;
    if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(bytes + 64);
    next_ = reinterpret_cast<char*>(padded(reinterpret_cast<int64_t>(memory.data()), 64));
  }
  template <typename T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(next_);
    next_ += padded(count * sizeof(T), 64);
    return out;
  }

 private:
  char* next_;
};

// Round W (out, in) to bfloat16, in rows of `in_padded` numbers; the padding is not written.
inline void round_rows(const float* w, int64_t out, int64_t in, int64_t in_padded, BFloat16* to) {
  for (int64_t n = 0; n < out; ++n)
    for (int64_t k = 0; k < in; k += LANES) {
      const __mmask16 mask = first_lanes(in - k);
      _mm256_mask_storeu_epi16(to + n * in_padded + k, mask,
                               at::vec::cvtfp32_bf16(_mm512_maskz_loadu_ps(mask, w + n * in + k)));
    }
}

// Split a row of n float32 numbers into its rounded value `high` and its rounded remainder `low`. The rounded value is also
// written to `high_copy`, if that is not null.
inline void split_row(const float* row, int64_t n, BFloat16* high, BFloat16* low, BFloat16* high_copy) {
  for (int64_t k = 0; k < n; k += LANES) {
    const __mmask16 mask = first_lanes(n - k);
    const __m512 value = _mm512_maskz_loadu_ps(mask, row + k);
    const __m256i rounded = at::vec::cvtfp32_bf16(value);
    __m512 exact;
    at::vec::cvtbf16_fp32(rounded, exact);
    _mm256_mask_storeu_epi16(high + k, mask, rounded);
    _mm256_mask_storeu_epi16(low + k, mask, at::vec::cvtfp32_bf16(_mm512_sub_ps(value, exact)));
    if (high_copy) _mm256_mask_storeu_epi16(high_copy + k, mask, rounded);
  }
}

// Pack W^T of W (out, in_padded), as B of a product x W^T. A pair of bfloat16 numbers is moved as one float32 number.
inline void pack_transposed(const BFloat16* w, int64_t out, int64_t in_padded, BFloat16* packed) {
  const float* from = reinterpret_cast<const float*>(w);
  float* to = reinterpret_cast<float*>(packed);
  const int64_t pairs = in_padded / 2;
  for (int64_t n = 0; n < out; n += LANES)
    for (int64_t k = 0; k < pairs; k += LANES)
      at::vec::transpose_mxn<float, LANES, LANES>(from + n * pairs + k, pairs, to + k * out + n, out);
}

// Pack W^T of a last layer W (out, in) with at most LANES / 2 outputs: the first `out` columns are the rounded weights, the
// next `out` columns their rounded remainders. `rows` (LANES, in) is scratch memory.
inline void pack_split(const float* w, int64_t out, int64_t in, BFloat16* rows, BFloat16* packed) {
  std::fill(rows, rows + LANES * in, BFloat16(0.f));
  for (int64_t o = 0; o < out; ++o) split_row(w + o * in, in, rows + o * in, rows + (out + o) * in, nullptr);
  pack_transposed(rows, LANES, in, packed);
}

// C (m, n) = A (m, k) B, or C += A B if `add`. ld_a, ld_c: numbers from one row of A, of C, to the next.
inline void product(int64_t m, int64_t n, int64_t k, const BFloat16* a, int64_t ld_a, const BFloat16* b, float* c,
                    int64_t ld_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, ld_a, n, ld_c, add, a, b, c, true);
}

// Weight gradient of a tile: C (out, in) = G^T X, or += if `add`, with G (R, out) and X (R, in). `g_transposed` and
// `x_packed` are scratch memory.
inline void weight_gradient(const BFloat16* g, int64_t out, const BFloat16* x, int64_t ld_x, int64_t in,
                            BFloat16* g_transposed, BFloat16* x_packed, float* c, bool add) {
  for (int64_t r = 0; r < R; r += 32)
    for (int64_t n = 0; n < out; n += 32)
      at::vec::transpose_mxn<BFloat16>(g + r * out + n, out, g_transposed + n * R + r, R, 32, 32);
  at::vec::pack_vnni2(x, x_packed, ld_x, R, in);
  product(out, in, R, g_transposed, R, x_packed, c, in, add);
}

// Number of equal parts into which tiles are divided, one for each thread. It depends only on the numbers of tiles and
// threads, so that sums over parts are the same in every run.
inline int64_t num_parts(int64_t tiles) { return std::min<int64_t>(at::get_num_threads(), tiles); }

// Call `body(part, begin, end)` for each part: tiles begin to end - 1.
template <typename Body>
void in_parts(int64_t tiles, const Body& body) {
  const int64_t parts = num_parts(tiles);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) body(part, part * tiles / parts, (part + 1) * tiles / parts);
    at::native::cpublas::brgemm_release();
  });
}

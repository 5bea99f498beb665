// LaCT's fast weights for one token of each sequence: `swiglu_token` of ttt/ops/sequence/large_chunk.py, in one pass
// through the weights and one through the sums of their updates.
#pragma once
#include <algorithm>

#include "gelu.h"
#include "memory_step.h"

namespace {

// sums_a += a W and sums_b += b W, for `rows` rows of W, which are read once. Columns that are not there add nothing.
template <int rows>
inline void add_rows_of_two(const float* a, const float* b, const float* w, int64_t outputs, float* sums_a,
                            float* sums_b) {
  for (int64_t j = 0; j < outputs; j += VL) {
    vf total_a = load(sums_a + j), total_b = load(sums_b + j);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const vf row = load_upto(w + r * outputs + j, outputs - j);
      total_a += splat(a[r]) * row;
      total_b += splat(b[r]) * row;
    }
    store(sums_a + j, total_a);
    store(sums_b + j, total_b);
  }
}

// sums_a = a W and sums_b = b W.
inline void products_of_two(const float* a, const float* b, const float* w, int64_t inputs, int64_t outputs,
                            float* sums_a, float* sums_b) {
  constexpr int rows = 4;
  std::fill(sums_a, sums_a + whole_vectors(outputs), 0.0f);
  std::fill(sums_b, sums_b + whole_vectors(outputs), 0.0f);
  int64_t i = 0;
  for (; i + rows <= inputs; i += rows) add_rows_of_two<rows>(a + i, b + i, w + i * outputs, outputs, sums_a, sums_b);
  for (; i < inputs; i++) add_rows_of_two<1>(a + i, b + i, w + i * outputs, outputs, sums_a, sums_b);
}

// total += the outer product of x and d, `inputs` x `outputs`.
inline void add_outer(const float* x, const float* d, int64_t inputs, int64_t outputs, float* total) {
  for (int64_t i = 0; i < inputs; i++) {
    const vf by = splat(x[i]);
    float* row = total + i * outputs;
    int64_t j = 0;
    for (; j + VL <= outputs; j += VL) store(row + j, load(row + j) + by * load(d + j));
    for (; j < outputs; j++) row[j] += x[i] * d[j];
  }
}

// 1 / (1 + e^-z).
inline vf sigmoid(vf z) { return splat(1.0f) / (splat(1.0f) + power_of_two(z * splat(-1.4426950408889634f))); }

// What one thread works with: rows of D and of F numbers, in whole vectors.
struct SwigluToken {
  float *q, *k, *v, *scaled, *out;
  float *gate_q, *up_q, *gate_k, *up_k, *back;

  SwigluToken(const ttt::SwigluToken& a, Parts* parts) {
    const int64_t width = whole_vectors(a.width), inner = whole_vectors(a.inner);
    for (float** row : {&q, &k, &v, &scaled, &out}) *row = parts->take(width);
    for (float** row : {&gate_q, &up_q, &gate_k, &up_k, &back}) *row = parts->take(inner);
  }
};

inline void swiglu_token(const ttt::SwigluToken& a, int64_t row, const SwigluToken& m) {
  const int64_t width = a.width, inner = a.inner, wide = whole_vectors(width), deep = whole_vectors(inner);
  const int64_t rows = a.rows, matrix = row * width * inner;
  read_rows(a.q + row * width, 0, 1, width, m.q, wide);
  read_rows(a.k + row * width, 0, 1, width, m.k, wide);
  read_rows(a.v + row * width, 0, 1, width, m.v, wide);
  products_of_two(m.q, m.k, a.weights[0] + matrix, width, inner, m.gate_q, m.gate_k);
  products_of_two(m.q, m.k, a.weights[2] + matrix, width, inner, m.up_q, m.up_k);
  for (int64_t j = 0; j < deep; j += VL) {  // what the query reads of W_1
    const vf z = load(m.gate_q + j);
    store(m.up_q + j, z * sigmoid(z) * load(m.up_q + j));
  }
  std::fill(m.out, m.out + wide, 0.0f);
  for (int64_t f = 0; f < inner; f += VL) {
    const int64_t some = std::min<int64_t>(VL, inner - f);
    const float* w = a.weights[1] + matrix + f * width;
    store(m.back + f, products_with_rows(m.v, w, width, some));
    if (some == VL)
      add_rows<VL>(m.up_q + f, w, width, m.out);
    else
      for (int64_t r = 0; r < some; r++) add_rows<1>(m.up_q + f + r, w + r * width, width, m.out);
  }
  const vf r0 = splat(a.rates[row]), r1 = splat(a.rates[rows + row]), r2 = splat(a.rates[2 * rows + row]);
  for (int64_t j = 0; j < wide; j += VL) store(m.scaled + j, r1 * load(m.v + j));
  for (int64_t j = 0; j < deep; j += VL) {
    const vf z = load(m.gate_k + j), s = sigmoid(z), gate = z * s, up = load(m.up_k + j), back = load(m.back + j);
    store(m.gate_q + j, gate * up);  // the input of W_1
    store(m.gate_k + j, r0 * back * up * s * (splat(1.0f) + z * (splat(1.0f) - s)));
    store(m.up_k + j, r2 * back * gate);
  }
  add_outer(m.k, m.gate_k, width, inner, a.sums[0] + matrix);
  add_outer(m.gate_q, m.scaled, inner, width, a.sums[1] + matrix);
  add_outer(m.k, m.up_k, width, inner, a.sums[2] + matrix);
  write_rows(m.out, wide, 1, width, a.out + row * width, 0);
}

void run_swiglu_token(const ttt::SwigluToken& a) {
  const int threads = a.rows * a.width * a.inner < 65536 ? 1 : a.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    InScratch<SwigluToken> own(a);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; row++) swiglu_token(a, row, own.memory);
  }
}

}  // namespace

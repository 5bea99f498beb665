// The fast weights of LaCT and In-Place TTT for one token of each sequence: `swiglu_token` and `linear_token` of
// ttt/ops/sequence/large_chunk.py, in one pass through the weights and one through the sums of their updates.
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

// total += the outer product of x and d, `inputs` x `outputs`; the rows of total are `row` apart.
inline void add_outer(const float* x, const float* d, int64_t inputs, int64_t row, int64_t outputs, float* total) {
  for (int64_t i = 0; i < inputs; i++) {
    const vf by = splat(x[i]);
    float* to = total + i * row;
    int64_t j = 0;
    for (; j + VL <= outputs; j += VL) store(to + j, load(to + j) + by * load(d + j));
    for (; j < outputs; j++) to[j] += x[i] * d[j];
  }
}

// 1 / (1 + e^-z).
inline vf sigmoid(vf z) { return splat(1.0f) / (splat(1.0f) + power_of_two(z * splat(-1.4426950408889634f))); }

// What one thread works with: rows of the inputs', the outputs' and the middle's numbers, in whole vectors. The middle
// is that of three weights.
struct LargeChunkToken {
  float *q, *k, *v, *scaled, *out;
  float *gate_q, *up_q, *gate_k, *up_k, *back;

  LargeChunkToken(const ttt::LargeChunkStep& a, Parts* parts) {
    const int64_t inputs = whole_vectors(a.inputs), outputs = whole_vectors(a.outputs), inner = whole_vectors(a.inner);
    for (float** row : {&q, &k}) *row = parts->take(inputs);
    for (float** row : {&v, &scaled, &out}) *row = parts->take(outputs);
    for (float** row : {&gate_q, &up_q, &gate_k, &up_k, &back}) *row = parts->take(inner);
  }
};

// `up` = silu(gate) * up: the input of W_1.
inline void swiglu(const float* gate, float* up, int64_t count) {
  for (int64_t j = 0; j < count; j += VL) {
    const vf z = load(gate + j);
    store(up + j, z * sigmoid(z) * load(up + j));
  }
}

// The same of a key in `input`, while `gate` and `up` become the gradients there, times their rates. `back` is the
// gradient at the input of W_1.
inline void swiglu_gradients(float gate_rate, float up_rate, const float* back, float* gate, float* up, float* input,
                             int64_t count) {
  const vf r0 = splat(gate_rate), r2 = splat(up_rate);
  for (int64_t j = 0; j < count; j += VL) {
    const vf z = load(gate + j), s = sigmoid(z), opened = z * s, given = load(up + j), by = load(back + j);
    store(input + j, opened * given);
    store(gate + j, r0 * by * given * s * (splat(1.0f) + z * (splat(1.0f) - s)));
    store(up + j, r2 * by * opened);
  }
}

// Columns `begin` to `end`, of which v is read and the output is found.
inline void linear_token(const ttt::LargeChunkStep& a, int64_t row, int64_t begin, int64_t end, const float* rates,
                         const LargeChunkToken& m) {
  const int64_t inputs = a.inputs, outputs = a.outputs, some = end - begin, wide = whole_vectors(some);
  const int64_t at = row * inputs * outputs + begin;
  std::fill(m.out, m.out + wide, 0.0f);
  add_product(m.q, a.weights[0] + at, inputs, outputs, some, m.out);
  scale_rows<kSet>(m.v, rates, 1, wide, m.scaled);
  add_outer(m.k, m.scaled, inputs, outputs, some, a.sums[0] + at);
}

inline void swiglu_token(const ttt::LargeChunkStep& a, int64_t row, const float* rates, const LargeChunkToken& m) {
  const int64_t width = a.inputs, inner = a.inner, wide = whole_vectors(width), deep = whole_vectors(inner);
  const int64_t matrix = row * width * inner;
  products_of_two(m.q, m.k, a.weights[0] + matrix, width, inner, m.gate_q, m.gate_k);
  products_of_two(m.q, m.k, a.weights[2] + matrix, width, inner, m.up_q, m.up_k);
  swiglu(m.gate_q, m.up_q, deep);
  std::fill(m.out, m.out + wide, 0.0f);
  for (int64_t f = 0; f < inner; f += VL) {
    const int64_t some = std::min<int64_t>(VL, inner - f);
    const float* w = a.weights[1] + matrix + f * width;
    store(m.back + f, products_with_rows(m.v, w, width, some));
    if (some == VL)
      add_rows<VL>(m.up_q + f, w, width, width, m.out);
    else
      for (int64_t r = 0; r < some; r++) add_rows<1>(m.up_q + f + r, w + r * width, width, width, m.out);
  }
  scale_rows<kSet>(m.v, rates + a.rate_by_weight, 1, wide, m.scaled);
  swiglu_gradients(rates[0], rates[2 * a.rate_by_weight], m.back, m.gate_k, m.up_k, m.gate_q, deep);
  add_outer(m.k, m.gate_k, width, inner, inner, a.sums[0] + matrix);
  add_outer(m.gate_q, m.scaled, inner, width, width, a.sums[1] + matrix);
  add_outer(m.k, m.up_k, width, inner, inner, a.sums[2] + matrix);
}

// Columns `begin` to `end` of the outputs; three weights have all of them.
template <class T>
void large_chunk_token(const ttt::LargeChunkStep& a, int64_t row, int64_t begin, int64_t end,
                       const LargeChunkToken& m) {
  const ttt::TokenSteps& by = a.steps;
  const int64_t inputs = a.inputs, outputs = a.outputs, sequence = row / a.heads, head = row % a.heads;
  const int64_t some = end - begin, deep = whole_vectors(inputs), wide = whole_vectors(some);
  read_rows(static_cast<const T*>(a.q) + sequence * by.q + head * inputs, 0, 1, inputs, m.q, deep);
  read_rows(static_cast<const T*>(a.k) + sequence * by.k + head * inputs, 0, 1, inputs, m.k, deep);
  read_rows(static_cast<const T*>(a.v) + sequence * by.v + head * outputs + begin, 0, 1, some, m.v, wide);
  for (int64_t j = 0; j < deep; j += VL) store(m.q + j, splat(a.scale) * load(m.q + j));
  const float* rates = a.rates + sequence * by.rate + head * a.rate_by_head;
  a.count == 1 ? linear_token(a, row, begin, end, rates, m) : swiglu_token(a, row, rates, m);
  write_rows(m.out, wide, 1, some, static_cast<T*>(a.out) + row * outputs + begin, 0);
}

template <class T>
void large_chunk_tokens(const ttt::LargeChunkStep& a) {
  constexpr int64_t fewest = 64;  // columns of a part: a stretch of memory of 256 bytes in each row
  const int64_t rows = a.sequences * a.heads;
  const int threads = rows * a.inputs * (a.count == 1 ? a.outputs : a.inner) < 65536 ? 1 : a.threads;
  // A pretrained weight is a single head: its columns are split among the threads.
  const int64_t parts =
      a.count == 1 && rows < threads ? std::clamp<int64_t>((a.outputs + fewest - 1) / fewest, 1, threads) : 1;
  const int64_t columns = ((a.outputs + parts - 1) / parts + VL - 1) / VL * VL;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    InScratch<LargeChunkToken> own(a);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < rows * parts; task++) {
      const int64_t begin = task % parts * columns, end = std::min(a.outputs, begin + columns);
      if (begin < end) large_chunk_token<T>(a, task / parts, begin, end, own.memory);
    }
  }
  for (int64_t s = 0; s < a.sequences; s++) {
    for (int64_t h = 0; a.momentum != nullptr && h < a.heads; h++)
      a.total_momentum[s * a.heads + h] += a.momentum[s * a.steps.momentum + h];
    a.position[s]++;
  }
}

void run_large_chunk_step(const ttt::LargeChunkStep& a) {
  a.dtype == ttt::kF32 ? large_chunk_tokens<float>(a) : large_chunk_tokens<bf16>(a);
}

}  // namespace

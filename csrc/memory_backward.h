// The backward pass of memories that learn, on texts: of one layer with an inner norm, without gates and momentum,
// which is TTT-Linear. ttt/ops/sequence/dual_form.py has the formulas of the forward pass.
//
// Rows x and q have a 1 behind their last column here, and weights have the bias as their last row. With W the weights
// before a mini-batch, E the rows d times their rates, and P_ij = q_i.x_j for j <= i,
//
//     z = q W - P E        out = q + LN(z)        W <- W - x^T E
//
// With Z the gradient of z, D that of the weights after the mini-batch, and N_ij = -Z_i.E_j for j <= i,
//
//     dE = -P^T Z - x D                      K: what dE is as a gradient of the outputs for x, at W (inner_norm.h)
//     dq = dout + Z W^T + N x                dx = K W^T - E D^T + N^T q + what the norm's residual gets
//     D <- D + q^T Z + x^T K
#pragma once
#include <algorithm>
#include <cstring>

#include "memory.h"

namespace {

// What the first pass over some mini-batches leaves of one of them.
struct MiniBatch {
  float *weight, *rows, *plain, *inverse;  // W; b rows of E; standardised outputs for x, b rows, and 1 / deviations
};

struct MemoryGradient {
  int64_t width, wide, deep, b, bp, size;  // wide: of a row of outputs; deep: of a row of inputs; size: of a matrix
  MiniBatch chunks[MEMORY_KEPT];
  float *weight, *dweight, *dstart;     // (width + 1) x wide
  float *q, *x;                         // bp x deep; x follows q without a gap
  float *z, *dx;                        // bp x wide: gradients of the outputs for q and x, without a gap
  float *k, *v, *dout, *dq, *dk, *dkv;  // bp x wide
  float *turned, *turned_d;             // max(deep, wide) x max(deep, bp)
  float *seen, *crossed, *inverse;      // bp x bp, bp x bp, bp
  float *norm, *dnorm;                  // weight and bias

  MemoryGradient(const ttt::Memory& a, Parts* parts)
      : width(a.width),
        wide(whole_vectors(width)),
        deep(whole_vectors(width + 1)),
        b(a.mini_batch),
        bp(whole_vectors(b)),
        size((width + 1) * wide) {
    for (MiniBatch& chunk : chunks)
      chunk = {parts->take(size), parts->take(b * wide), parts->take(b * wide), parts->take(bp)};
    weight = parts->take(size);
    dweight = parts->take(size);
    dstart = parts->take(size);
    q = parts->take(2 * bp * deep);
    z = parts->take(2 * bp * wide);
    for (float** rows : {&k, &v, &dout, &dq, &dk, &dkv}) *rows = parts->take(bp * wide);
    turned = parts->take(deep * std::max(deep, bp));
    turned_d = parts->take(deep * std::max(deep, bp));
    seen = parts->take(bp * bp);
    crossed = parts->take(bp * bp);
    inverse = parts->take(bp);
    norm = parts->take(2 * wide);
    dnorm = parts->take(2 * wide);
  }
};

// Reads rows with a 1 behind their last column, all times `scale` but the 1.
template <class T>
inline void read_inputs(const T* from, int64_t stride, int64_t rows, int64_t width, float scale, float* to,
                        int64_t deep) {
  read_rows(from, stride, rows, width, to, deep);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t j = 0; scale != 1.0f && j < deep; j += VL)
      store(to + r * deep + j, splat(scale) * load(to + r * deep + j));
    to[r * deep + width] = 1.0f;
  }
}

inline void read_weights(const float* weight, const float* bias, int64_t row, const MemoryGradient& m, float* to) {
  read_rows(weight + row * m.width * m.width, m.width, m.width, m.width, to, m.wide);
  read_rows(bias + row * m.width, 0, 1, m.width, to + m.width * m.wide, m.wide);
}
inline void write_weights(const float* from, int64_t row, const MemoryGradient& m, float* weight, float* bias) {
  write_rows(from, m.wide, m.width, m.width, weight + row * m.width * m.width, m.width);
  write_rows(from + m.width * m.wide, m.wide, 1, m.width, bias + row * m.width, 0);
}
inline void add(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) store(to + i, load(to + i) + load(from + i));
}

// Reads the mini-batches from token `at` on again, up to MEMORY_KEPT of them, and keeps what the backward pass needs.
template <class T>
void reread(const ttt::Memory& a, const InnerNorm& norm, int64_t at, int64_t end, int64_t head, MemoryGradient& m) {
  const int64_t width = m.width, wide = m.wide, stride = a.heads * width;
  for (int64_t n = 0; n < MEMORY_KEPT && at < end; n++, at += m.b) {
    const int64_t some = std::min(end - at, m.b), first = at * a.heads + head;
    const MiniBatch& chunk = m.chunks[n];
    const T* keys = static_cast<const T*>(a.k) + first * width;
    std::memcpy(chunk.weight, m.weight, m.size * sizeof(float));
    read_inputs(keys, stride, some, width, 1.0f, m.q, m.deep);
    read_rows(keys, stride, some, width, m.k, wide);
    read_rows(static_cast<const T*>(a.v) + first * width, stride, some, width, m.v, wide);
    product_of<kSet>({m.q, m.deep, 1}, m.weight, wide, chunk.rows, wide, some, wide, width + 1);
    std::memcpy(chunk.plain, chunk.rows, some * wide * sizeof(float));
    norm.standardise(chunk.plain, chunk.inverse, some);
    norm.gradient(chunk.rows, m.k, m.v, a.rate + first, a.heads, some);
    product_of<kSubtract>({m.q, 1, m.deep}, chunk.rows, wide, m.weight, wide, width + 1, wide, some);
  }
}

// The last mini-batch of a text may be shorter; of the first one the gradient of W as weights that the rows d are taken
// at goes to dstart.
template <class T>
void mini_batch_backward(const ttt::MemoryBackward& g, const InnerNorm& norm, int64_t at, int64_t some, int64_t head,
                         bool starts, const MiniBatch& chunk, MemoryGradient& m) {
  const ttt::Memory& a = g.forward;
  const int64_t width = m.width, wide = m.wide, deep = m.deep, bp = m.bp, stride = a.heads * width;
  const int64_t first = at * a.heads + head, from = first * width;
  m.x = m.q + some * deep;
  m.dx = m.z + some * wide;
  read_inputs(static_cast<const T*>(a.q) + from, stride, some, width, a.scale, m.q, deep);
  read_inputs(static_cast<const T*>(a.k) + from, stride, some, width, 1.0f, m.x, deep);
  read_rows(static_cast<const T*>(a.k) + from, stride, some, width, m.k, wide);
  read_rows(static_cast<const T*>(a.v) + from, stride, some, width, m.v, wide);
  read_rows(static_cast<const T*>(g.out) + from, stride, some, width, m.dout, wide);
  transpose(m.x, deep, some, deep, m.turned, bp);
  product_of<kSet>({m.q, deep, 1}, m.turned, bp, m.seen, bp, some, whole_vectors(some), width + 1, kLowerResult);
  for (int64_t i = 0; i < some; i++)  // a register tile reads further columns than those of its rows
    for (int64_t j = i + 1; j < i + TILE_ROWS && j < bp; j++) m.seen[i * bp + j] = 0.0f;
  product_of<kSet>({m.q, deep, 1}, chunk.weight, wide, m.z, wide, some, wide, width + 1);
  product_of<kSubtract>({m.seen, bp, 1}, chunk.rows, wide, m.z, wide, some, wide, some, kLowerLeft);
  norm.standardise(m.z, m.inverse, some);
  std::memcpy(m.dq, m.z, some * wide * sizeof(float));
  std::memcpy(m.z, m.dout, some * wide * sizeof(float));
  norm.backward(m.dq, m.inverse, m.z, m.dnorm, m.dnorm + wide, some);
  // -dE, then K.
  product_of<kSet>({m.x, deep, 1}, m.dweight, wide, m.dx, wide, some, wide, width + 1);
  product_of<kAdd>({m.seen, 1, bp}, m.z, wide, m.dx, wide, some, wide, some, kUpperLeft);
  for (int64_t i = 0; i < some * wide; i += VL) store(m.dx + i, vf{} - load(m.dx + i));
  norm.gradient_backward(chunk.plain, chunk.inverse, m.k, m.v, a.rate + first, a.heads, m.dx, m.dkv, g.rate + first,
                         m.dnorm, m.dnorm + wide, some);
  // -N.
  transpose(chunk.rows, wide, some, wide, m.turned, bp);
  product_of<kSet>({m.z, wide, 1}, m.turned, bp, m.crossed, bp, some, whole_vectors(some), width, kLowerResult);
  for (int64_t i = 0; i < some; i++)
    for (int64_t j = i + 1; j < i + TILE_ROWS && j < bp; j++) m.crossed[i * bp + j] = 0.0f;
  transpose(chunk.weight, wide, width, wide, m.turned, wide);
  transpose(m.dweight, wide, width, wide, m.turned_d, wide);
  product_of<kSet>({m.z, wide, 1}, m.turned, wide, m.dq, wide, some, wide, width);
  product_of<kSubtract>({m.crossed, bp, 1}, m.k, wide, m.dq, wide, some, wide, some, kLowerLeft);
  product_of<kSet>({m.dx, wide, 1}, m.turned, wide, m.dk, wide, some, wide, width);
  product_of<kSubtract>({chunk.rows, wide, 1}, m.turned_d, wide, m.dk, wide, some, wide, width);
  product_of<kSubtract>({m.crossed, 1, bp}, m.q, deep, m.dk, wide, some, wide, some, kUpperLeft);
  for (int64_t i = 0; i < some * wide; i += VL) {
    const vf of_target = load(m.dkv + i);
    store(m.dq + i, splat(a.scale) * (load(m.dq + i) + load(m.dout + i)));
    store(m.dk + i, load(m.dk + i) + of_target);
    store(m.dkv + i, vf{} - of_target);
  }
  write_rows(m.dq, wide, some, width, static_cast<T*>(g.q) + from, stride);
  write_rows(m.dk, wide, some, width, static_cast<T*>(g.k) + from, stride);
  write_rows(m.dkv, wide, some, width, static_cast<T*>(g.v) + from, stride);
  product_of<kAdd>({m.q, 1, deep}, m.z, wide, m.dweight, wide, width + 1, wide, starts ? some : 2 * some);
  if (starts) product_of<kAdd>({m.x, 1, deep}, m.dx, wide, m.dstart, wide, width + 1, wide, some);
}

template <class T>
void memory_text_backward(const ttt::MemoryBackward& g, int64_t sequence, int64_t head, MemoryGradient& m) {
  const ttt::Memory& a = g.forward;
  const int64_t row = sequence * a.heads + head, span = MEMORY_KEPT * m.b;
  const int64_t begin = a.begins ? a.begins[sequence] : sequence * a.tokens;
  const int64_t end = a.begins ? a.begins[sequence + 1] : begin + a.tokens;
  const InnerNorm norm = *norm_of(a, head, m.norm);
  std::memset(m.dnorm, 0, 2 * m.wide * sizeof(float));
  read_weights(g.weight, g.bias, row, m, m.dweight);
  read_weights(g.start_weight, g.start_bias, row, m, m.dstart);
  // dstart is the gradient of the weights before the last mini-batch if that is not full, else of those after it.
  const bool full = (end - begin) % m.b == 0;
  for (int64_t n = (end - begin + span - 1) / span - 1; n >= 0; n--) {
    const int64_t at = begin + n * span, kept = (first_kept_memory(a, begin, sequence) + n) * a.heads + head;
    read_weights(a.layers[0].kept_weight, a.layers[0].kept_bias, kept, m, m.weight);
    reread<T>(a, norm, at, end, head, m);
    for (int64_t c = (std::min(end - at, span) + m.b - 1) / m.b - 1; c >= 0; c--) {
      const int64_t from = at + c * m.b, some = std::min(end - from, m.b);
      const bool last = from + some == end, starts = from == begin;
      if (last && full) {
        add(m.dstart, m.dweight, m.size);
        std::memset(m.dstart, 0, m.size * sizeof(float));
      }
      mini_batch_backward<T>(g, norm, from, some, head, starts, m.chunks[c], m);
      if (last && !full && !starts) {
        add(m.dstart, m.dweight, m.size);
        std::memset(m.dstart, 0, m.size * sizeof(float));
      }
    }
  }
  write_weights(m.dweight, row, m, g.weight, g.bias);
  write_weights(m.dstart, row, m, g.start_weight, g.start_bias);
  write_rows(m.dnorm, m.wide, 1, m.width, g.norm_weight + row * m.width, 0);
  write_rows(m.dnorm + m.wide, m.wide, 1, m.width, g.norm_bias + row * m.width, 0);
}

template <class T>
void memory_backward(const ttt::MemoryBackward& g) {
  const ttt::Memory& a = g.forward;
  const int64_t tasks = a.sequences * a.heads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && tasks > 1)
  {
    InScratch<MemoryGradient> own(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) memory_text_backward<T>(g, task / a.heads, task % a.heads, own.memory);
  }
}

void run_memory_backward(const ttt::MemoryBackward& g) {
  g.forward.dtype == ttt::kF32 ? memory_backward<float>(g) : memory_backward<bf16>(g);
}

}  // namespace

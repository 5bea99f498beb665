// TTT-Linear: ttt/ops/sequence/dual_form.py has the formulas. The dual form for texts, and one token.
#pragma once
#include <cmath>

#include "api.h"
#include "scratch.h"
#include "sequence_product.h"

namespace {

// The inner norm of a head. `weight` and `bias` have zeros behind the last column.
struct InnerNorm {
  const float *weight, *bias;
  float eps;
  int64_t width, wide;

  // The mean and the inverse deviation of a row that holds zeros behind its last column.
  void moments(const float* z, float* mean, float* inverse) const {
    vf total = {};
    for (int64_t j = 0; j < wide; j += VL) total += load(z + j);
    *mean = sum(total) / width;
    vf square = {};
    int64_t j = 0;
    for (; j + VL <= width; j += VL) {
      const vf centred = load(z + j) - splat(*mean);
      square += centred * centred;
    }
    float rest = 0.0f;
    for (; j < width; j++) rest += (z[j] - *mean) * (z[j] - *mean);
    *inverse = 1.0f / std::sqrt((sum(square) + rest) / width + eps);
  }

  // z becomes `rate` times the gradient of |x + LN(z) - v|^2 / 2 by z.
  void gradient(float* z, const float* x, const float* v, float rate) const {
    float mean, inverse;
    moments(z, &mean, &inverse);
    vf total = {}, along = {};
    for (int64_t j = 0; j < wide; j += VL) {
      const vf plain = (load(z + j) - splat(mean)) * splat(inverse), w = load(weight + j);
      const vf d = (plain * w + load(bias + j) + load(x + j) - load(v + j)) * w;
      total += d;
      along += d * plain;
    }
    const float mean_d = sum(total) / width, mean_along = sum(along) / width;
    for (int64_t j = 0; j < wide; j += VL) {
      const vf plain = (load(z + j) - splat(mean)) * splat(inverse), w = load(weight + j);
      const vf d = (plain * w + load(bias + j) + load(x + j) - load(v + j)) * w;
      store(z + j, (d - splat(mean_d) - plain * splat(mean_along)) * splat(rate * inverse));
    }
    for (int64_t j = width; j < wide; j++) z[j] = 0.0f;
  }

  // z becomes x + LN(z).
  void apply(float* z, const float* x) const {
    float mean, inverse;
    moments(z, &mean, &inverse);
    for (int64_t j = 0; j < wide; j += VL)
      store(z + j, load(x + j) + (load(z + j) - splat(mean)) * splat(inverse) * load(weight + j) + load(bias + j));
  }
};

inline InnerNorm norm_of(const ttt::TTTLinear& a, int64_t head, int64_t wide, float* memory) {
  read_rows(a.norm_weight + head * a.width, 0, 1, a.width, memory, wide);
  read_rows(a.norm_bias + head * a.width, 0, 1, a.width, memory + wide, wide);
  return {memory, memory + wide, a.eps, a.width, wide};
}

// Adds `bias` to each row, and makes sure of zeros behind the last column, where both hold zeros.
inline void add_bias(float* z, const float* bias, int64_t rows, int64_t wide) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < wide; j += VL) store(z + r * wide + j, load(z + r * wide + j) + load(bias + j));
}

inline int64_t ttt_linear_floats(int64_t width, int64_t batch) {
  const int64_t wide = whole_vectors(width);
  return 2 * (width + 1) * wide + batch * 5 * wide + wide * whole_vectors(batch) + batch * whole_vectors(batch) +
         2 * wide;
}

template <class T>
void ttt_linear_sequence(const ttt::TTTLinear& a, int64_t sequence, int64_t head, float* memory) {
  const int64_t width = a.width, wide = whole_vectors(width), b = a.mini_batch, bp = whole_vectors(b),
                size = (width + 1) * wide;
  float* weight = memory;  // the bias is the row behind it
  float* start = weight + size;
  float* q = start + size;
  float* k = q + b * wide;
  float* v = k + b * wide;
  float* d = v + b * wide;
  float* out = d + b * wide;
  float* kt = out + b * wide;
  float* seen = kt + wide * bp;
  const InnerNorm norm = norm_of(a, head, wide, seen + b * bp);
  const int64_t begin = a.begins ? a.begins[sequence] : sequence * a.tokens;
  const int64_t end = a.begins ? a.begins[sequence + 1] : begin + a.tokens;
  const int64_t at_matrix = (sequence * a.heads + head) * width * width, at_row = (sequence * a.heads + head) * width;
  read_rows(a.weight + at_matrix, width, width, width, weight, wide);
  read_rows(a.bias + at_row, 0, 1, width, weight + width * wide, wide);
  read_rows(a.start_weight + at_matrix, width, width, width, start, wide);
  read_rows(a.start_bias + at_row, 0, 1, width, start + width * wide, wide);
  int64_t position = a.position[sequence];
  for (int64_t at = begin; at < end;) {
    const int64_t room = b - position, some = end - at < room ? end - at : room, first = at * a.heads + head;
    const int64_t stride = a.heads * width;
    read_rows(static_cast<const T*>(a.q) + first * width, stride, some, width, q, wide);
    read_rows(static_cast<const T*>(a.k) + first * width, stride, some, width, k, wide);
    read_rows(static_cast<const T*>(a.v) + first * width, stride, some, width, v, wide);
    for (int64_t i = 0; a.scale != 1.0f && i < some * wide; i += VL) store(q + i, splat(a.scale) * load(q + i));
    // Where a mini-batch begins, the present weights are its first ones.
    const float* from = position == 0 ? weight : start;
    product_of<kSet>({k, wide, 1}, from, wide, d, wide, some, wide, width);
    add_bias(d, from + width * wide, some, wide);
    for (int64_t i = 0; i < some; i++)
      norm.gradient(d + i * wide, k + i * wide, v + i * wide, a.rate[first + i * a.heads]);
    transpose(k, wide, some, wide, kt, bp);
    product_of<kSet>({q, wide, 1}, kt, bp, seen, bp, some, whole_vectors(some), width, kLowerResult);
    for (int64_t i = 0; i < some; i++) {
      for (int64_t j = 0; j <= i; j++) seen[i * bp + j] += 1.0f;  // the bias
      // Rows of a register tile read further columns than their own.
      for (int64_t j = i + 1; j < i + TILE_ROWS && j < bp; j++) seen[i * bp + j] = 0.0f;
    }
    product_of<kSet>({q, wide, 1}, weight, wide, out, wide, some, wide, width);
    add_bias(out, weight + width * wide, some, wide);
    product_of<kSubtract>({seen, bp, 1}, d, wide, out, wide, some, wide, some, kLowerLeft);
    for (int64_t i = 0; i < some; i++) norm.apply(out + i * wide, q + i * wide);
    write_rows(out, wide, some, width, static_cast<T*>(a.out) + first * width, stride);
    const bool full = some == room;
    if (position == 0 && !full) std::memcpy(start, weight, size * sizeof(float));
    product_of<kSubtract>({k, 1, wide}, d, wide, weight, wide, width, wide, some);
    for (int64_t i = 0; i < some; i++)
      for (int64_t j = 0; j < wide; j += VL) {
        float* bias = weight + width * wide + j;
        store(bias, load(bias) - load(d + i * wide + j));
      }
    position = full ? 0 : position + some;
    at += some;
  }
  const float* last = position == 0 ? weight : start;
  write_rows(weight, wide, width, width, a.weight + at_matrix, width);
  write_rows(weight + width * wide, wide, 1, width, a.bias + at_row, 0);
  write_rows(last, wide, width, width, a.start_weight + at_matrix, width);
  write_rows(last + width * wide, wide, 1, width, a.start_bias + at_row, 0);
}

template <class T>
void ttt_linear(const ttt::TTTLinear& a) {
  const int64_t tasks = a.sequences * a.heads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && tasks > 1)
  {
    Scratch scratch(ttt_linear_floats(a.width, a.mini_batch));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++)
      ttt_linear_sequence<T>(a, task / a.heads, task % a.heads, scratch.get());
  }
}

// out += x W for a matrix W (width x width) in memory; `also`, if not null, += y W.
inline void row_product(const float* x, const float* y, const float* w, int64_t width, float* out, float* also) {
  for (int64_t j = 0; j < width;) {
    vf by_x[4] = {}, by_y[4] = {};
    const bool four = j + 4 * VL <= width;
    for (int64_t i = 0; i < width; i++) {
      const float* row = w + i * width + j;
      if (four) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
          const vf value = load(row + n * VL);
          by_x[n] += splat(x[i]) * value;
          by_y[n] += splat(y[i]) * value;
        }
      } else {
        const vf value = load_upto(row, width - j);
        by_x[0] += splat(x[i]) * value;
        by_y[0] += splat(y[i]) * value;
      }
    }
    for (int n = 0; n < (four ? 4 : 1); n++) {
      store(out + j + n * VL, load(out + j + n * VL) + by_x[n]);
      if (also != nullptr) store(also + j + n * VL, load(also + j + n * VL) + by_y[n]);
    }
    j += four ? 4 * VL : VL;
  }
}

template <class T>
void ttt_linear_token(const ttt::TTTLinear& a, int64_t row, float* memory) {
  const int64_t width = a.width, wide = whole_vectors(width), sequence = row / a.heads;
  float* q = memory;
  float* k = q + wide;
  float* v = k + wide;
  float* d = v + wide;
  float* out = d + wide;
  const InnerNorm norm = norm_of(a, row % a.heads, wide, out + wide);
  read_rows(static_cast<const T*>(a.q) + row * width, 0, 1, width, q, wide);
  read_rows(static_cast<const T*>(a.k) + row * width, 0, 1, width, k, wide);
  read_rows(static_cast<const T*>(a.v) + row * width, 0, 1, width, v, wide);
  for (int64_t j = 0; j < wide; j += VL) store(q + j, splat(a.scale) * load(q + j));
  float *weight = a.weight + row * width * width, *bias = a.bias + row * width;
  float *start = a.start_weight + row * width * width, *start_bias = a.start_bias + row * width;
  const bool begins = a.position[sequence] == 0, ends = a.position[sequence] + 1 >= a.mini_batch;
  read_rows(begins ? bias : start_bias, 0, 1, width, d, wide);
  read_rows(bias, 0, 1, width, out, wide);
  if (begins) {
    row_product(k, q, weight, width, d, out);
  } else {
    row_product(k, k, start, width, d, nullptr);
    row_product(q, q, weight, width, out, nullptr);
  }
  norm.gradient(d, k, v, a.rate[row]);
  float match = 1.0f;
  for (int64_t i = 0; i < width; i++) match += q[i] * k[i];
  for (int64_t j = 0; j < wide; j += VL) store(out + j, load(out + j) - splat(match) * load(d + j));
  norm.apply(out, q);
  write_rows(out, wide, 1, width, static_cast<T*>(a.out) + row * width, 0);
  // The first weights of the mini-batch are the old ones while it goes on, and the new ones when it has ended. Those
  // of a mini-batch that goes on were stored when the last one ended.
  for (int64_t i = 0; i <= width; i++) {
    float* w = i < width ? weight + i * width : bias;
    float* s = i < width ? start + i * width : start_bias;
    const float factor = i < width ? k[i] : 1.0f;
    int64_t j = 0;
    for (; j + VL <= width; j += VL) {
      const vf value = load(w + j) - splat(factor) * load(d + j);
      store(w + j, value);
      if (ends) store(s + j, value);
    }
    for (; j < width; j++) {
      w[j] -= factor * d[j];
      if (ends) s[j] = w[j];
    }
  }
}

template <class T>
void ttt_linear_step(const ttt::TTTLinear& a) {
  const int64_t tasks = a.sequences * a.heads;
  const int threads = tasks * a.width * a.width < 65536 ? 1 : a.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch(7 * whole_vectors(a.width));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tasks; row++) ttt_linear_token<T>(a, row, scratch.get());
  }
}

void run_ttt_linear(const ttt::TTTLinear& a) {
  if (a.one_token)
    a.dtype == ttt::kF32 ? ttt_linear_step<float>(a) : ttt_linear_step<bf16>(a);
  else
    a.dtype == ttt::kF32 ? ttt_linear<float>(a) : ttt_linear<bf16>(a);
}

}  // namespace

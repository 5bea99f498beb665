// The fast weights of LaCT and In-Place TTT on texts: `chunked` of ttt/ops/sequence/large_chunk.py, which has the
// formulas. A chunk is read in parts of a few tokens, whose rows stay in the cache: nothing is written to memory but
// the outputs, and the weights once.
#pragma once
#include <algorithm>
#include <cmath>

#include "large_chunk.h"

namespace {

// Tokens that are read together: a multiple of the rows of a register tile.
constexpr int64_t PART_TOKENS = 48;

// A matrix of a head in the cache, with rows that are `row` apart and end with zeros, as far as a whole vector.
struct PaddedMatrix {
  int64_t rows, columns, wide, row;
  float* data;

  PaddedMatrix() = default;
  PaddedMatrix(int64_t rows, int64_t columns, Parts* parts)
      : rows(rows),
        columns(columns),
        wide(whole_vectors(columns)),
        row(wide + BETWEEN_ROWS),
        data(parts->take(size())) {}
  int64_t size() const { return whole_vectors(rows) * row; }
  Left left() const { return {data, row, 1}; }
  void read(const float* from) { read_rows(from, columns, rows, columns, data, row); }
  void write(float* to) const { write_rows(data, row, rows, columns, to, columns); }
  void clear() { std::fill(data, data + size(), 0.0f); }
  void become_transpose_of(const PaddedMatrix& other) {
    transpose(other.data, other.row, other.rows, other.wide, data, row);
  }
};

// Reads rows into the cache that are needed next: the processor's own prefetchers do not follow rows that are pages
// apart.
template <class T>
inline void prefetch_rows(const T* from, int64_t stride, int64_t rows, int64_t count) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < count; j += line) __builtin_prefetch(from + r * stride + j, 0, 2);
}

// What one thread works with.
struct LargeChunkMemory {
  PaddedMatrix weights[3], sums[3], turned;  // `turned`: the transpose of the second weight
  PaddedMatrix x, xt, next, gram, square;    // of Newton-Schulz steps
  float *q, *k, *v, *scaled, *out, *norms;
  float *gate_q, *up_q, *gate_k, *up_k, *back;

  LargeChunkMemory(const ttt::LargeChunkText& a, Parts* parts) {
    int64_t least = a.inputs, most = a.outputs;
    for (int64_t i = 0; i < a.count; i++) {
      const int64_t rows = a.rows_of(i), columns = a.columns_of(i);
      weights[i] = PaddedMatrix(rows, columns, parts);
      sums[i] = PaddedMatrix(rows, columns, parts);
      least = std::min(rows, columns);
      most = std::max(most, std::max(rows, columns));
    }
    norms = parts->take(whole_vectors(most));
    if (a.count == 3) turned = PaddedMatrix(a.inputs, a.inner, parts);
    if (a.orthogonal) {
      x = PaddedMatrix(least, most, parts);
      xt = PaddedMatrix(most, least, parts);
      next = PaddedMatrix(least, most, parts);
      gram = PaddedMatrix(least, least, parts);
      square = PaddedMatrix(least, least, parts);
    }
    const int64_t inputs = whole_vectors(a.inputs), outputs = whole_vectors(a.outputs);
    const int64_t inner = a.count == 3 ? whole_vectors(a.inner) : 0;
    for (float** rows : {&q, &k}) *rows = parts->take(PART_TOKENS * inputs);
    for (float** rows : {&v, &scaled, &out}) *rows = parts->take(PART_TOKENS * outputs);
    for (float** rows : {&gate_q, &up_q, &gate_k, &up_k, &back}) *rows = parts->take(PART_TOKENS * inner);
  }
};

// rows (some x matrix.wide) = left (some x inner) times a matrix.
inline void times(const float* left, int64_t left_row, const PaddedMatrix& matrix, float* rows, int64_t some) {
  product_of<kSet>({left, left_row, 1}, matrix.data, matrix.row, rows, matrix.wide, some, matrix.wide, matrix.rows);
}

// A matrix of sums += x^T d, for `some` rows x and d.
inline void add_outer_products(const float* x, int64_t x_row, const float* d, PaddedMatrix* sums, int64_t some) {
  product_of<kAdd>({x, 1, x_row}, d, sums->wide, sums->data, sums->row, sums->rows, sums->wide, some);
}

// The outputs for `some` queries, and the sums of the updates by as many keys. `rates`: of the first token and this
// head, `step` from one token to the next.
inline void linear_part(LargeChunkMemory& m, const float* rates, int64_t step, int64_t some) {
  times(m.q, whole_vectors(m.weights[0].rows), m.weights[0], m.out, some);
  scale_rows<kSet>(m.v, rates, some, m.weights[0].wide, m.scaled, step);
  add_outer_products(m.k, whole_vectors(m.weights[0].rows), m.scaled, &m.sums[0], some);
}

inline void swiglu_part(LargeChunkMemory& m, const float* rates, int64_t step, int64_t some) {
  const int64_t wide = m.weights[1].wide, deep = m.weights[0].wide;
  times(m.q, wide, m.weights[0], m.gate_q, some);
  times(m.q, wide, m.weights[2], m.up_q, some);
  swiglu(m.gate_q, m.up_q, some * deep);
  times(m.up_q, deep, m.weights[1], m.out, some);
  times(m.k, wide, m.weights[0], m.gate_k, some);
  times(m.k, wide, m.weights[2], m.up_k, some);
  times(m.v, wide, m.turned, m.back, some);
  for (int64_t r = 0; r < some; r++) {
    const int64_t j = r * deep;
    swiglu_gradients(rates[r * step], rates[r * step + 2], m.back + j, m.gate_k + j, m.up_k + j, m.gate_q + j, deep);
  }
  scale_rows<kSet>(m.v, rates + 1, some, wide, m.scaled, step);
  add_outer_products(m.k, wide, m.gate_k, &m.sums[0], some);
  add_outer_products(m.gate_q, deep, m.scaled, &m.sums[1], some);
  add_outer_products(m.k, wide, m.up_k, &m.sums[2], some);
}

// matrix = by * matrix + factor * other, of the same shape; without `other` the first term alone.
inline void combine(PaddedMatrix* matrix, float by, float factor, const PaddedMatrix* other) {
  for (int64_t i = 0; i < matrix->rows * matrix->row; i += VL) {
    const vf first = splat(by) * load(matrix->data + i);
    store(matrix->data + i, other == nullptr ? first : first + splat(factor) * load(other->data + i));
  }
}

// `matrix` becomes what five Newton-Schulz steps make of it: `newton_schulz` of ttt/ops/sequence/large_chunk.py.
inline void orthogonalise(LargeChunkMemory& m, PaddedMatrix* matrix) {
  const bool tall = matrix->rows > matrix->columns;
  float* data = m.x.data;
  if (tall) {
    m.x.become_transpose_of(*matrix);
  } else {
    std::copy(matrix->data, matrix->data + matrix->rows * matrix->row, data);
  }
  PaddedMatrix x = m.x, next = m.next;
  double total = 0.0;
  for (int64_t r = 0; r < x.rows; r++) {
    vf squares = {};
    for (int64_t j = 0; j < x.wide; j += VL) squares += load(data + r * x.row + j) * load(data + r * x.row + j);
    total += sum(squares);
  }
  combine(&x, 1.0f / (static_cast<float>(std::sqrt(total)) + 1e-7f), 0.0f, nullptr);
  for (int step = 0; step < 5; step++) {
    m.xt.become_transpose_of(x);
    product_of<kSet>(x.left(), m.xt.data, m.xt.row, m.gram.data, m.gram.row, x.rows, m.gram.wide, x.columns);
    product_of<kSet>(m.gram.left(), m.gram.data, m.gram.row, m.square.data, m.square.row, x.rows, m.square.wide,
                     x.rows);
    combine(&m.square, 2.0315f, -4.7750f, &m.gram);
    product_of<kSet>(m.square.left(), x.data, x.row, next.data, next.row, x.rows, x.wide, x.rows);
    combine(&next, 1.0f, 3.4445f, &x);
    std::swap(x, next);
  }
  if (tall) {
    matrix->become_transpose_of(x);
  } else {
    std::copy(x.data, x.data + matrix->rows * matrix->row, matrix->data);
  }
}

// The columns of W get the given norms.
inline void set_norms(LargeChunkMemory& m, PaddedMatrix* w, const float* norms) {
  std::fill(m.norms, m.norms + w->wide, 0.0f);
  for (int64_t i = 0; i < w->rows; i++)
    for (int64_t j = 0; j < w->wide; j += VL) {
      const vf value = load(w->data + i * w->row + j);
      store(m.norms + j, load(m.norms + j) + value * value);
    }
  for (int64_t j = 0; j < w->columns; j++) m.norms[j] = norms[j] / (std::sqrt(m.norms[j]) + 1e-5f);
  for (int64_t i = 0; i < w->rows; i++)
    for (int64_t j = 0; j < w->wide; j += VL)
      store(w->data + i * w->row + j, load(w->data + i * w->row + j) * load(m.norms + j));
}

// What is done at the end of a chunk of a row (a head of a sequence): `closed` of ttt/ops/sequence/large_chunk.py.
inline void end_chunk(const ttt::LargeChunkText& a, int64_t row, LargeChunkMemory& m) {
  for (int64_t i = 0; i < a.count; i++) {
    PaddedMatrix &w = m.weights[i], &update = m.sums[i];
    const int64_t count = w.rows * w.columns;
    if (a.momentum != nullptr) {
      const float mean = a.total_momentum[row] / static_cast<float>(a.size);
      float* velocity = a.velocity[i] + row * count;
      for (int64_t r = 0; r < w.rows; r++) {
        float* moving = velocity + r * w.columns;
        float* from = update.data + r * update.row;
        int64_t j = 0;
        for (; j + VL <= w.columns; j += VL) {
          const vf moved = splat(mean) * load(moving + j) + load(from + j);
          store(moving + j, moved);
          store(from + j, moved);
        }
        for (; j < w.columns; j++) moving[j] = from[j] = mean * moving[j] + from[j];
      }
    }
    if (a.orthogonal) orthogonalise(m, &update);
    combine(&w, 1.0f, 1.0f, &update);
    if (a.norms[i] != nullptr) set_norms(m, &w, a.norms[i] + row * w.columns);
    update.clear();
  }
  if (a.momentum != nullptr) a.total_momentum[row] = 0.0f;
  if (a.count == 3) m.turned.become_transpose_of(m.weights[1]);
}

template <class T>
void large_chunk_text(const ttt::LargeChunkText& a, int64_t sequence, int64_t head, LargeChunkMemory& m) {
  const int64_t row = sequence * a.heads + head, inputs = a.inputs, outputs = a.outputs;
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t count = m.weights[i].rows * m.weights[i].columns;
    m.weights[i].read(a.weights[i] + row * count);
    m.sums[i].read(a.sums[i] + row * count);
  }
  if (a.count == 3) m.turned.become_transpose_of(m.weights[1]);
  const int64_t begin = a.begins ? a.begins[sequence] : sequence * a.tokens;
  const int64_t end = a.begins ? a.begins[sequence + 1] : begin + a.tokens;
  const int64_t deep = whole_vectors(inputs), wide = whole_vectors(outputs), step = a.heads * a.count;
  int64_t position = a.position[sequence];
  for (int64_t at = begin; at < end;) {
    const int64_t some = std::min(std::min(end - at, a.size - position), PART_TOKENS), first = at * a.heads + head;
    read_rows(static_cast<const T*>(a.q) + first * inputs, a.heads * inputs, some, inputs, m.q, deep);
    read_rows(static_cast<const T*>(a.k) + first * inputs, a.heads * inputs, some, inputs, m.k, deep);
    read_rows(static_cast<const T*>(a.v) + first * outputs, a.heads * outputs, some, outputs, m.v, wide);
    for (int64_t j = 0; a.scale != 1.0f && j < some * deep; j += VL) store(m.q + j, splat(a.scale) * load(m.q + j));
    const int64_t ahead = std::min(end - at - some, PART_TOKENS), next = first + some * a.heads;
    prefetch_rows(static_cast<const T*>(a.q) + next * inputs, a.heads * inputs, ahead, inputs);
    prefetch_rows(static_cast<const T*>(a.k) + next * inputs, a.heads * inputs, ahead, inputs);
    prefetch_rows(static_cast<const T*>(a.v) + next * outputs, a.heads * outputs, ahead, outputs);
    const float* rates = a.rates + first * a.count;
    a.count == 1 ? linear_part(m, rates, step, some) : swiglu_part(m, rates, step, some);
    write_rows(m.out, wide, some, outputs, static_cast<T*>(a.out) + first * outputs, a.heads * outputs);
    for (int64_t i = 0; a.momentum != nullptr && i < some; i++)
      a.total_momentum[row] += a.momentum[first + i * a.heads];
    at += some;
    position += some;
    if (position < a.size) continue;
    position = 0;
    end_chunk(a, row, m);
  }
  for (int64_t i = 0; i < a.count; i++) {
    const int64_t count = m.weights[i].rows * m.weights[i].columns;
    m.weights[i].write(a.weights[i] + row * count);
    m.sums[i].write(a.sums[i] + row * count);
  }
}

template <class T>
void large_chunk_texts(const ttt::LargeChunkText& a) {
  const int64_t tasks = a.sequences * a.heads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && tasks > 1)
  {
    InScratch<LargeChunkMemory> own(a);
    // What is behind the columns of matrices is multiplied, by zeros.
    std::fill(own.scratch.get(), own.scratch.get() + own.parts.used, 0.0f);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) large_chunk_text<T>(a, task / a.heads, task % a.heads, own.memory);
  }
}

void run_large_chunk(const ttt::LargeChunkText& a) {
  a.dtype == ttt::kF32 ? large_chunk_texts<float>(a) : large_chunk_texts<bf16>(a);
}

}  // namespace

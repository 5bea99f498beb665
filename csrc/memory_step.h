// Memories that learn, for one token of each sequence: TTT-Linear, TTT-MLP and Titans. Rows of the state's matrices are
// read in the order of memory, side by side, so that a head's matrices stream through the processor; where a mini-batch
// goes on, those that it began with are read and the present ones are changed. Rows are prefetched, because the
// processor's own prefetchers stop at each page.
#pragma once
#include <type_traits>

#include "memory.h"

namespace {

// One layer for a token: addresses in the state, and rows that end with zeros, as far as a whole vector.
struct TokenLayer {
  int64_t inputs, outputs;
  float *weight, *bias, *start, *start_bias, *velocity, *velocity_bias;
  float *x, *d;
};

// sums += x W, for `rows` rows of W and `outputs` of its columns; rows are `row` apart.
template <int rows>
inline void add_rows(const float* x, const float* w, int64_t row, int64_t outputs, float* sums) {
  vf factor[rows];
  for (int r = 0; r < rows; r++) factor[r] = splat(x[r]);
  int64_t j = 0;
  for (; j + VL <= outputs; j += VL) {
    vf total = load(sums + j);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      __builtin_prefetch(w + (r + rows) * row + j, 0, 2);
      total += factor[r] * load(w + r * row + j);
    }
    store(sums + j, total);
  }
  if (j == outputs) return;
  vf total = load(sums + j);
  for (int r = 0; r < rows; r++) total += factor[r] * load_upto(w + r * row + j, outputs - j);
  store(sums + j, total);
}

// sums += x W, for `outputs` columns of W, whose rows are `row` apart.
inline void add_product(const float* x, const float* w, int64_t inputs, int64_t row, int64_t outputs, float* sums) {
  constexpr int rows = 8;
  int64_t i = 0;
  for (; i + rows <= inputs; i += rows) add_rows<rows>(x + i, w + i * row, row, outputs, sums);
  for (; i < inputs; i++) add_rows<1>(x + i, w + i * row, row, outputs, sums);
}

// sums = x W + b.
inline void token_linear(const TokenLayer& layer, const float* x, const float* w, const float* bias, float* sums) {
  read_rows(bias, 0, 1, layer.outputs, sums, whole_vectors(layer.outputs));
  add_product(x, w, layer.inputs, layer.outputs, layer.outputs, sums);
}

// One vector: d times `rows` <= VL rows of W, zeros behind them.
inline vf products_with_rows(const float* d, const float* w, int64_t outputs, int64_t rows) {
  float sums[VL * VL];
  for (int64_t r = 0; r < rows; r++) {
    vf total = {};
    int64_t j = 0;
    for (; j + VL <= outputs; j += VL) total += load(w + r * outputs + j) * load(d + j);
    if (j < outputs) total += load_upto(w + r * outputs + j, outputs - j) * load(d + j);
    store(sums + r * VL, total);
  }
  return sums_of_rows(sums, rows);
}

// How a token changes weights W by a gradient G times its rate, as in ttt/ops/sequence/dual_form.py. With a gate and a
// momentum, and the velocity V: V = momentum V - G, W = gate W + V.
template <bool gated, bool moving>
struct Rule {
  float gate, momentum;

  template <class V>  // a vector, or a number
  V weight(V w, V gradient_factor, V gradient_row, V* velocity) const {
    if constexpr (gated) w = w * (V{} + gate);
    if constexpr (!moving) return w - gradient_factor * gradient_row;
    *velocity = *velocity * (V{} + momentum) - gradient_factor * gradient_row;
    return w + *velocity;
  }
};

// Changes `rows` rows of W by the outer product of x and d, and adds h W to sums. `start`, if `ends`, becomes W.
template <int rows, bool ends, bool gated, bool moving>
inline void change_rows(const Rule<gated, moving>& rule, const float* x, const float* h, const float* d, float* w,
                        float* start, float* velocity, int64_t outputs, float* sums) {
  vf by_x[rows], by_h[rows];
  for (int r = 0; r < rows; r++) by_x[r] = splat(x[r]);
  for (int r = 0; r < rows; r++) by_h[r] = splat(h[r]);
  int64_t j = 0;
  for (; j + VL <= outputs; j += VL) {
    const vf change = load(d + j);
    vf total = load(sums + j);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const int64_t ahead = (r + 2 * rows) * outputs + j;
      __builtin_prefetch(w + ahead, 1, 2);
      if constexpr (moving) __builtin_prefetch(velocity + ahead, 1, 2);
      vf moved = {};
      if constexpr (moving) moved = load(velocity + r * outputs + j);
      const vf value = rule.weight(load(w + r * outputs + j), by_x[r], change, &moved);
      if constexpr (moving) store(velocity + r * outputs + j, moved);
      store(w + r * outputs + j, value);
      if constexpr (ends) store(start + r * outputs + j, value);
      total += by_h[r] * value;
    }
    store(sums + j, total);
  }
  for (; j < outputs; j++)
    for (int r = 0; r < rows; r++) {
      float moved = 0.0f;
      if constexpr (moving) moved = velocity[r * outputs + j];
      const float value = rule.weight(w[r * outputs + j], x[r], d[j], &moved);
      if constexpr (moving) velocity[r * outputs + j] = moved;
      w[r * outputs + j] = value;
      if constexpr (ends) start[r * outputs + j] = value;
      sums[j] += h[r] * value;
    }
}

// Changes a layer's weights, and sums = h W + b with them. `moved` holds a row of outputs.
template <bool ends, bool gated, bool moving>
inline void change_layer(const Rule<gated, moving>& rule, const TokenLayer& layer, const float* h, float* moved,
                         float* sums) {
  constexpr int rows = 4;
  const int64_t inputs = layer.inputs, outputs = layer.outputs, wide = whole_vectors(outputs);
  read_rows(layer.bias, 0, 1, outputs, sums, wide);
  if constexpr (moving) read_rows(layer.velocity_bias, 0, 1, outputs, moved, wide);
  for (int64_t j = 0; j < wide; j += VL) {
    vf velocity = {};
    if constexpr (moving) velocity = load(moved + j);
    store(sums + j, rule.weight(load(sums + j), splat(1.0f), load(layer.d + j), &velocity));
    if constexpr (moving) store(moved + j, velocity);
  }
  write_rows(sums, wide, 1, outputs, layer.bias, 0);
  if constexpr (moving) write_rows(moved, wide, 1, outputs, layer.velocity_bias, 0);
  if constexpr (ends) write_rows(sums, wide, 1, outputs, layer.start_bias, 0);
  int64_t i = 0;
  const auto change = [&](auto count) {
    constexpr int some = decltype(count)::value;
    const int64_t at = i * outputs;
    change_rows<some, ends>(rule, layer.x + i, h + i, layer.d, layer.weight + at, layer.start + at,
                            moving ? layer.velocity + at : nullptr, outputs, sums);
    i += some;
  };
  while (i + rows <= inputs) change(std::integral_constant<int, rows>());
  while (i < inputs) change(std::integral_constant<int, 1>());
}

// What one thread works with.
struct TokenMemory {
  std::vector<TokenLayer> layers;
  float *q, *k, *v, *h, *z, *moved, *norm;

  TokenMemory(const ttt::Memory& a, Parts* parts) {
    const int64_t width = whole_vectors(a.width);
    int64_t widest = width;
    for (int64_t l = 0; l < a.depth; l++) {
      TokenLayer layer = {};
      layer.inputs = a.layers[l].inputs;
      layer.outputs = a.layers[l].outputs;
      layer.x = parts->take(whole_vectors(layer.inputs));
      layer.d = parts->take(whole_vectors(layer.outputs));
      widest = std::max(widest, whole_vectors(layer.outputs));
      layers.push_back(layer);
    }
    q = parts->take(width);
    k = layers[0].x;
    v = parts->take(width);
    h = parts->take(widest);
    z = parts->take(widest);
    moved = parts->take(widest);
    norm = parts->take(2 * width);
  }
};

// Changes all layers, and z = the output for q with the weights that they have then.
template <bool ends, bool gated, bool moving>
void change_memory(const ttt::MemoryStep& step, int64_t sequence, int64_t head, const TokenMemory& m) {
  const ttt::Memory& a = step.of;
  const Rule<gated, moving> rule = {gated ? a.gate[sequence * step.steps.gate + head] : 1.0f,
                                    moving ? a.momentum[sequence * step.steps.momentum + head] : 0.0f};
  const float* h = m.q;
  for (const TokenLayer& layer : m.layers) {
    change_layer<ends>(rule, layer, h, m.moved, m.z);
    if (&layer == &m.layers.back()) break;
    for (int64_t j = 0; j < whole_vectors(layer.outputs); j += VL) store(m.h + j, gelu(load(m.z + j)));
    h = m.h;
  }
}

template <bool ends>
void change_memory(const ttt::MemoryStep& step, int64_t sequence, int64_t head, const TokenMemory& m) {
  const bool gated = step.of.gate != nullptr, moving = step.of.momentum != nullptr;
  if (gated && moving)
    change_memory<ends, true, true>(step, sequence, head, m);
  else if (gated)
    change_memory<ends, true, false>(step, sequence, head, m);
  else if (moving)
    change_memory<ends, false, true>(step, sequence, head, m);
  else
    change_memory<ends, false, false>(step, sequence, head, m);
}

template <class T>
void memory_token(const ttt::MemoryStep& step, int64_t row, TokenMemory* m) {
  const ttt::Memory& a = step.of;
  const ttt::TokenSteps& by = step.steps;
  const int64_t width = a.width, wide = whole_vectors(width), last = a.depth - 1;
  const int64_t sequence = row / a.heads, head = row % a.heads;
  read_rows(static_cast<const T*>(a.q) + sequence * by.q + head * width, 0, 1, width, m->q, wide);
  read_rows(static_cast<const T*>(a.k) + sequence * by.k + head * width, 0, 1, width, m->k, wide);
  read_rows(static_cast<const T*>(a.v) + sequence * by.v + head * width, 0, 1, width, m->v, wide);
  for (int64_t j = 0; j < wide; j += VL) store(m->q + j, splat(a.scale) * load(m->q + j));
  // Where a mini-batch begins, the present weights are its first ones. Those of a mini-batch that goes on were stored
  // when the last one ended.
  const bool begins = a.position[sequence] == 0, ends = a.position[sequence] + 1 >= a.mini_batch;
  for (int64_t l = 0; l <= last; l++) {
    const ttt::MemoryLayer& given = a.layers[l];
    TokenLayer& layer = m->layers[l];
    const int64_t matrix = row * layer.inputs * layer.outputs, bias = row * layer.outputs;
    layer.weight = given.weight + matrix;
    layer.bias = given.bias + bias;
    layer.start = given.start_weight + matrix;
    layer.start_bias = given.start_bias + bias;
    if (a.momentum != nullptr) {
      layer.velocity = given.velocity + matrix;
      layer.velocity_bias = given.velocity_bias + bias;
    }
    token_linear(layer, layer.x, begins ? layer.weight : layer.start, begins ? layer.bias : layer.start_bias, layer.d);
    if (l == last) break;
    for (int64_t j = 0; j < whole_vectors(layer.outputs); j += VL) {
      vf slope;
      store(m->layers[l + 1].x + j, gelu(load(layer.d + j), &slope));
      store(layer.d + j, slope);
    }
  }
  const std::optional<InnerNorm> norm = norm_of(a, head, m->norm);
  loss_gradient(norm, a.width, a.rate + sequence * by.rate + head, 0, m->layers[last].d, m->k, m->v, 1);
  for (int64_t l = last; l > 0; l--) {
    const TokenLayer& layer = m->layers[l];
    const float* w = begins ? layer.weight : layer.start;
    float* below = m->layers[l - 1].d;
    for (int64_t i = 0; i < layer.inputs; i += VL)
      store(below + i, load(below + i) * products_with_rows(layer.d, w + i * layer.outputs, layer.outputs,
                                                            std::min<int64_t>(VL, layer.inputs - i)));
  }
  ends ? change_memory<true>(step, sequence, head, *m) : change_memory<false>(step, sequence, head, *m);
  if (norm) norm->apply(m->z, m->q, 1);
  write_rows(m->z, wide, 1, width, static_cast<T*>(a.out) + row * width, 0);
}

template <class T>
void memory_tokens(const ttt::MemoryStep& step) {
  const ttt::Memory& a = step.of;
  const int64_t tasks = a.sequences * a.heads;
  int64_t weights = 0;
  for (int64_t l = 0; l < a.depth; l++) weights += a.layers[l].inputs * a.layers[l].outputs;
  const int threads = tasks * weights < 65536 ? 1 : a.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    InScratch<TokenMemory> own(a);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tasks; row++) memory_token<T>(step, row, &own.memory);
  }
  for (int64_t s = 0; s < a.sequences; s++)
    step.position[s] = step.position[s] + 1 < a.mini_batch ? step.position[s] + 1 : 0;
}

void run_memory_step(const ttt::MemoryStep& step) {
  step.of.dtype == ttt::kF32 ? memory_tokens<float>(step) : memory_tokens<bf16>(step);
}

}  // namespace

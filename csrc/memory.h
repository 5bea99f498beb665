// Memories that learn, on texts: TTT-Linear, TTT-MLP and Titans. ttt/ops/sequence/dual_form.py has the formulas of the
// dual form and the names of their parts.
#pragma once
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "api.h"
#include "gelu.h"
#include "inner_norm.h"
#include "parts.h"
#include "sequence_product.h"

namespace {

// Floats between the rows of matrices, a cache line: with a stride of a power of two, the lines of a column of blocks
// would compete for few places of the first-level cache.
constexpr int64_t BETWEEN_ROWS = 16;

// One layer of a head's memory. Matrices have the bias as their last row.
struct HeadLayer {
  int64_t inputs, outputs, deep, wide;  // deep and wide: the lengths of rows of inputs and of outputs
  int64_t row;                          // from one row of a matrix to the next
  float *weight, *start, *velocity;     // (inputs + 1) x row; the last is of a memory with momentum only
  float *x, *d;                         // bp x deep, bp x wide

  float* bias(float* matrix) const { return matrix + inputs * row; }
  int64_t size() const { return (inputs + 1) * row; }
};

// What the gates and momenta of some tokens of a mini-batch amount to: P / r, a', m' and the factors of the gradients
// in the last momentum, of ttt/ops/sequence/dual_form.py. Without gates and momenta nothing is held.
struct Factors {
  bool plain, moving;
  float *seen, *kept, *moved, *newest;  // bp x bp, bp, bp, bp
  float left;                           // of the first momentum in the last one

  Factors(const ttt::Memory& a, int64_t bp, Parts* parts)
      : plain(a.gate == nullptr && a.momentum == nullptr), moving(a.momentum != nullptr), left(0) {
    seen = plain ? nullptr : parts->take(bp * bp);
    for (float** row : {&kept, &moved, &newest}) *row = plain ? nullptr : parts->take(bp);
  }

  // Of `some` tokens, of which the first one's gate and momentum are number `first` of those of the call.
  void find(const ttt::Memory& a, int64_t first, int64_t some, int64_t bp) {
    if (plain) return;
    const float *gates = a.gate == nullptr ? nullptr : a.gate + first, *momenta = moving ? a.momentum + first : nullptr;
    float keep = 1.0f, move = 0.0f;
    left = 1.0f;
    for (int64_t i = 0; i < some; i++) {
      const float gate = gates == nullptr ? 1.0f : gates[i * a.heads], b = moving ? momenta[i * a.heads] : 0.0f;
      left *= b;
      keep *= gate;
      move = gate * move + left;
      kept[i] = keep;
      moved[i] = move;
      for (int64_t j = 0; j < i; j++) {
        newest[j] *= b;
        seen[i * bp + j] = gate * seen[(i - 1) * bp + j] + newest[j];
      }
      newest[i] = seen[i * bp + i] = 1.0f;
    }
    for (int64_t i = some; i < bp; i++) newest[i] = 0.0f;
    for (int64_t j = some; j < bp; j++) seen[(some - 1) * bp + j] = 0.0f;
  }
};

// What one thread works with. b and bp: the tokens of a mini-batch, and the same in whole vectors.
struct HeadMemory {
  int64_t b, bp;
  std::vector<HeadLayer> layers;
  float *q, *k, *v, *h, *z, *turned, *seen, *norm, *by_velocity;
  Factors factors;

  HeadMemory(const ttt::Memory& a, Parts* parts) : b(a.mini_batch), bp(whole_vectors(b)), factors(a, bp, parts) {
    const int64_t width = whole_vectors(a.width);
    int64_t widest = width;
    for (int64_t l = 0; l < a.depth; l++) {
      const ttt::MemoryLayer& given = a.layers[l];
      HeadLayer layer = {};
      layer.inputs = given.inputs;
      layer.outputs = given.outputs;
      layer.deep = whole_vectors(given.inputs);
      layer.wide = whole_vectors(given.outputs);
      layer.row = layer.wide + BETWEEN_ROWS;
      layer.weight = parts->take(layer.size());
      layer.start = parts->take(layer.size());
      if (a.momentum != nullptr) layer.velocity = parts->take(layer.size());
      layer.x = parts->take(bp * layer.deep);
      layer.d = parts->take(bp * layer.wide);
      widest = std::max(widest, layer.wide);
      layers.push_back(layer);
    }
    q = parts->take(bp * width);
    k = layers[0].x;
    v = parts->take(bp * width);
    h = parts->take(bp * widest);
    z = parts->take(bp * widest);
    turned = parts->take(bp * widest);
    seen = parts->take(bp * bp);
    norm = parts->take(2 * width);
    if (!factors.plain) by_velocity = parts->take(bp * widest);
  }
};

// The inner norm of a head, whose parameters are copied to `memory`; nothing where the memory has none.
inline std::optional<InnerNorm> norm_of(const ttt::Memory& a, int64_t head, float* memory) {
  if (a.norm_weight == nullptr) return std::nullopt;
  const int64_t wide = whole_vectors(a.width);
  read_rows(a.norm_weight + head * a.width, 0, 1, a.width, memory, wide);
  read_rows(a.norm_bias + head * a.width, 0, 1, a.width, memory + wide, wide);
  return InnerNorm(memory, memory + wide, a.eps, a.width);
}

// z = x W + b for `rows` rows; zeros stay behind the last column of z, because both W and b hold them there.
inline void linear(const HeadLayer& layer, const float* x, float* matrix, float* z, int64_t rows) {
  const int64_t wide = layer.wide;
  product_of<kSet>({x, layer.deep, 1}, matrix, layer.row, z, wide, rows, wide, layer.inputs);
  const float* bias = layer.bias(matrix);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < wide; j += VL) store(z + r * wide + j, load(z + r * wide + j) + load(bias + j));
}

// Reads the weights of a row of the state, or writes them.
inline void read_matrix(const HeadLayer& layer, const float* weight, const float* bias, float* matrix) {
  read_rows(weight, layer.outputs, layer.inputs, layer.outputs, matrix, layer.row);
  read_rows(bias, 0, 1, layer.outputs, layer.bias(matrix), layer.row);
}
inline void write_matrix(const HeadLayer& layer, const float* matrix, float* weight, float* bias) {
  write_rows(matrix, layer.row, layer.inputs, layer.outputs, weight, layer.outputs);
  write_rows(matrix + layer.inputs * layer.row, layer.row, 1, layer.outputs, bias, 0);
}

// out = d W^T without the bias, for `rows` <= bp rows d of layer.wide numbers; out has bp rows of as many whole vectors
// as hold the inputs. turned: layer.wide x bp; product: layer.inputs x bp.
inline void through(const HeadLayer& layer, const float* d, const float* matrix, int64_t rows, int64_t bp,
                    float* turned, float* product, float* out) {
  transpose(d, layer.wide, rows, layer.wide, turned, bp);
  product_of<kSet>({matrix, layer.row, 1}, turned, bp, product, bp, layer.inputs, bp, layer.outputs);
  transpose(product, bp, layer.inputs, bp, out, whole_vectors(layer.inputs));
}

// z, the outputs of the last layer for the rows of k, becomes the gradient of the loss times the rates, which are
// `heads` apart.
inline void loss_gradient(const std::optional<InnerNorm>& norm, int64_t width, const float* rate, int64_t heads,
                          float* z, const float* k, const float* v, int64_t rows) {
  if (norm) {
    norm->gradient(z, k, v, rate, heads, rows);
    return;
  }
  const int64_t wide = whole_vectors(width);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < wide; j += VL) {
      const int64_t i = r * wide + j;
      store(z + i, splat(rate[r * heads]) * (load(z + i) - load(v + i)));
    }
}

// The rows x and d of each layer for `some` tokens, at the weights that the mini-batch begins with; those of d times
// their rates.
inline void find_rows(const ttt::Memory& a, const HeadMemory& m, const std::optional<InnerNorm>& norm,
                      const float* rate, int64_t some, bool begins) {
  const int64_t last = static_cast<int64_t>(m.layers.size()) - 1;
  for (int64_t l = 0; l <= last; l++) {
    const HeadLayer& layer = m.layers[l];
    linear(layer, layer.x, begins ? layer.weight : layer.start, layer.d, some);
    if (l == last) break;
    // d holds the slopes until the next layer's rows are known.
    float* x = m.layers[l + 1].x;
    for (int64_t i = 0; i < some * layer.wide; i += VL) {
      vf slope;
      store(x + i, gelu(load(layer.d + i), &slope));
      store(layer.d + i, slope);
    }
  }
  loss_gradient(norm, a.width, rate, a.heads, m.layers[last].d, m.k, m.v, some);
  for (int64_t l = last; l > 0; l--) {
    const HeadLayer &layer = m.layers[l], &below = m.layers[l - 1];
    through(layer, layer.d, begins ? layer.weight : layer.start, some, m.bp, m.turned, m.z, m.h);
    for (int64_t i = 0; i < some * below.wide; i += VL) store(below.d + i, load(below.d + i) * load(m.h + i));
  }
}

// matrix = by * matrix + moved * other, for all rows of a layer's matrix; without `other` the first term alone.
inline void scale_matrix(const HeadLayer& layer, float* matrix, float by, const float* other, float moved) {
  for (int64_t i = 0; i < layer.size(); i += VL) {
    const vf scaled = splat(by) * load(matrix + i);
    store(matrix + i, other == nullptr ? scaled : scaled + splat(moved) * load(other + i));
  }
}

// Subtracts from a layer's matrix the outer products of the rows x and d of `some` tokens, each times its `factor`;
// null stands for ones. `turned` holds the rows x as columns, and is multiplied in `scratch`.
inline void subtract_rows(const HeadMemory& m, const HeadLayer& layer, const float* factor, float* scratch,
                          float* matrix, int64_t some) {
  const int64_t bp = m.bp, wide = layer.wide;
  const float* columns = m.turned;
  if (factor != nullptr) {
    for (int64_t i = 0; i < layer.inputs; i++)
      for (int64_t j = 0; j < bp; j += VL) store(scratch + i * bp + j, load(m.turned + i * bp + j) * load(factor + j));
    columns = scratch;
  }
  product_of<kSubtract>({columns, bp, 1}, layer.d, wide, matrix, layer.row, layer.inputs, wide, some);
  float* bias = layer.bias(matrix);
  for (int64_t i = 0; i < some; i++) {
    const vf by = splat(factor == nullptr ? 1.0f : factor[i]);
    for (int64_t j = 0; j < wide; j += VL) store(bias + j, load(bias + j) - by * load(layer.d + i * wide + j));
  }
}

// z = the outputs of a layer for inputs h, of which row i is changed by the rows x and d of tokens up to i. Then those
// of all tokens change the weights, and the momentum. h is not needed then, and may be m.h, which is written over.
inline void read_and_write(const HeadMemory& m, const HeadLayer& layer, const float* h, float* z, int64_t some) {
  const int64_t bp = m.bp, wide = layer.wide;
  const Factors& f = m.factors;
  float* seen = m.seen;
  transpose(layer.x, layer.deep, some, layer.deep, m.turned, bp);
  product_of<kSet>({h, layer.deep, 1}, m.turned, bp, seen, bp, some, whole_vectors(some), layer.inputs, kLowerResult);
  for (int64_t i = 0; i < some; i++) {
    for (int64_t j = 0; j <= i; j++) seen[i * bp + j] += 1.0f;  // the bias
    for (int64_t j = 0; !f.plain && j <= i; j++) seen[i * bp + j] *= f.seen[i * bp + j];
    clear_above(seen, bp, i);
  }
  linear(layer, h, layer.weight, z, some);
  if (!f.plain) {
    if (f.moving) linear(layer, h, layer.velocity, m.by_velocity, some);
    for (int64_t i = 0; i < some; i++)
      for (int64_t j = i * wide; j < (i + 1) * wide; j += VL) {
        const vf kept = splat(f.kept[i]) * load(z + j);
        store(z + j, f.moving ? kept + splat(f.moved[i]) * load(m.by_velocity + j) : kept);
      }
  }
  product_of<kSubtract>({seen, bp, 1}, layer.d, wide, z, wide, some, wide, some, kLowerLeft);
  if (f.plain) {
    subtract_rows(m, layer, nullptr, nullptr, layer.weight, some);
    return;
  }
  const int64_t last = some - 1;
  scale_matrix(layer, layer.weight, f.kept[last], f.moving ? layer.velocity : nullptr, f.moved[last]);
  subtract_rows(m, layer, f.seen + last * bp, m.h, layer.weight, some);
  if (!f.moving) return;
  scale_matrix(layer, layer.velocity, f.left, nullptr, 0.0f);
  subtract_rows(m, layer, f.newest, m.h, layer.velocity, some);
}

// The mini-batches from weights that are kept for the backward pass to the next, and which of them are the first of a
// sequence; see `first_kept` of delta_rule.h.
constexpr int64_t MEMORY_KEPT = ttt::MEMORY_KEPT_MINI_BATCHES;
inline int64_t first_kept_memory(const ttt::Memory& a, int64_t begin, int64_t sequence) {
  return begin / (MEMORY_KEPT * a.mini_batch) + sequence;
}

// Keeps the weights of a sequence that began a new mini-batch at token `at`, where that is one whose weights are kept.
inline void keep_weights(const ttt::Memory& a, const HeadMemory& m, int64_t begin, int64_t at, int64_t sequence,
                         int64_t head) {
  const int64_t span = MEMORY_KEPT * a.mini_batch;
  if (a.layers[0].kept_weight == nullptr || (at - begin) % span != 0) return;
  const int64_t row = (first_kept_memory(a, begin, sequence) + (at - begin) / span) * a.heads + head;
  for (int64_t l = 0; l < a.depth; l++) {
    const HeadLayer& layer = m.layers[l];
    const int64_t matrix = row * layer.inputs * layer.outputs, bias = row * layer.outputs;
    write_matrix(layer, layer.weight, a.layers[l].kept_weight + matrix, a.layers[l].kept_bias + bias);
    if (m.factors.moving)
      write_matrix(layer, layer.velocity, a.layers[l].kept_velocity + matrix, a.layers[l].kept_velocity_bias + bias);
  }
}

template <class T>
void memory_text(const ttt::Memory& a, int64_t sequence, int64_t head, HeadMemory& m) {
  const int64_t width = a.width, wide = whole_vectors(width), depth = a.depth, row = sequence * a.heads + head;
  const std::optional<InnerNorm> norm = norm_of(a, head, m.norm);
  int64_t position = a.position[sequence];
  for (int64_t l = 0; l < depth; l++) {
    const ttt::MemoryLayer& given = a.layers[l];
    const HeadLayer& layer = m.layers[l];
    const int64_t matrix = row * layer.inputs * layer.outputs, bias = row * layer.outputs;
    read_matrix(layer, given.weight + matrix, given.bias + bias, layer.weight);
    if (position > 0) read_matrix(layer, given.start_weight + matrix, given.start_bias + bias, layer.start);
    if (m.factors.moving) read_matrix(layer, given.velocity + matrix, given.velocity_bias + bias, layer.velocity);
  }
  const int64_t begin = a.begins ? a.begins[sequence] : sequence * a.tokens;
  const int64_t end = a.begins ? a.begins[sequence + 1] : begin + a.tokens;
  for (int64_t at = begin; at < end;) {
    const int64_t room = m.b - position, some = std::min(end - at, room), first = at * a.heads + head;
    const int64_t stride = a.heads * width;
    read_rows(static_cast<const T*>(a.q) + first * width, stride, some, width, m.q, wide);
    read_rows(static_cast<const T*>(a.k) + first * width, stride, some, width, m.k, wide);
    read_rows(static_cast<const T*>(a.v) + first * width, stride, some, width, m.v, wide);
    for (int64_t i = 0; a.scale != 1.0f && i < some * wide; i += VL) store(m.q + i, splat(a.scale) * load(m.q + i));
    keep_weights(a, m, begin, at, sequence, head);
    // Where a mini-batch begins, the present weights are its first ones.
    find_rows(a, m, norm, a.rate + first, some, position == 0);
    m.factors.find(a, first, some, m.bp);
    const bool full = some == room;
    const float* h = m.q;
    for (int64_t l = 0; l < depth; l++) {
      const HeadLayer& layer = m.layers[l];
      if (position == 0 && !full) std::memcpy(layer.start, layer.weight, layer.size() * sizeof(float));
      read_and_write(m, layer, h, m.z, some);
      if (l == depth - 1) break;
      for (int64_t i = 0; i < some * layer.wide; i += VL) store(m.h + i, gelu(load(m.z + i)));
      h = m.h;
    }
    if (norm) norm->apply(m.z, m.q, some);
    write_rows(m.z, wide, some, width, static_cast<T*>(a.out) + first * width, stride);
    position = full ? 0 : position + some;
    at += some;
  }
  for (int64_t l = 0; l < depth; l++) {
    const ttt::MemoryLayer& given = a.layers[l];
    const HeadLayer& layer = m.layers[l];
    const int64_t matrix = row * layer.inputs * layer.outputs, bias = row * layer.outputs;
    write_matrix(layer, layer.weight, given.weight + matrix, given.bias + bias);
    write_matrix(layer, position == 0 ? layer.weight : layer.start, given.start_weight + matrix,
                 given.start_bias + bias);
    if (m.factors.moving) write_matrix(layer, layer.velocity, given.velocity + matrix, given.velocity_bias + bias);
  }
}

template <class T>
void memory_texts(const ttt::Memory& a) {
  const int64_t tasks = a.sequences * a.heads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && tasks > 1)
  {
    InScratch<HeadMemory> own(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) memory_text<T>(a, task / a.heads, task % a.heads, own.memory);
  }
}

void run_memory(const ttt::Memory& a) { a.dtype == ttt::kF32 ? memory_texts<float>(a) : memory_texts<bf16>(a); }

}  // namespace

// What a thread of the backward pass of memories works with (memory_backward.h), and the pieces of its mini-batches.
#pragma once
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "memory_factors.h"

namespace {

// What reading some mini-batches again leaves of a layer, for one of them.
struct KeptLayer {
  float *weight, *velocity;  // before the mini-batch
  float* z;                  // outputs for the keys; of the last layer standardised if the memory has an inner norm
  float* rows;               // E
  float* back;               // U, of all layers but the first
};

// One layer of a head's memory and its gradients. All rows of inputs have a 1 behind their last column, for the bias.
struct GradientLayer {
  HeadLayer of;                         // without the rows; `of.deep` has room for the 1
  int64_t near;                         // of.inputs in whole vectors
  float *dweight, *dstart, *dvelocity;  // the last is of a memory with momentum only
  float *h, *x, *du;  // without gaps between them: inputs for queries and for keys, and the gradient of U
  float *y, *k, *e;   // likewise: gradients of the outputs for queries and for keys, and E
  float *slope, *de;  // bp x wide: of GELU at the outputs for keys; the gradient of E
  float *seen, *dx;   // bp x bp, bp x near
  float* pairs;       // bp x bp: P without the factors of gates and momenta, where there are such
  KeptLayer kept[MEMORY_KEPT];

  GradientLayer(const ttt::MemoryLayer& given, int64_t bp, bool first, const Factors& f, Parts* parts) : of() {
    of.inputs = given.inputs;
    of.outputs = given.outputs;
    of.deep = whole_vectors(given.inputs + 1);
    of.wide = whole_vectors(given.outputs);
    of.row = of.wide + BETWEEN_ROWS;
    near = whole_vectors(given.inputs);
    for (float** matrix : {&of.weight, &dweight, &dstart}) *matrix = parts->take(of.size());
    h = parts->take(3 * bp * of.deep);
    y = parts->take(3 * bp * of.wide);
    for (float** rows : {&slope, &de}) *rows = parts->take(bp * of.wide);
    seen = parts->take(bp * bp);
    dx = parts->take(bp * near);
    if (!f.plain) pairs = parts->take(bp * bp);
    for (float** matrix : {&of.velocity, &dvelocity}) *matrix = f.moving ? parts->take(of.size()) : nullptr;
    for (KeptLayer& chunk : kept)
      chunk = {parts->take(of.size()), f.moving ? parts->take(of.size()) : nullptr, parts->take(bp * of.wide),
               parts->take(bp * of.wide), first ? nullptr : parts->take(bp * near)};
  }

  // Where rows begin in a mini-batch of `some` tokens.
  void place(int64_t some) {
    x = h + some * of.deep;
    du = x + some * of.deep;
    k = y + some * of.wide;
    e = k + some * of.wide;
  }
  int64_t deep() const { return of.deep; }
  int64_t wide() const { return of.wide; }
};

struct MemoryGradient {
  int64_t width, wide, b, bp;  // wide: of rows of `width` numbers
  Factors factors;
  FactorsGradient of_factors;
  std::vector<GradientLayer> layers;
  float *k, *v, *dout, *dq, *dkv, *plain;   // bp x wide
  float *through_d, *through_w, *near;      // of `through`
  float* moving;                            // bp x the widest rows: what the momentum adds
  float *crossed, *inverse, *norm, *dnorm;  // bp x bp, bp, 2 wide, 2 wide
  float* kept_inverse;                      // MEMORY_KEPT x bp

  MemoryGradient(const ttt::Memory& a, Parts* parts)
      : width(a.width),
        wide(whole_vectors(width)),
        b(a.mini_batch),
        bp(whole_vectors(b)),
        factors(a, bp, parts),
        of_factors(factors.plain ? 0 : bp, parts) {
    int64_t widest = wide;
    for (int64_t l = 0; l < a.depth; l++) {
      layers.emplace_back(a.layers[l], bp, l == 0, factors, parts);
      widest = std::max({widest, layers[l].of.deep, layers[l].of.wide});
    }
    for (float** rows : {&k, &v, &dout, &dq, &dkv, &plain}) *rows = parts->take(bp * wide);
    for (float** rows : {&through_d, &through_w, &near, &moving}) *rows = parts->take(bp * widest);
    crossed = parts->take(bp * bp);
    inverse = parts->take(bp);
    norm = parts->take(2 * wide);
    dnorm = parts->take(2 * wide);
    kept_inverse = parts->take(MEMORY_KEPT * bp);
  }

  int64_t last() const { return static_cast<int64_t>(layers.size()) - 1; }
};

// Puts a 1 behind the last of `width` columns, and zeros behind that.
inline void append_ones(float* rows, int64_t count, int64_t width, int64_t deep) {
  for (int64_t r = 0; r < count; r++) {
    rows[r * deep + width] = 1.0f;
    for (int64_t j = width + 1; j < deep; j++) rows[r * deep + j] = 0.0f;
  }
}

// Reads rows with a 1 behind their last column, all times `scale` but the 1.
template <class T>
inline void read_inputs(const T* from, int64_t stride, int64_t rows, int64_t width, float scale, float* to,
                        int64_t deep) {
  read_rows(from, stride, rows, width, to, deep);
  for (int64_t i = 0; scale != 1.0f && i < rows * deep; i += VL) store(to + i, splat(scale) * load(to + i));
  append_ones(to, rows, width, deep);
}

// x, inputs of the layer above with their ones, and the derivatives of GELU at the outputs z, which are 0 behind the
// last column. `slope` may be z; without `curve` the first derivative alone.
inline void activate(const HeadLayer& layer, const float* z, int64_t rows, float* slope, float* curve, float* x,
                     int64_t deep) {
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = r * layer.wide;
    for (int64_t j = 0; j < layer.wide; j += VL) {
      vf first, second;
      const vf value = curve == nullptr ? gelu(load(z + at + j), &first) : gelu(load(z + at + j), &first, &second);
      store(x + r * deep + j, value);
      store(slope + at + j, first);
      if (curve != nullptr) store(curve + at + j, second);
    }
    for (int64_t j = layer.outputs; j < layer.wide; j++) slope[at + j] = 0.0f;
    for (int64_t j = layer.outputs; curve != nullptr && j < layer.wide; j++) curve[at + j] = 0.0f;
  }
  append_ones(x, rows, layer.outputs, deep);
}

inline void add(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) store(to + i, load(to + i) + load(from + i));
}
// to *= by
inline void multiply(const float* by, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) store(to + i, load(to + i) * load(by + i));
}
inline void negate(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) store(to + i, vf{} - load(to + i));
}

// The lower triangle of a b^T, for `some` rows of a and b, of which `inner` numbers count. Register tiles read further
// columns than those of their rows: these are 0. turned: b_row x bp.
inline void lower_products(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t inner, int64_t some,
                           int64_t bp, float* turned, float* to) {
  transpose(b, b_row, some, b_row, turned, bp);
  product_of<kSet>({a, a_row, 1}, turned, bp, to, bp, some, whole_vectors(some), inner, kLowerResult);
  for (int64_t i = 0; i < some; i++) clear_above(to, bp, i);
}

}  // namespace

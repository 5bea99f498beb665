// The backward pass of memories that learn, on texts: TTT-Linear, TTT-MLP and Titans. ttt/ops/sequence/dual_form.py has
// the formulas of the forward pass, and memory_gradient.h what is worked with.
//
// Rows of inputs have a 1 behind their last column here, and weights have the bias as their last row. Of a layer, let W
// be the weights before a mini-batch, x and h the inputs for keys and for queries, E the rows d times their rates, and
// P_ij = h_i.x_j for j <= i. With U = E W^T without the bias, and of the layer below
//
//     z = x W           next x = gelu(z)        E below = U gelu'(z below)
//     y = h W - P E     next h = gelu(y)        W <- W - x^T E
//
// With Y the gradient of y, D that of the weights after the mini-batch, and N_ij = -Y_i.E_j for j <= i, from the last
// layer down
//
//     dE = -P^T Y - x D     dh = Y W^T + N x     dx = N^T h - E D^T     Y below = dh gelu'(y below)
//
// then from the first layer up dU = dE below gelu'(z below) and dE += dU W; at the last one K, what dE is as a gradient
// of z (inner_norm.h); and down again
//
//     dx += K W^T     K below = dx gelu'(z below) + dE below U gelu''(z below)     D <- D + h^T Y + x^T K + dU^T E
//
// With gates and momenta, y_i = a'_i h_i W + m'_i h_i M - sum_j S_ij P_ij E_j and, with n the last token,
//
//     W <- a'_n W + m'_n M - sum_j S_nj x_j^T E_j        M <- l M - sum_j s_j x_j^T E_j
//
// where a', m', S, s and l are `kept`, `moved`, `seen`, `newest` and `left` of Factors (memory.h). So P and N are
// multiplied by S above, D and h^T Y by what stands before W and M, and their products are the gradients of the
// factors.
#pragma once
#include "memory_gradient.h"

namespace {

// The change of a layer's weights and momentum by the rows of h, which are those of the keys here, and E.
inline void write_again(GradientLayer& layer, const KeptLayer& kept, const Factors& f, int64_t bp, int64_t some) {
  const int64_t wide = layer.wide(), last = some - 1;
  const auto subtract = [&](const float* rows, float* matrix) {
    product_of<kSubtract>({layer.h, 1, layer.deep()}, rows, wide, matrix, layer.of.row, layer.of.inputs + 1, wide,
                          some);
  };
  if (f.plain) return subtract(kept.rows, layer.of.weight);
  scale_matrix(layer.of, layer.of.weight, f.kept[last], f.moving ? layer.of.velocity : nullptr, f.moved[last]);
  scale_rows<kSet>(kept.rows, f.seen + last * bp, some, wide, layer.y);
  subtract(layer.y, layer.of.weight);
  if (!f.moving) return;
  scale_matrix(layer.of, layer.of.velocity, f.left, nullptr, 0.0f);
  scale_rows<kSet>(kept.rows, f.newest, some, wide, layer.y);
  subtract(layer.y, layer.of.velocity);
}

// Reads a mini-batch again, and keeps what the backward pass needs of it as number n.
template <class T>
void reread(const ttt::Memory& a, const std::optional<InnerNorm>& norm, int64_t at, int64_t some, int64_t head,
            int64_t n, MemoryGradient& m) {
  const int64_t width = m.width, wide = m.wide, stride = a.heads * width, first = at * a.heads + head, last = m.last();
  const T* keys = static_cast<const T*>(a.k) + first * width;
  read_inputs(keys, stride, some, width, 1.0f, m.layers[0].h, m.layers[0].deep());
  read_rows(keys, stride, some, width, m.k, wide);
  read_rows(static_cast<const T*>(a.v) + first * width, stride, some, width, m.v, wide);
  for (int64_t l = 0; l <= last; l++) {
    GradientLayer& layer = m.layers[l];
    const KeptLayer& kept = layer.kept[n];
    std::memcpy(kept.weight, layer.of.weight, layer.of.size() * sizeof(float));
    if (m.factors.moving) std::memcpy(kept.velocity, layer.of.velocity, layer.of.size() * sizeof(float));
    product_of<kSet>({layer.h, layer.deep(), 1}, layer.of.weight, layer.of.row, kept.z, layer.wide(), some,
                     layer.wide(), layer.of.inputs + 1);
    if (l < last) activate(layer.of, kept.z, some, kept.rows, nullptr, m.layers[l + 1].h, m.layers[l + 1].deep());
  }
  const KeptLayer& top = m.layers[last].kept[n];
  std::memcpy(top.rows, top.z, some * wide * sizeof(float));
  if (norm) norm->standardise(top.z, m.kept_inverse + n * m.bp, some);
  loss_gradient(norm, width, a.rate + first, a.heads, top.rows, m.k, m.v, some);
  for (int64_t l = last; l > 0; l--) {
    const KeptLayer &kept = m.layers[l].kept[n], &below = m.layers[l - 1].kept[n];
    through(m.layers[l].of, kept.rows, kept.weight, some, m.bp, m.through_d, m.through_w, kept.back);
    multiply(kept.back, below.rows, some * m.layers[l].near);
  }
  m.factors.find(a, first, some, m.bp);
  for (GradientLayer& layer : m.layers) write_again(layer, layer.kept[n], m.factors, m.bp, some);
}

// The outputs of all layers for the queries, as the forward pass finds them: of the last layer in its y, of the others
// the slopes of GELU there. Of the keys, too, the inputs of each layer, and the derivatives of GELU.
inline void read_again(MemoryGradient& m, int64_t some, int64_t n) {
  const int64_t bp = m.bp, last = m.last();
  const Factors& f = m.factors;
  for (int64_t l = 0; l <= last; l++) {
    GradientLayer& layer = m.layers[l];
    const KeptLayer& kept = layer.kept[n];
    const int64_t deep = layer.deep(), wide = layer.wide(), inputs = layer.of.inputs;
    lower_products(layer.h, deep, layer.x, deep, inputs + 1, some, bp, m.through_d, layer.seen);
    product_of<kSet>({layer.h, deep, 1}, kept.weight, layer.of.row, layer.y, wide, some, wide, inputs + 1);
    if (!f.plain) {
      std::memcpy(layer.pairs, layer.seen, some * bp * sizeof(float));
      multiply_lower(f.seen, some, bp, layer.seen);
      scale_rows<kSet>(layer.y, f.kept, some, wide, layer.y);
    }
    if (f.moving) {
      product_of<kSet>({layer.h, deep, 1}, kept.velocity, layer.of.row, m.moving, wide, some, wide, inputs + 1);
      scale_rows<kAdd>(m.moving, f.moved, some, wide, layer.y);
    }
    product_of<kSubtract>({layer.seen, bp, 1}, kept.rows, wide, layer.y, wide, some, wide, some, kLowerLeft);
    if (l == last) return;
    GradientLayer& next = m.layers[l + 1];
    activate(layer.of, layer.y, some, layer.y, nullptr, next.h, next.deep());
    activate(layer.of, kept.z, some, layer.slope, layer.k, next.x, next.deep());
  }
}

// The gradients of a', m' and l by a layer's matrices; then what D and that of the momentum are before the mini-batch,
// as far as it follows from them and from the outputs for queries, whose gradients become those of h W.
inline void factors_of_matrices(MemoryGradient& m, GradientLayer& layer, const KeptLayer& kept, int64_t some) {
  const Factors& f = m.factors;
  FactorsGradient& g = m.of_factors;
  const int64_t size = layer.of.size(), wide = layer.wide(), last = some - 1;
  g.kept[last] += dot(kept.weight, layer.dweight, size);
  if (f.moving) {
    g.moved[last] += dot(kept.velocity, layer.dweight, size);
    g.left += dot(kept.velocity, layer.dvelocity, size);
    scale_matrix(layer.of, layer.dvelocity, f.left, layer.dweight, f.moved[last]);
    scale_rows<kSet>(layer.y, f.moved, some, wide, m.moving);
    product_of<kAdd>({layer.h, 1, layer.deep()}, m.moving, wide, layer.dvelocity, layer.of.row, layer.of.inputs + 1,
                     wide, some);
  }
  scale_matrix(layer.of, layer.dweight, f.kept[last], nullptr, 0.0f);
  scale_rows<kSet>(layer.y, f.kept, some, wide, layer.y);
}

// From the last layer down: of each the gradient of E, and minus that of x as far as it is found here. The gradient of
// the first layer's h goes to dq.
inline void queries_backward(MemoryGradient& m, int64_t some, int64_t n) {
  const int64_t bp = m.bp;
  const Factors& f = m.factors;
  FactorsGradient& g = m.of_factors;
  const float* newly = f.plain ? nullptr : f.seen + (some - 1) * bp;  // S_nj
  if (!f.plain) g.begin();
  for (int64_t l = m.last(); l >= 0; l--) {
    GradientLayer& layer = m.layers[l];
    const KeptLayer& kept = layer.kept[n];
    const int64_t deep = layer.deep(), wide = layer.wide(), near = layer.near, row = layer.of.row;
    const int64_t inputs = layer.of.inputs;
    // What h W is for the gradient y, of W or of the momentum M, and the gradients of what stands before it.
    const auto through_matrix = [&](const float* matrix, float* to, float* of_factor) {
      through(layer.of, layer.y, matrix, some, bp, m.through_d, m.through_w, to);
      for (int64_t i = 0; of_factor != nullptr && i < some; i++)
        of_factor[i] +=
            dot(to + i * near, layer.h + i * deep, near) + dot(layer.y + i * wide, matrix + inputs * row, wide);
    };
    product_of<kSet>({layer.x, deep, 1}, layer.dweight, row, layer.de, wide, some, wide, inputs + 1);
    if (!f.plain) {
      for (int64_t j = 0; j < some; j++)
        g.seen[(some - 1) * bp + j] -= dot(kept.rows + j * wide, layer.de + j * wide, wide);
      scale_rows<kSet>(layer.de, newly, some, wide, layer.de);
    }
    if (f.moving) {
      product_of<kSet>({layer.x, deep, 1}, layer.dvelocity, row, m.moving, wide, some, wide, inputs + 1);
      for (int64_t j = 0; j < some; j++) g.newest[j] -= dot(kept.rows + j * wide, m.moving + j * wide, wide);
      scale_rows<kAdd>(m.moving, f.newest, some, wide, layer.de);
    }
    product_of<kAdd>({layer.seen, 1, bp}, layer.y, wide, layer.de, wide, some, wide, some, kUpperLeft);
    negate(layer.de, some * wide);
    lower_products(layer.y, wide, kept.rows, wide, layer.of.outputs, some, bp, m.through_d, m.crossed);
    if (!f.plain) {
      for (int64_t i = 0; i < some; i++)
        for (int64_t j = 0; j <= i; j++) g.seen[i * bp + j] -= layer.pairs[i * bp + j] * m.crossed[i * bp + j];
      multiply_lower(f.seen, some, bp, m.crossed);
    }
    float* dh = l == 0 ? m.dq : m.near;
    through_matrix(kept.weight, dh, f.plain ? nullptr : g.kept);
    if (!f.plain) scale_rows<kSet>(dh, f.kept, some, near, dh);
    if (f.moving) {
      through_matrix(kept.velocity, m.moving, g.moved);
      scale_rows<kAdd>(m.moving, f.moved, some, near, dh);
    }
    product_of<kSubtract>({m.crossed, bp, 1}, layer.x, deep, dh, near, some, near, some, kLowerLeft);
    through(layer.of, kept.rows, layer.dweight, some, bp, m.through_d, m.through_w, layer.dx);
    if (!f.plain) scale_rows<kSet>(layer.dx, newly, some, near, layer.dx);
    if (f.moving) {
      through(layer.of, kept.rows, layer.dvelocity, some, bp, m.through_d, m.through_w, m.moving);
      scale_rows<kAdd>(m.moving, f.newest, some, near, layer.dx);
    }
    product_of<kAdd>({m.crossed, 1, bp}, layer.h, deep, layer.dx, near, some, near, some, kUpperLeft);
    if (l > 0) multiply(dh, m.layers[l - 1].y, some * near);
    if (!f.plain) factors_of_matrices(m, layer, kept, some);
  }
}

// From the first layer up: the gradients of E of all layers, and of U.
inline void rows_backward(MemoryGradient& m, int64_t some, int64_t n) {
  for (int64_t l = 1; l <= m.last(); l++) {
    GradientLayer &layer = m.layers[l], &below = m.layers[l - 1];
    const int64_t deep = layer.deep(), near = layer.near;
    const float* back = layer.kept[n].back;
    for (int64_t r = 0; r < some; r++) {
      for (int64_t j = 0; j < near; j += VL) {
        const int64_t i = r * near + j;
        const vf given = load(below.de + i);
        store(layer.du + r * deep + j, given * load(below.slope + i));
        store(below.k + i, given * load(back + i) * load(below.k + i));
      }
      for (int64_t j = near; j < deep; j += VL) store(layer.du + r * deep + j, vf{});
    }
    product_of<kAdd>({layer.du, deep, 1}, layer.kept[n].weight, layer.of.row, layer.de, layer.wide(), some,
                     layer.wide(), layer.of.inputs);
  }
}

// z - v instead of the norm of inner_norm.h: d, the gradient of the rows E, becomes that of z, and is copied to d_z.
inline void loss_gradient_backward(int64_t width, const float* z, const float* v, const float* rate, int64_t heads,
                                   float* d, float* d_z, float* d_rate, int64_t rows) {
  const int64_t wide = whole_vectors(width);
  for (int64_t r = 0; r < rows; r++) {
    vf total = {};
    for (int64_t i = r * wide; i < (r + 1) * wide; i += VL) {
      const vf given = load(d + i), found = splat(rate[r * heads]) * given;
      total += given * (load(z + i) - load(v + i));
      store(d + i, found);
      store(d_z + i, found);
    }
    d_rate[r * heads] = sum(total);
  }
}

// The last mini-batch of a text may be shorter; of the first one the gradient of W as weights that the rows d are taken
// at goes to dstart.
template <class T>
void mini_batch_backward(const ttt::MemoryBackward& g, const std::optional<InnerNorm>& norm, int64_t at, int64_t some,
                         int64_t head, bool starts, int64_t n, MemoryGradient& m) {
  const ttt::Memory& a = g.forward;
  const int64_t width = m.width, wide = m.wide, stride = a.heads * width, last = m.last();
  const int64_t first = at * a.heads + head, from = first * width;
  for (GradientLayer& layer : m.layers) layer.place(some);
  GradientLayer &bottom = m.layers[0], &top = m.layers[last];
  read_inputs(static_cast<const T*>(a.q) + from, stride, some, width, a.scale, bottom.h, bottom.deep());
  read_inputs(static_cast<const T*>(a.k) + from, stride, some, width, 1.0f, bottom.x, bottom.deep());
  read_rows(static_cast<const T*>(a.k) + from, stride, some, width, m.k, wide);
  read_rows(static_cast<const T*>(a.v) + from, stride, some, width, m.v, wide);
  read_rows(static_cast<const T*>(g.out) + from, stride, some, width, m.dout, wide);
  m.factors.find(a, first, some, m.bp);
  read_again(m, some, n);
  if (norm) {
    norm->standardise(top.y, m.inverse, some);
    std::memcpy(m.plain, top.y, some * wide * sizeof(float));
  }
  std::memcpy(top.y, m.dout, some * wide * sizeof(float));
  if (norm) norm->backward(m.plain, m.inverse, top.y, m.dnorm, m.dnorm + wide, some);
  queries_backward(m, some, n);
  if (!m.factors.plain) {
    const auto from_first = [&](auto* numbers) { return numbers == nullptr ? nullptr : numbers + first; };
    m.of_factors.finish(m.factors, from_first(a.gate), from_first(a.momentum), a.heads, some, from_first(g.gate),
                        from_first(g.momentum));
  }
  rows_backward(m, some, n);
  const KeptLayer& kept = top.kept[n];
  std::memcpy(top.k, top.de, some * wide * sizeof(float));
  if (norm)
    norm->gradient_backward(kept.z, m.kept_inverse + n * m.bp, m.k, m.v, a.rate + first, a.heads, top.k, m.dkv,
                            g.rate + first, m.dnorm, m.dnorm + wide, some);
  else
    loss_gradient_backward(width, kept.z, m.v, a.rate + first, a.heads, top.k, m.dkv, g.rate + first, some);
  for (int64_t l = last; l >= 0; l--) {
    GradientLayer& layer = m.layers[l];
    const int64_t deep = layer.deep(), near = layer.near, row = layer.of.row, inputs = layer.of.inputs;
    through(layer.of, layer.k, layer.kept[n].weight, some, m.bp, m.through_d, m.through_w, m.near);
    for (int64_t i = 0; i < some * near; i += VL) {
      const vf found = load(m.near + i) - load(layer.dx + i);
      store(layer.dx + i, found);
      if (l == 0) continue;
      GradientLayer& below = m.layers[l - 1];
      store(below.k + i, load(below.k + i) + found * load(below.slope + i));
    }
    std::memcpy(layer.e, layer.kept[n].rows, some * layer.wide() * sizeof(float));
    const int64_t all = l == 0 ? 2 * some : 3 * some, now = starts ? some : all;
    product_of<kAdd>({layer.h, 1, deep}, layer.y, layer.wide(), layer.dweight, row, inputs + 1, layer.wide(), now);
    if (starts)
      product_of<kAdd>({layer.x, 1, deep}, layer.k, layer.wide(), layer.dstart, row, inputs + 1, layer.wide(),
                       all - some);
  }
  for (int64_t i = 0; i < some * wide; i += VL) {
    const vf of_target = load(m.dkv + i), of_key = load(bottom.dx + i), of_query = load(m.dq + i);
    store(m.dq + i, splat(a.scale) * (norm ? of_query + load(m.dout + i) : of_query));
    store(bottom.dx + i, norm ? of_key + of_target : of_key);
    store(m.dkv + i, vf{} - of_target);
  }
  write_rows(m.dq, wide, some, width, static_cast<T*>(g.q) + from, stride);
  write_rows(bottom.dx, wide, some, width, static_cast<T*>(g.k) + from, stride);
  write_rows(m.dkv, wide, some, width, static_cast<T*>(g.v) + from, stride);
}

// The gradient of the weights that a mini-batch begins with becomes part of that of the weights.
inline void join_start(MemoryGradient& m) {
  for (GradientLayer& layer : m.layers) {
    add(layer.dstart, layer.dweight, layer.of.size());
    std::memset(layer.dstart, 0, layer.of.size() * sizeof(float));
  }
}

template <class T>
void memory_text_backward(const ttt::MemoryBackward& g, int64_t sequence, int64_t head, MemoryGradient& m) {
  const ttt::Memory& a = g.forward;
  const int64_t row = sequence * a.heads + head, span = MEMORY_KEPT * m.b;
  const int64_t begin = a.begins ? a.begins[sequence] : sequence * a.tokens;
  const int64_t end = a.begins ? a.begins[sequence + 1] : begin + a.tokens;
  const std::optional<InnerNorm> norm = norm_of(a, head, m.norm);
  std::memset(m.dnorm, 0, 2 * m.wide * sizeof(float));
  for (int64_t l = 0; l < a.depth; l++) {
    const ttt::MemoryLayer& given = g.layers[l];
    GradientLayer& layer = m.layers[l];
    const int64_t matrix = row * given.inputs * given.outputs, bias = row * given.outputs;
    read_matrix(layer.of, given.weight + matrix, given.bias + bias, layer.dweight);
    read_matrix(layer.of, given.start_weight + matrix, given.start_bias + bias, layer.dstart);
    if (m.factors.moving) read_matrix(layer.of, given.velocity + matrix, given.velocity_bias + bias, layer.dvelocity);
  }
  // dstart is the gradient of the weights before the last mini-batch if that is not full, else of those after it.
  const bool full = (end - begin) % m.b == 0;
  for (int64_t s = (end - begin + span - 1) / span - 1; s >= 0; s--) {
    const int64_t at = begin + s * span, kept = (first_kept_memory(a, begin, sequence) + s) * a.heads + head;
    const int64_t chunks = (std::min(end - at, span) + m.b - 1) / m.b;
    for (int64_t l = 0; l < a.depth; l++) {
      const ttt::MemoryLayer& from = a.layers[l];
      const HeadLayer& layer = m.layers[l].of;
      const int64_t matrix = kept * from.inputs * from.outputs, bias = kept * from.outputs;
      read_matrix(layer, from.kept_weight + matrix, from.kept_bias + bias, layer.weight);
      if (m.factors.moving)
        read_matrix(layer, from.kept_velocity + matrix, from.kept_velocity_bias + bias, layer.velocity);
    }
    for (int64_t c = 0; c < chunks; c++)
      reread<T>(a, norm, at + c * m.b, std::min(end - at - c * m.b, m.b), head, c, m);
    for (int64_t c = chunks - 1; c >= 0; c--) {
      const int64_t from = at + c * m.b, some = std::min(end - from, m.b);
      const bool last = from + some == end, starts = from == begin;
      if (last && full) join_start(m);
      mini_batch_backward<T>(g, norm, from, some, head, starts, c, m);
      if (last && !full && !starts) join_start(m);
    }
  }
  for (int64_t l = 0; l < a.depth; l++) {
    const ttt::MemoryLayer& given = g.layers[l];
    const GradientLayer& layer = m.layers[l];
    const int64_t matrix = row * given.inputs * given.outputs, bias = row * given.outputs;
    write_matrix(layer.of, layer.dweight, given.weight + matrix, given.bias + bias);
    write_matrix(layer.of, layer.dstart, given.start_weight + matrix, given.start_bias + bias);
    if (m.factors.moving) write_matrix(layer.of, layer.dvelocity, given.velocity + matrix, given.velocity_bias + bias);
  }
  if (!norm) return;
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

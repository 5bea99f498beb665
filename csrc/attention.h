// The backward pass of softmax attention, from queries, keys and values alone.
//
// With scores z_ij = scale q_i.k_j, probabilities p_ij = softmax of z_i over the keys that query i sees, and the
// gradient o_i of its output:
//
//     d_ij = o_i.v_j                                    dv_j = sum_i p_ij o_i
//     e_ij = scale p_ij (d_ij - sum_l p_il d_il)        dq_i = sum_j e_ij k_j        dk_j = sum_i e_ij q_i
//
// Everything between the inputs and the results is float32. The queries of all heads that share a head of keys are the
// rows of one matrix, of which a block is computed at a time.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "api.h"
#include "attention_api.h"
#include "exponential.h"
#include "failure.h"
#include "parts.h"
#include "sequence_product.h"

namespace {

constexpr int64_t ATTENTION_ROWS = 64;

// The length of rows of `count` numbers: an odd number of vectors, so that the rows of a column do not all meet in a
// few places of the cache.
inline int64_t apart(int64_t count) {
  const int64_t wide = whole_vectors(count);
  return wide / VL % 2 ? wide : wide + VL;
}

struct AttentionMemory {
  int64_t wide, value_wide, row;   // the lengths of rows: of queries and keys, of values, of scores
  float *k, *turned_k, *turned_v;  // keys x wide, wide x row, value_wide x row
  float *dk, *dv;                  // keys - first x wide, keys - first x value_wide
  float *q, *out, *dq;             // ATTENTION_ROWS x wide, x value_wide, x wide
  float *p, *d;                    // ATTENTION_ROWS x row
  float* read;                     // keys x value_wide

  AttentionMemory(const ttt::AttentionBackward& a, Parts* parts)
      : wide(whole_vectors(a.width)), value_wide(whole_vectors(a.value_width)), row(apart(a.keys)) {
    const int64_t later = a.keys - a.first;
    k = parts->take(a.keys * wide);
    turned_k = parts->take(wide * row);
    turned_v = parts->take(value_wide * row);
    dk = parts->take(later * wide);
    dv = parts->take(later * value_wide);
    q = parts->take(ATTENTION_ROWS * wide);
    out = parts->take(ATTENTION_ROWS * value_wide);
    dq = parts->take(ATTENTION_ROWS * wide);
    p = parts->take(ATTENTION_ROWS * row);
    d = parts->take(ATTENTION_ROWS * row);
    read = parts->take(a.keys * value_wide);
  }
};

// Calls f(row of the block, query, head, rows) for each run of rows of one head.
template <class F>
inline void for_each_head(const ttt::AttentionBackward& a, int64_t key_head, int64_t at, int64_t some, F f) {
  const int64_t group = a.heads / a.key_heads;
  for (int64_t r = 0; r < some;) {
    const int64_t query = (at + r) % a.queries, rows = std::min(some - r, a.queries - query);
    f(r, query, key_head * group + (at + r) / a.queries, rows);
    r += rows;
  }
}

// The keys that rows of a block may see: all others are seen by none of them.
struct Seen {
  int64_t begin, end;
};

inline Seen seen_by(const ttt::AttentionBackward& a, const bool* mask, int64_t query) {
  Seen seen = {0, a.causal ? std::min(query + 1, a.keys) : a.keys};
  if (mask == nullptr) return seen;
  while (seen.end > 0 && !mask[seen.end - 1]) seen.end--;
  while (seen.begin < seen.end && !mask[seen.begin]) seen.begin++;
  return seen;
}

// The row of probabilities p and of d becomes that of p and of e, in the columns from `begin` to `wide_end`, of which
// `seen` and `mask` say which are seen.
inline void differentiate_row(float* p, float* d, int64_t begin, int64_t wide_end, Seen seen, const bool* mask,
                              float scale) {
  const float none = -std::numeric_limits<float>::infinity();
  for (int64_t j = begin; j < std::min(seen.begin, wide_end); j++) p[j] = none;
  for (int64_t j = std::max(seen.end, begin); j < wide_end; j++) p[j] = none;
  if (mask != nullptr)
    for (int64_t j = seen.begin; j < seen.end; j++) p[j] = mask[j] ? p[j] : none;
  vf high = splat(none);
  for (int64_t j = begin; j < wide_end; j += VL) {
    const vf z = load(p + j);
    high = z > high ? z : high;
  }
  float lanes[VL];
  store(lanes, high);
  const float highest = *std::max_element(lanes, lanes + VL);
  if (highest == none) {  // it sees no key, or all its scores are -infinity or NaN
    bool fine = true;
    for (int64_t j = seen.begin; j < seen.end; j++) fine = fine && (p[j] == none);
    const vf all = splat(fine ? 0.0f : std::numeric_limits<float>::quiet_NaN());
    for (int64_t j = begin; j < wide_end; j += VL) {
      store(p + j, all);
      store(d + j, all);
    }
    return;
  }
  vf total = {}, along = {};
  const vf scales = splat(scale), top = splat(highest);
  for (int64_t j = begin; j < wide_end; j += VL) {
    const vf e = exponential((load(p + j) - top) * scales);
    store(p + j, e);
    total += e;
    along += e == 0.0f ? e : e * load(d + j);
  }
  const float inverse = 1.0f / sum(total);
  const vf each = splat(inverse), mean = splat(sum(along) * inverse);
  for (int64_t j = begin; j < wide_end; j += VL) {
    const vf probability = load(p + j) * each;
    store(p + j, probability);
    store(d + j, probability == 0.0f ? vf{} : scales * probability * (load(d + j) - mean));
  }
}

template <class T>
void attention_backward_head(const ttt::AttentionBackward& a, int64_t batch, int64_t key_head, AttentionMemory& m) {
  const auto in = [batch](const void* t, const ttt::HeadSteps& steps, int64_t head, int64_t token) {
    return static_cast<const T*>(t) + batch * steps.batch + head * steps.head + token * steps.token;
  };
  const auto out = [batch](void* t, const ttt::HeadSteps& steps, int64_t head, int64_t token) {
    return static_cast<T*>(t) + batch * steps.batch + head * steps.head + token * steps.token;
  };
  const auto mask_of = [&](int64_t head, int64_t query) {
    return a.mask == nullptr
               ? nullptr
               : a.mask + batch * a.mask_steps.batch + head * a.mask_steps.head + query * a.mask_steps.token;
  };
  const int64_t wide = m.wide, value_wide = m.value_wide, row = m.row, later = a.keys - a.first;
  read_rows(in(a.v, a.v_steps, key_head, 0), a.v_steps.token, a.keys, a.value_width, m.read, value_wide);
  transpose(m.read, value_wide, a.keys, value_wide, m.turned_v, row);
  read_rows(in(a.k, a.k_steps, key_head, 0), a.k_steps.token, a.keys, a.width, m.k, wide);
  transpose(m.k, wide, a.keys, wide, m.turned_k, row);
  std::fill(m.dk, m.dk + later * wide, 0.0f);
  std::fill(m.dv, m.dv + later * value_wide, 0.0f);
  const int64_t rows = a.heads / a.key_heads * a.queries;
  for (int64_t at = 0; at < rows; at += ATTENTION_ROWS) {
    const int64_t some = std::min(rows - at, ATTENTION_ROWS);
    Seen seen[ATTENTION_ROWS], block = {a.keys, 0};
    for_each_head(a, key_head, at, some, [&](int64_t r, int64_t query, int64_t head, int64_t count) {
      read_rows(in(a.q, a.q_steps, head, query), a.q_steps.token, count, a.width, m.q + r * wide, wide);
      read_rows(in(a.out, a.out_steps, head, query), a.out_steps.token, count, a.value_width, m.out + r * value_wide,
                value_wide);
      for (int64_t i = 0; i < count; i++) {
        seen[r + i] = seen_by(a, mask_of(head, query + i), query + i);
        if (seen[r + i].begin == seen[r + i].end) continue;
        block = {std::min(block.begin, seen[r + i].begin), std::max(block.end, seen[r + i].end)};
      }
    });
    if (block.begin >= block.end) block = {0, 0};
    const int64_t begin = block.begin / VL * VL, keys = block.end - begin, columns = whole_vectors(keys);
    product_of<kSet>({m.q, wide, 1}, m.turned_k + begin, row, m.p + begin, row, some, columns, a.width);
    product_of<kSet>({m.out, value_wide, 1}, m.turned_v + begin, row, m.d + begin, row, some, columns, a.value_width);
    for_each_head(a, key_head, at, some, [&](int64_t r, int64_t query, int64_t head, int64_t count) {
      for (int64_t i = 0; i < count; i++)
        differentiate_row(m.p + (r + i) * row, m.d + (r + i) * row, begin, begin + columns, seen[r + i],
                          mask_of(head, query + i), a.scale);
    });
    product_of<kSet>({m.d + begin, row, 1}, m.k + begin * wide, wide, m.dq, wide, some, wide, keys);
    for_each_head(a, key_head, at, some, [&](int64_t r, int64_t query, int64_t head, int64_t count) {
      write_rows(m.dq + r * wide, wide, count, a.width, out(a.dq, a.dq_steps, head, query), a.dq_steps.token);
    });
    const int64_t from = std::max(begin, a.first), written = begin + keys - from;
    if (written <= 0) continue;
    product_of<kAdd>({m.d + from, 1, row}, m.q, wide, m.dk + (from - a.first) * wide, wide, written, wide, some);
    product_of<kAdd>({m.p + from, 1, row}, m.out, value_wide, m.dv + (from - a.first) * value_wide, value_wide, written,
                     value_wide, some);
  }
  write_rows(m.dk, wide, later, a.width, out(a.dk, a.dk_steps, key_head, a.first), a.dk_steps.token);
  write_rows(m.dv, value_wide, later, a.value_width, out(a.dv, a.dv_steps, key_head, a.first), a.dv_steps.token);
}

template <class T>
void attention_backward(const ttt::AttentionBackward& a) {
  const int64_t tasks = a.batch * a.key_heads, parts = std::min<int64_t>(tasks, a.threads);
  Failure failure;
#pragma omp parallel for num_threads(parts) if (parts > 1) schedule(static)
  for (int64_t part = 0; part < parts; part++)
    failure.of([&] {
      InScratch<AttentionMemory> own(a);
      for (int64_t task = part; task < tasks; task += parts)
        attention_backward_head<T>(a, task / a.key_heads, task % a.key_heads, own.memory);
    });
  failure.rethrow();
}

void run_attention_backward(const ttt::AttentionBackward& a) {
  a.dtype == ttt::kF32 ? attention_backward<float>(a) : attention_backward<bf16>(a);
}

}  // namespace

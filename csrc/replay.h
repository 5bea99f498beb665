// The replay rows X_r of one commit, and the factor V of its replay step: the commit adds E^T V to G, where E is the
// drift of the layer's outputs on X_r.
#pragma once
#include <omp.h>

#include <cmath>

#include "philox.h"
#include "product.h"
#include "scratch.h"
#include "vec.h"

namespace {

struct Replay {
  int64_t rows;   // R, or 0 if the memory is empty
  int64_t width;  // n, rounded up to whole tiles
  // x and v are R x width floats, with zeros from column n on. The columns of each strip are in the order in which
  // strips of W are held in vectors (vec.h).
  Scratch x;      // X_r: the first strip of every row, then the second strip of every row, and so on; see at()
  Scratch v;      // V, row by row
  Scratch pairs;  // X_r as bfloat16, in the layout of x but in the order of memory; empty without TTT_DOT

  Replay(int64_t rows, int64_t n)
      : rows(rows),
        width((n + NC - 1) / NC * NC),
        x(rows * width),
        v(rows * width),
        pairs(TTT_DOT * rows * width / 2) {}

  // The strip of replay row r that begins at column j. The same strip of row r + 1 follows it in memory. In the layout
  // of W, row by row, equal columns of all rows could fall into the same cache sets and evict each other.
  float* at(int64_t r, int64_t j) const { return x.get() + j * rows + r * STRIP; }
  float* pairs_at(int64_t r, int64_t j) const { return pairs.get() + (j * rows + r * STRIP) / 2; }
};

inline int64_t filled_rows(const ttt::Commit& a) {
  if (a.replay_rows == 0) return 0;
  if (a.seen == nullptr) return a.capacity;
  return *a.seen < a.capacity ? *a.seen : a.capacity;
}

// X_r . X_s
inline double dot(const Replay& replay, int64_t r, int64_t s) {
  double total = 0;  // of float sums of 1024 products each
  for (int64_t j0 = 0; j0 < replay.width; j0 += 1024) {
    const int64_t j1 = j0 + 1024 < replay.width ? j0 + 1024 : replay.width;
    vf acc = {};
    for (int64_t j = j0; j < j1; j += STRIP) {
      const float *p = replay.at(r, j), *q = replay.at(s, j);
      acc += load(p) * load(q);
      acc += load(p + VL) * load(q + VL);
    }
    total += sum(acc);
  }
  return total;
}

// Draws X_r from the memory, and computes V = beta (K + eps tr(K)/R I)^-1 X_r with K = X_r X_r^T by a Cholesky
// decomposition.
template <class T>
void draw_replay(const ttt::Commit& a, Replay& out) {
  const int64_t n = a.n, width = out.width, rows = out.rows, filled = filled_rows(a);
  if (rows == 0) return;
  float* v = out.v.get();
  for (int64_t r = 0; r < rows; r++) {
    int64_t index = r;
    if (a.seen != nullptr) {
      uint32_t words[4];
      philox(static_cast<uint32_t>(r / 4), 0, static_cast<uint32_t>(*a.step), kDraw, a.seed, words);
      index = static_cast<int64_t>((static_cast<uint64_t>(words[r % 4]) * filled) >> 32);
    }
    const T* row = static_cast<const T*>(a.memory) + index * n;
    for (int64_t j = 0; j < width; j += STRIP) {
      const Two strip = j < n ? load2_upto<splits<T>>(row + j, n - j) : Two{};
      store(out.at(r, j), strip.a);
      store(out.at(r, j) + VL, strip.b);
      if constexpr (dots<T>) store(out.pairs_at(r, j), j < n ? load_raw(row + j, n - j) : vf{});
    }
  }
  Scratch gram_scratch(2 * rows * rows), inverse_scratch(2 * rows * rows);
  double* gram = reinterpret_cast<double*>(gram_scratch.get());
  double* inverse = reinterpret_cast<double*>(inverse_scratch.get());
  for (int64_t r = 0; r < rows; r++)
    for (int64_t s = 0; s <= r; s++) gram[r * rows + s] = dot(out, r, s);
  double trace = 0;
  for (int64_t r = 0; r < rows; r++) trace += gram[r * rows + r];
  double ridge = a.eps * trace / rows;
  if (!(ridge > 0)) ridge = 1;
  for (int64_t r = 0; r < rows; r++) gram[r * rows + r] += ridge;
  // Cholesky: gram = L L^T, with L in its lower triangle. Rounding can make a pivot negative: it is at least ridge *
  // 1e-6.
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t s = 0; s <= r; s++) {
      double value = gram[r * rows + s];
      for (int64_t k = 0; k < s; k++) value -= gram[r * rows + k] * gram[s * rows + k];
      gram[r * rows + s] = r == s ? std::sqrt(value > ridge * 1e-6 ? value : ridge * 1e-6) : value / gram[s * rows + s];
    }
  }
  for (int64_t c = 0; c < rows; c++) {  // column c of the inverse: forward, then backward substitution
    for (int64_t r = 0; r < rows; r++) {
      double value = r == c ? 1 : 0;
      for (int64_t k = 0; k < r; k++) value -= gram[r * rows + k] * inverse[k * rows + c];
      inverse[r * rows + c] = value / gram[r * rows + r];
    }
    for (int64_t r = rows - 1; r >= 0; r--) {
      double value = inverse[r * rows + c];
      for (int64_t k = r + 1; k < rows; k++) value -= gram[k * rows + r] * inverse[k * rows + c];
      inverse[r * rows + c] = value / gram[r * rows + r];
    }
  }
  // V is summed in double, because the entries of the inverse are large and cancel.
  const int threads = rows * rows * width < (1 << 18) ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t j0 = 0; j0 < width; j0 += NC)
    for (int64_t r = 0; r < rows; r++) {
      double value[NC] = {};
      for (int64_t s = 0; s < rows; s++)
        for (int at = 0; at < NC; at += STRIP)
          for (int j = 0; j < STRIP; j++) value[at + j] += inverse[r * rows + s] * out.at(s, j0 + at)[j];
      for (int j = 0; j < NC; j++) v[r * width + j0 + j] = static_cast<float>(a.beta * value[j]);
    }
}

}  // namespace

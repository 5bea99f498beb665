// Small symmetric matrices in float64: pivoted Cholesky factors, and the largest eigenvalues with their eigenvectors.
//
// Compression needs the largest 16 of, say, 80 eigenvalues. `torch.linalg.eigh` (LAPACK's syevd) computes all of them;
// the suite `low_rank` of bench/kernels compares the two.
//
// Matrices have rows `ld` apart, a multiple of PAD; entries beyond their size are zero.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "wide.h"

namespace {

// Cholesky factorisation G = L L^T with the largest pivot first, until none is above `tolerance`. Row q of `lt`, which
// must be zero on entry, is column q of L. Returns the number of columns. `left`: workspace of `ld` numbers.
inline int64_t pivoted_cholesky(const double* g, int64_t size, int64_t ld, double tolerance, double* lt, double* left) {
  for (int64_t r = 0; r < ld; r++) left[r] = r < size ? g[r * ld + r] : 0;  // -1 for rows that have been the pivot
  for (int64_t k = 0; k < size; k++) {
    int64_t p = 0;
    for (int64_t r = 1; r < size; r++)
      if (left[r] > left[p]) p = r;
    if (!(left[p] > tolerance)) return k;
    double* row = lt + k * ld;
    std::memcpy(row, g + p * ld, ld * sizeof(double));
    for (int64_t q = 0; q < k; q += 4) {
      const double* before = lt + q * ld;
      double f[4];
      for (int i = 0; i < 4; i++) f[i] = q + i < k ? before[i * ld + p] : 0;
      for (int64_t j = 0; j < ld; j += WL) {
        vw acc = load_wide(row + j);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc -= f[i] * load_wide(before + i * ld + j);
        store(row + j, acc);
      }
    }
    const double root = std::sqrt(left[p]), inverse = 1 / root;
    for (int64_t j = 0; j < ld; j += WL) {
      const vw rest = load_wide(left + j), value = rest < 0 ? vw{} : inverse * load_wide(row + j);
      const vw after = rest - value * value;
      store(row + j, value);
      store(left + j, rest < 0 ? rest : (after > 0 ? after : vw{}));
    }
    row[p] = root;
    left[p] = -1;
  }
  return size;
}

// Updates `rows` rows from row i on, from column `first` on: C <- C - u p^T - p u^T, unless `u` is null. Then sets
// their entries of fresh = tau C v. Several rows at a time share their loads. Returns their part of fresh . v.
template <int rows>
inline double update_rows(double* row, int64_t ld, int64_t first, const double* u, const double* p, const double* v,
                          double tau, int64_t i, double* fresh) {
  vw acc[rows] = {};
  for (int64_t k = first; k < ld; k += WL) {
    vw value[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) value[r] = load_wide(row + r * ld + k);
    if (u != nullptr) {
      const vw pk = load_wide(p + k), uk = load_wide(u + k);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        value[r] = value[r] - u[i + r] * pk - p[i + r] * uk;
        store(row + r * ld + k, value[r]);
      }
    }
    const vw vk = load_wide(v + k);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) acc[r] += value[r] * vk;
  }
  double along = 0;
  for (int r = 0; r < rows; r++) {
    fresh[i + r] = tau * sum(acc[r]);
    along += fresh[i + r] * v[i + r];
  }
  return along;
}

// Householder reduction C = Q T Q^T to a tridiagonal T with diagonal `d` and off-diagonal `e` (e[j] is T[j][j + 1]).
// Row j of `reflectors` is v in the j-th factor I - tau[j] v v^T of Q. C is overwritten. `work`: 2 `ld` numbers.
inline void tridiagonalize(double* c, int64_t size, int64_t ld, double* d, double* e, double* reflectors, double* tau,
                           double* work) {
  // The update C <- C - u p^T - p u^T of a step is done in the next step's pass over C, which multiplies by its v.
  double *p = work, *fresh = work + ld;
  const double* u = nullptr;
  for (int64_t j = 0; j < size; j++) {
    double* row = c + j * ld;
    const int64_t now = j / WL * WL, first = (j + 1) / WL * WL;
    if (u != nullptr)
      for (int64_t k = now; k < ld; k += WL)
        store(row + k, load_wide(row + k) - u[j] * load_wide(p + k) - p[j] * load_wide(u + k));
    d[j] = row[j];
    e[j] = tau[j] = 0;
    if (j + 1 >= size) return;
    double* v = reflectors + j * ld;
    for (int64_t i = 0; i < ld; i++) v[i] = i > j + 1 ? row[i] : 0;
    const double head = row[j + 1], tail = dot(v + first, v + first, ld - first);
    e[j] = head;
    if (tail > 0) {
      e[j] = -std::copysign(std::sqrt(head * head + tail), head);
      v[j + 1] = head - e[j];
      tau[j] = -1 / (e[j] * v[j + 1]);  // 2 / v . v
    }
    double along = 0;
    std::memset(fresh + now, 0, (ld - now) * sizeof(double));
    int64_t i = j + 1;
    for (; i + 1 < size; i += 2) along += update_rows<2>(c + i * ld, ld, first, u, p, v, tau[j], i, fresh);
    if (i < size) along += update_rows<1>(c + i * ld, ld, first, u, p, v, tau[j], i, fresh);
    along *= tau[j] / 2;
    for (int64_t k = now; k < ld; k += WL) store(fresh + k, load_wide(fresh + k) - along * load_wide(v + k));
    std::swap(p, fresh);
    u = v;
  }
}

// The `count` largest eigenvalues of T in falling order, by `count` bisections at a time. `values`: room for `count`
// numbers, rounded up to a multiple of WL.
inline void largest_eigenvalues(const double* d, const double* e, int64_t size, int64_t count, double* values) {
  double low = d[0], high = d[0], most = 0;
  for (int64_t i = 0; i < size; i++) {
    const double radius = (i > 0 ? std::fabs(e[i - 1]) : 0) + (i + 1 < size ? std::fabs(e[i]) : 0);
    low = std::min(low, d[i] - radius);
    high = std::max(high, d[i] + radius);
    most = std::max(most, radius);
  }
  std::vector<double> squares(size);
  for (int64_t i = 1; i < size; i++) squares[i] = std::max(e[i - 1] * e[i - 1], 1e-300);  // avoids 0 / 0
  constexpr int GROUP = 2;  // vectors at a time, so that their divisions overlap
  for (int64_t at = 0; at < count; at += GROUP * WL) {
    vw lower[GROUP], upper[GROUP], rank[GROUP];
    for (int v = 0; v < GROUP; v++) {
      lower[v] = low - vw{};
      upper[v] = high - vw{};
      for (int l = 0; l < WL; l++) rank[v][l] = static_cast<double>(at + v * WL + l);
    }
    for (int halving = 0; halving < 52; halving++) {
      vw x[GROUP], q[GROUP], above[GROUP];
      for (int v = 0; v < GROUP; v++) {
        x[v] = 0.5 * (lower[v] + upper[v]);
        q[v] = d[0] - x[v];
        above[v] = vw{} - __builtin_convertvector(q[v] > 0, vw);
      }
      for (int64_t i = 1; i < size; i++)
        for (int v = 0; v < GROUP; v++) {
          q[v] = d[i] - x[v] - squares[i] / q[v];
          above[v] -= __builtin_convertvector(q[v] > 0, vw);
        }
      for (int v = 0; v < GROUP; v++) {
        lower[v] = above[v] > rank[v] ? x[v] : lower[v];
        upper[v] = above[v] > rank[v] ? upper[v] : x[v];
      }
    }
    for (int v = 0; v < GROUP; v++)
      for (int l = 0; l < WL; l++)
        if (at + v * WL + l < count) values[at + v * WL + l] = 0.5 * (lower[v][l] + upper[v][l]);
  }
}

// Whether T has an eigenvalue above `x`.
inline bool any_above(double x, const double* d, const double* e, int64_t size) {
  double q = d[0] - x;
  for (int64_t i = 1; i < size && !(q > 0); i++) q = d[i] - x - std::max(e[i - 1] * e[i - 1], 1e-300) / q;
  return q > 0;
}

// Plane rotations in the order in which the QL algorithm makes them. A run holds rotations of rows (i, i + 1), from
// i = last - 1 down to i = first.
struct Rotations {
  struct Run {
    int64_t first, last;
  };
  std::vector<Run> runs;
  std::vector<double> c, s;

  void clear() {
    runs.clear();
    c.clear();
    s.clear();
  }
  void reserve(int64_t count) {
    c.reserve(count);
    s.reserve(count);
  }
};

// Rotations Z after which element l of T's diagonal is an eigenvalue, decoupled from the others: QL steps with implicit
// shifts (Bowdler et al., 1968). The first two use `shift`, an approximate eigenvalue, if it is given. Off-diagonal
// elements up to `negligible` count as zero.
inline void split_first(double* d, double* e, int64_t size, int64_t l, double negligible, const double* shift,
                        Rotations& z) {
  for (int tries = 0; tries < 60; tries++) {
    int64_t m = l;
    while (m + 1 < size && std::fabs(e[m]) > negligible) m++;
    if (m == l) return;
    double g;
    if (shift != nullptr && tries < 2) {
      g = d[m] - *shift;
    } else {
      const double apart = (d[l + 1] - d[l]) / (2 * e[l]);
      g = d[m] - d[l] + e[l] / (apart + std::copysign(std::sqrt(apart * apart + 1), apart));
    }
    double s = 1, c = 1, p = 0;
    const int64_t last = m;
    int64_t i = m - 1;
    for (; i >= l; i--) {
      const double f = s * e[i], b = c * e[i], r = std::sqrt(f * f + g * g);
      e[i + 1] = r;
      if (r == 0) {  // T decouples here
        d[i + 1] -= p;
        e[m] = 0;
        break;
      }
      s = f / r;
      c = g / r;
      g = d[i + 1] - p;
      const double t = (d[i] - g) * s + 2 * c * b;
      p = s * t;
      d[i + 1] = g + p;
      g = c * t - b;
      z.c.push_back(c);
      z.s.push_back(s);
    }
    z.runs.push_back({i + 1, last});
    if (i >= l) continue;
    d[l] -= p;
    e[l] = g;
    e[m] = 0;
  }
}

// T <- Z^T T Z, after which the first diagonal elements are eigenvalues, the `count` largest among them, and their
// columns of Z eigenvectors. Returns how many there are: `count`, or all. `e` is overwritten. `work`: as
// `largest_eigenvalues`.
inline int64_t diagonalize(double* d, double* e, int64_t size, int64_t count, double* work, Rotations& z) {
  double largest = 0;
  for (int64_t i = 0; i < size; i++) largest = std::max({largest, std::fabs(d[i]), std::fabs(e[i])});
  const double negligible = largest * 0x1p-53;
  int64_t done = 0;
  if (count < size) {
    largest_eigenvalues(d, e, size, count, work);
    for (; done < count; done++) split_first(d, e, size, done, negligible, work + done, z);
    // Because of rounding, or if T is decoupled, these may be others than the largest: then all are computed.
    const double least = *std::min_element(d, d + done) + 16 * negligible;
    if (!any_above(least, d + done, e + done, size - done)) return done;
  }
  for (; done < size; done++) split_first(d, e, size, done, negligible, nullptr, z);
  return size;
}

// X <- Z X for rows of `columns` numbers, a multiple of WL, `ld` apart.
inline void apply_rotations(const Rotations& z, double* x, int64_t ld, int64_t columns) {
  for (int64_t j = 0; j < columns; j += WL) {
    size_t at = z.c.size();
    for (size_t k = z.runs.size(); k-- > 0;) {
      const auto [first, last] = z.runs[k];
      vw carried = load_wide(x + first * ld + j);
      for (int64_t i = first; i < last; i++) {
        const double c = z.c[--at], s = z.s[at];
        const vw next = load_wide(x + (i + 1) * ld + j);
        store(x + i * ld + j, c * carried + s * next);
        carried = c * next - s * carried;
      }
      store(x + last * ld + j, carried);
    }
  }
}

// X <- Q X with Q from `tridiagonalize`; `columns` is a multiple of PAD.
inline void apply_reflectors(const double* reflectors, const double* tau, int64_t size, int64_t ld_v, double* x,
                             int64_t ld, int64_t columns) {
  for (int64_t q = size - 1; q-- > 0;) {
    if (tau[q] == 0) continue;
    const double* v = reflectors + q * ld_v;
    for (int64_t j = 0; j < columns; j += PAD) {
      constexpr int vectors = PAD / WL;
      vw along[vectors] = {}, other[vectors] = {};
      int64_t i = q + 1;
      for (; i + 1 < size; i += 2)
#pragma GCC unroll 2
        for (int k = 0; k < vectors; k++) {
          along[k] += v[i] * load_wide(x + i * ld + j + k * WL);
          other[k] += v[i + 1] * load_wide(x + (i + 1) * ld + j + k * WL);
        }
#pragma GCC unroll 2
      for (int k = 0; k < vectors; k++) {
        if (i < size) along[k] += v[i] * load_wide(x + i * ld + j + k * WL);
        along[k] = tau[q] * (along[k] + other[k]);
      }
      for (i = q + 1; i < size; i++)
#pragma GCC unroll 2
        for (int k = 0; k < vectors; k++)
          store(x + i * ld + j + k * WL, load_wide(x + i * ld + j + k * WL) - v[i] * along[k]);
    }
  }
}

}  // namespace

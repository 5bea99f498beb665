// Small symmetric matrices in float64: pivoted Cholesky factors, the reduction to a tridiagonal matrix, and rows that
// are made orthonormal. The eigenvalues of a tridiagonal matrix are in tridiagonal.h.
//
// Matrices have rows `ld` apart, a multiple of PAD; entries beyond their size are zero.
#pragma once
#include <algorithm>
#include <cmath>

#include "wide.h"

namespace {

// Copies the lower half of a symmetric matrix to its upper half, a few columns at a time: writing all of a column would
// touch more cache lines than a cache has for them.
inline void mirror(double* g, int64_t size, int64_t ld) {
  for (int64_t j = 0; j < size; j += WL)
    for (int64_t i = j + 1; i < size; i++)
      for (int64_t k = j; k < std::min(j + WL, i); k++) g[k * ld + i] = g[i * ld + k];
}

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

// X <- (I - tau1 v1 v1^T) (I - tau2 v2 v2^T) X for rows of `columns` numbers, a multiple of PAD, `ld` apart, from row
// `first` on, before which both v are 0. X is read for both products at once.
inline void apply_two(const double* v1, double tau1, const double* v2, double tau2, int64_t first, int64_t size,
                      double both, double* x, int64_t ld, int64_t columns) {
  constexpr int vectors = PAD / WL;
  for (int64_t j = 0; j < columns; j += PAD) {
    vw one[vectors] = {}, two[vectors] = {};
    for (int64_t i = first; i < size; i++)
#pragma GCC unroll 2
      for (int k = 0; k < vectors; k++) {
        const vw value = load_wide(x + i * ld + j + k * WL);
        one[k] += v1[i] * value;
        two[k] += v2[i] * value;
      }
#pragma GCC unroll 2
    for (int k = 0; k < vectors; k++) {
      two[k] = tau2 * two[k];
      one[k] = tau1 * (one[k] - both * two[k]);
    }
    for (int64_t i = first; i < size; i++)
#pragma GCC unroll 2
      for (int k = 0; k < vectors; k++) {
        double* const at = x + i * ld + j + k * WL;
        store(at, load_wide(at) - v1[i] * one[k] - v2[i] * two[k]);
      }
  }
}

// X <- Q X with Q from `tridiagonalize`; `columns` is a multiple of PAD.
inline void apply_reflectors(const double* reflectors, const double* tau, int64_t size, int64_t ld_v, double* x,
                             int64_t ld, int64_t columns) {
  // Reflector j begins at row j + 1; there are size - 1. The last of an odd number is applied as a pair with tau = 0.
  for (int64_t j = (size - 2) / 2 * 2; j >= 0 && size > 1; j -= 2) {
    const bool pair = j + 2 < size;
    const double *v1 = reflectors + j * ld_v, *v2 = pair ? v1 + ld_v : v1, tau2 = pair ? tau[j + 1] : 0;
    if (tau[j] == 0 && tau2 == 0) continue;
    apply_two(v1, tau[j], v2, tau2, j + 1, size, dot(v1, v2, ld_v), x, ld, columns);
  }
}

// Makes `count` rows of length about 1 that are nearly orthogonal orthonormal: X <- (3 I - X X^T) X / 2 until X X^T = I
// (Björck & Bowie, SIAM J. Numer. Anal. 1971), which changes each row as little as possible. Returns the rows, which
// are in `x` or in `other`, or null if they are too far from orthogonal. Rows are `ld` apart and followed by rows of
// zeros up to a multiple of PAD. `gram`: workspace of `ld` x `ld` numbers.
inline double* orthonormalize(double* x, double* other, int64_t count, int64_t size, int64_t ld, double* gram) {
  const int64_t rows = padded(count);
  for (int tries = 0; tries < 8; tries++) {
    std::memset(gram, 0, rows * ld * sizeof(double));
    add_row_products(x, rows, x, rows, ld, padded(size), true, gram, ld);
    double off = 0;  // |X X^T - I|^2
    for (int64_t i = 0; i < count; i++)
      for (int64_t j = 0; j <= i; j++) {
        const double wrong = gram[i * ld + j] - (i == j);
        off += (i == j ? 1 : 2) * wrong * wrong;
        gram[i * ld + j] = (i == j) - 0.5 * wrong;
      }
    if (!(off < 0.25)) return nullptr;
    mirror(gram, count, ld);
    combine(gram, ld, rows, count, x, ld, padded(size), other, ld);
    std::swap(x, other);
    if (off < 1e-14) return x;  // what is left is the square of 1e-7
  }
  return nullptr;
}

}  // namespace

// Small symmetric matrices in float64: pivoted Cholesky factors, and eigenvectors of the largest eigenvalues.
//
// Matrices are square arrays of rows `ld` apart, ld = padded(size); what stands behind their size is zero.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "wide.h"

namespace {

// G = L L^T with the largest pivot first, until none is above `tolerance`: row q of `lt` is column q of L. Returns how
// many there are. `left`: `ld` numbers of work.
inline int64_t pivoted_cholesky(const double* g, int64_t size, int64_t ld, double tolerance, double* lt, double* left) {
  for (int64_t r = 0; r < ld; r++) left[r] = r < size ? g[r * ld + r] : 0;  // -1 once a row has been the pivot
  for (int64_t k = 0; k < size; k++) {
    const int64_t p = std::max_element(left, left + size) - left;
    if (!(left[p] > tolerance)) return k;
    double* row = lt + k * ld;
    const double root = std::sqrt(left[p]);
    for (int64_t j = 0; j < ld; j += PAD) {
      vw acc[PAD / WL];
      for (int v = 0; v < PAD / WL; v++) acc[v] = load_wide(g + p * ld + j + v * WL);
      for (int64_t q = 0; q < k; q++)
        for (int v = 0; v < PAD / WL; v++) acc[v] -= lt[q * ld + p] * load_wide(lt + q * ld + j + v * WL);
      for (int v = 0; v < PAD / WL; v++) store(row + j + v * WL, acc[v] / root);
    }
    for (int64_t r = 0; r < size; r++) {
      if (left[r] < 0) row[r] = 0;
      left[r] = left[r] < 0 ? -1 : std::max(left[r] - row[r] * row[r], 0.0);
    }
    row[p] = root;
    left[p] = -1;
  }
  return size;
}

// Householder's reduction C = Q T Q^T, T of diagonal `d` and off-diagonal `e` (e[j] beside d[j] and d[j + 1]). Row j of
// `reflectors` is v of the j-th factor I - tau[j] v v^T of Q. C is destroyed. `p`: `ld` numbers of work.
inline void tridiagonalize(double* c, int64_t size, int64_t ld, double* d, double* e, double* reflectors, double* tau,
                           double* p) {
  for (int64_t j = 0; j < size; j++) {
    d[j] = c[j * ld + j];
    e[j] = tau[j] = 0;
    if (j + 1 >= size) return;
    double* v = reflectors + j * ld;
    const int64_t first = (j + 1) / WL * WL;
    for (int64_t i = 0; i < ld; i++) v[i] = i > j + 1 ? c[j * ld + i] : 0;
    const double head = c[j * ld + j + 1], tail = dot(v + first, v + first, ld - first);
    e[j] = head;
    if (!(tail > 0)) continue;
    e[j] = -std::copysign(std::sqrt(head * head + tail), head);
    v[j + 1] = head - e[j];
    tau[j] = -1 / (e[j] * v[j + 1]);  // 2 / v . v
    double along = 0;
    for (int64_t i = first; i < ld; i++) p[i] = 0;
    for (int64_t i = j + 1; i < size; i++) {
      p[i] = tau[j] * dot(c + i * ld + first, v + first, ld - first);
      along += p[i] * v[i];
    }
    along *= tau[j] / 2;
    for (int64_t i = first; i < ld; i += WL) store(p + i, load_wide(p + i) - along * load_wide(v + i));
    for (int64_t i = j + 1; i < size; i++) {
      double* row = c + i * ld;
      for (int64_t k = first; k < ld; k += WL)
        store(row + k, load_wide(row + k) - v[i] * load_wide(p + k) - p[i] * load_wide(v + k));
    }
  }
}

// Plane rotations in the order in which the QL algorithm makes them: a run is those of rows (i, i + 1), from i = last -
// 1 down to i = first.
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

// T = Z diag(d) Z^T by QL steps with implicit shifts (Bowdler et al., 1968), Z being the product of the rotations. `e`
// is destroyed.
inline void ql(double* d, double* e, int64_t size, Rotations& z) {
  double largest = 0;
  for (int64_t i = 0; i < size; i++) largest = std::max({largest, std::fabs(d[i]), std::fabs(e[i])});
  const double negligible = largest * 0x1p-53;  // an error of this size is that of any entry of the matrix
  for (int64_t l = 0; l < size; l++)
    for (int tries = 0; tries < 60; tries++) {
      int64_t m = l;
      while (m + 1 < size && std::fabs(e[m]) > negligible) m++;
      if (m == l) break;
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      g = d[m] - d[l] + e[l] / (g + std::copysign(std::sqrt(g * g + 1), g));
      double s = 1, c = 1, p = 0;
      const int64_t last = m;
      int64_t i = m - 1;
      for (; i >= l; i--) {
        const double f = s * e[i], b = c * e[i], r = std::sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r == 0) {  // the matrix falls apart here
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

// X <- Z X for rows of `columns` numbers (a multiple of WL), `ld` apart.
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

// X <- Q X, with Q of `tridiagonalize`.
inline void apply_reflectors(const double* reflectors, const double* tau, int64_t size, int64_t ld_v, double* x,
                             int64_t ld, int64_t columns) {
  for (int64_t q = size - 1; q-- > 0;) {
    if (tau[q] == 0) continue;
    const double* v = reflectors + q * ld_v;
    for (int64_t j = 0; j < columns; j += WL) {
      vw along = {};
      for (int64_t i = q + 1; i < size; i++) along += v[i] * load_wide(x + i * ld + j);
      along *= tau[q];
      for (int64_t i = q + 1; i < size; i++) store(x + i * ld + j, load_wide(x + i * ld + j) - v[i] * along);
    }
  }
}

}  // namespace

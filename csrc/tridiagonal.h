// Eigenvalues and eigenvectors, in float64, of a symmetric tridiagonal matrix T with diagonal `d` and off-diagonal `e`
// (e[j] is T[j][j + 1]).
//
// The largest eigenvalues are found by bisection and their eigenvectors from factorisations of T - lambda, each in a
// lane of its own. Vectors of eigenvalues that are nearly equal are then far from orthogonal; the caller finds that out
// and takes the QL algorithm instead, which computes all eigenvalues one after the other.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "wide.h"

namespace {

typedef uint64_t vwu __attribute__((vector_size(8 * WL)));
typedef int64_t vwi __attribute__((vector_size(8 * WL)));

constexpr int LANE_VECTORS = PAD / WL;

inline vw magnitude(vw x) { return x < 0 ? -x : x; }

// The largest magnitude among the elements of T.
inline double largest_element(const double* d, const double* e, int64_t size) {
  double largest = 0;
  for (int64_t i = 0; i < size; i++) largest = std::max({largest, std::fabs(d[i]), std::fabs(e[i])});
  return largest;
}

// Eigenvalues `at`, at + 1, ... of T in falling order, as many as lanes in so many `vectors`, by bisections of
// [low, high]. `squares`: of e[i - 1].
//
// The leading minors p_i of T - x, p_i = (d_i - x) p_(i-1) - e_(i-1)^2 p_(i-2), change their sign as often as T has
// eigenvalues below x. An element of T - x is at most 3: those of T are at most 1, on its diagonal none is below 0 but
// for rounding, and x is at most 2 away from one of these or from 0. So a minor is at most four times as large as the
// two before it, and where no e^2 is below 1e-40, two minors are at least 1e-41 times as large as the two before them:
// a look at every eighth keeps them in range.
template <int vectors>
inline void bisect(const double* d, const double* squares, int64_t size, int64_t at, double low, double high,
                   double* values) {
  constexpr double SMALL = 1e-100, LARGE = 1e100;
  vw lower[vectors], upper[vectors];
  vwi rank[vectors];
  for (int v = 0; v < vectors; v++) {
    lower[v] = low - vw{};
    upper[v] = high - vw{};
    for (int l = 0; l < WL; l++) rank[v][l] = at + v * WL + l;
  }
  for (int halving = 0; halving < 52; halving++) {
    vw x[vectors], last[vectors], now[vectors];
    vwu changes[vectors];
    for (int v = 0; v < vectors; v++) {
      x[v] = 0.5 * (lower[v] + upper[v]);
      last[v] = 1 - vw{};
      now[v] = d[0] - x[v];
      changes[v] = (vwu)now[v] >> 63;
    }
    const auto next = [&](int64_t i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        const vw minor = (d[i] - x[v]) * now[v] - squares[i] * last[v];
        changes[v] += ((vwu)minor ^ (vwu)now[v]) >> 63;
        last[v] = now[v];
        now[v] = minor;
      }
    };
    int64_t i = 1;
    for (; i + 8 <= size; i += 8) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) next(i + k);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        const vw one = magnitude(last[v]), other = magnitude(now[v]), most = one > other ? one : other;
        const vw scale = most < SMALL ? LARGE * LARGE - vw{} : (most > LARGE ? SMALL * SMALL - vw{} : 1 - vw{});
        last[v] *= scale;
        now[v] *= scale;
      }
    }
    for (; i < size; i++) next(i);
    for (int v = 0; v < vectors; v++) {
      const vwi above = size - (vwi)changes[v];
      lower[v] = above > rank[v] ? x[v] : lower[v];
      upper[v] = above > rank[v] ? upper[v] : x[v];
    }
  }
  for (int v = 0; v < vectors; v++) store(values + at + v * WL, 0.5 * (lower[v] + upper[v]));
}

// The `count` largest eigenvalues of T in falling order. `values`: room for `count` numbers, rounded up to a multiple
// of PAD. `work`: 2 `size` numbers.
inline void largest_eigenvalues(const double* d, const double* e, int64_t size, int64_t count, double* values,
                                double* work) {
  const double unit = largest_element(d, e, size);
  double *diagonal = work, *squares = work + size, low = 0, high = 0;  // of T / unit
  for (int64_t i = 0; i < size && unit > 0; i++) {
    const double before = i > 0 ? e[i - 1] / unit : 0, after = i + 1 < size ? e[i] / unit : 0;
    const double radius = std::fabs(before) + std::fabs(after);
    diagonal[i] = d[i] / unit;
    squares[i] = std::max(before * before, 1e-40);
    low = std::min(low, diagonal[i] - radius);
    high = std::max(high, diagonal[i] + radius);
  }
  const int64_t room = padded(count);
  for (int64_t at = 0; at < room && unit > 0;) {
    const bool two = at + 2 * PAD <= room;  // more at a time, so that their operations overlap
    if (two)
      bisect<2 * PAD / WL>(diagonal, squares, size, at, low, high, values);
    else
      bisect<PAD / WL>(diagonal, squares, size, at, low, high, values);
    at += two ? 2 * PAD : PAD;
  }
  for (int64_t i = 0; i < room; i++) values[i] = unit > 0 ? unit * values[i] : 0;
}

// Column k of X, `size` rows `ld` apart, becomes the eigenvector of length 1 of values[k]. Of a value that is nearly
// another one, it may be that one's vector too. `count` is a multiple of PAD. `work`: 2 `size` PAD numbers.
//
// With T - lambda = L D L^T from above and U D' U^T from below, the vector that is 1 at i and solves all equations but
// the i-th has the residual gamma_i = D_i + D'_i - (d_i - lambda) there; the i of the smallest is taken (Parlett &
// Dhillon, "Fernando's solution to Wilkinson's problem", 1997).
inline void eigenvectors(const double* d, const double* e, int64_t size, const double* values, int64_t count, double* x,
                         int64_t ld, double* work) {
  const double tiny = 1e-150 * largest_element(d, e, size);
  const auto pivot = [&](vw p) { return magnitude(p) < tiny ? tiny - vw{} : p; };
  double *l = work, *u = work + size * PAD;  // off-diagonals of L and U
  for (int64_t at = 0; at < count; at += PAD) {
    vw value[LANE_VECTORS], quotient[LANE_VECTORS] = {}, least[LANE_VECTORS], squares[LANE_VECTORS] = {};
    vwi twist[LANE_VECTORS] = {};
    for (int v = 0; v < LANE_VECTORS; v++) value[v] = load_wide(values + at + v * WL);
    for (int64_t i = 0; i < size; i++)
#pragma GCC unroll 2
      for (int v = 0; v < LANE_VECTORS; v++) {
        const vw p = d[i] - value[v] - (i > 0 ? e[i - 1] : 0) * quotient[v];
        quotient[v] = e[i] / pivot(p);
        store(l + i * PAD + v * WL, quotient[v]);
      }
    for (int v = 0; v < LANE_VECTORS; v++) quotient[v] = vw{};
    for (int64_t i = size; i-- > 0;)
#pragma GCC unroll 2
      for (int v = 0; v < LANE_VECTORS; v++) {
        const double before = i > 0 ? e[i - 1] : 0;
        const vw p = d[i] - value[v] - e[i] * quotient[v];
        const vw above = i > 0 ? load_wide(l + (i - 1) * PAD + v * WL) : vw{};
        const vw residual = magnitude(p - before * above);
        const vwi smaller = i + 1 == size ? residual == residual : residual < least[v];
        least[v] = smaller ? residual : least[v];
        twist[v] = smaller ? i - vwi{} : twist[v];
        quotient[v] = before / pivot(p);
        store(u + i * PAD + v * WL, quotient[v]);
      }
    vw z[LANE_VECTORS] = {};
    for (int64_t i = size; i-- > 0;)
#pragma GCC unroll 2
      for (int v = 0; v < LANE_VECTORS; v++) {
        const vw from_below = -load_wide(l + i * PAD + v * WL) * z[v];
        z[v] = twist[v] > i ? from_below : (twist[v] == i ? 1 - vw{} : vw{});
        store(x + i * ld + at + v * WL, z[v]);
      }
    for (int v = 0; v < LANE_VECTORS; v++) z[v] = vw{};
    for (int64_t i = 0; i < size; i++)
#pragma GCC unroll 2
      for (int v = 0; v < LANE_VECTORS; v++) {
        double* const to = x + i * ld + at + v * WL;
        const vw from_above = -load_wide(u + i * PAD + v * WL) * z[v];
        z[v] = twist[v] < i ? from_above : load_wide(to);
        squares[v] += z[v] * z[v];
        store(to, z[v]);
      }
    for (int v = 0; v < LANE_VECTORS; v++)
      for (int lane = 0; lane < WL; lane++) squares[v][lane] = 1 / std::sqrt(squares[v][lane]);
    for (int64_t i = 0; i < size; i++)
      for (int v = 0; v < LANE_VECTORS; v++) {
        double* const to = x + i * ld + at + v * WL;
        store(to, load_wide(to) * squares[v]);
      }
  }
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
};

// Rotations Z after which element l of T's diagonal is an eigenvalue, decoupled from the others: QL steps with implicit
// shifts (Bowdler et al., 1968). Off-diagonal elements up to `negligible` count as zero.
inline void split_first(double* d, double* e, int64_t size, int64_t l, double negligible, Rotations& z) {
  for (int tries = 0; tries < 60; tries++) {
    int64_t m = l;
    while (m + 1 < size && std::fabs(e[m]) > negligible) m++;
    if (m == l) return;
    const double apart = (d[l + 1] - d[l]) / (2 * e[l]);
    double g = d[m] - d[l] + e[l] / (apart + std::copysign(std::sqrt(apart * apart + 1), apart));
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

// T <- Z^T T Z, diagonal; then the columns of Z are eigenvectors. `e` is overwritten.
inline void diagonalize(double* d, double* e, int64_t size, Rotations& z) {
  const double negligible = largest_element(d, e, size) * 0x1p-53;
  z.clear();
  for (int64_t l = 0; l < size; l++) split_first(d, e, size, l, negligible, z);
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

}  // namespace

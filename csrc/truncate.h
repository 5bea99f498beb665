// From the Gram matrices of factors A, B of D = B^T A to the factors of its largest singular values.
//
// With A A^T = L L^T, the eigenvalues of C = L^T (B B^T) L are the squares of D's singular values s. With C's
// eigenvectors V, U = B^T L V / s are D's left singular vectors, orthonormal even if L is rounded, and D^T U / s = A^T
// (B B^T) L V / s^2 the right ones; no matrix is inverted. Rows are first scaled to equal lengths in A and in B, which
// leaves D unchanged, so that large rows of one factor do not hide large rows of the other.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "eigen.h"
#include "tridiagonal.h"
#include "wide.h"

namespace {

constexpr double NEGLIGIBLE = 1e-15;  // relative to the largest square

// The truncation of one slot. Its memory is used again for later slots. Matrices have `ld` columns.
struct Truncation {
  Wide factor_a, factor_b;  // padded(kept) x ld: the new rows are these times the old ones
  double gone;              // |change of D|_F, the part that was cut off
  bool finite;              // whether all rows are finite; if not, nothing else is set

  // `ga`, `gb`: the lower halves of A A^T and B B^T, which are overwritten. `kept` of `size` rows stay.
  void make(double* ga, double* gb, int64_t size, int64_t ld, int64_t kept);

 private:
  Wide work_;
  Rotations rotations_;
  std::vector<int64_t> order_;

  bool balance(double* ga, double* gb, int64_t size, int64_t ld, double* scale_a, double* scale_b, double* largest);
  void by_rotations(double* d, double* e, int64_t size, int64_t kept, double* x, int64_t width, double* values);
};

// The first `count` columns of X, `size` rows of `width` numbers, become rows that are `ld` apart; up to padded(count)
// and `ld`, zeros follow.
inline void transpose(const double* x, int64_t size, int64_t width, int64_t count, double* rows, int64_t ld) {
  std::memset(rows, 0, padded(count) * ld * sizeof(double));
  // A few columns at a time: writing all of a row of X would touch more cache lines than a cache has for them.
  for (int64_t i = 0; i < count; i += WL)
    for (int64_t q = 0; q < size; q++)
      for (int64_t k = i; k < std::min(i + WL, count); k++) rows[k * ld + q] = x[q * width + k];
}

// Scales row r of A by scale_a[r] and that of B by scale_b[r], to equal lengths of at most 1, so that D becomes
// D / `largest`. False if some row is not finite.
inline bool Truncation::balance(double* ga, double* gb, int64_t size, int64_t ld, double* scale_a, double* scale_b,
                                double* largest) {
  *largest = 0;
  for (int64_t r = 0; r < size; r++) {
    const double norm_a = std::sqrt(ga[r * ld + r]), norm_b = std::sqrt(gb[r * ld + r]);
    if (!std::isfinite(norm_a) || !std::isfinite(norm_b)) return false;
    const bool empty = norm_a == 0 || norm_b == 0;
    scale_a[r] = empty ? 0 : std::sqrt(norm_b / norm_a);
    scale_b[r] = empty ? 0 : std::sqrt(norm_a / norm_b);
    *largest = std::max(*largest, norm_a * norm_b);
  }
  const double unit = *largest > 0 ? std::sqrt(*largest) : 1;
  for (int64_t i = 0; i < size; i++) {
    scale_a[i] /= unit;
    scale_b[i] /= unit;
    for (int64_t j = 0; j <= i; j++) {
      ga[i * ld + j] = ga[i * ld + j] * scale_a[i] * scale_a[j];
      gb[i * ld + j] = gb[i * ld + j] * scale_b[i] * scale_b[j];
    }
  }
  mirror(ga, size, ld);
  mirror(gb, size, ld);
  return true;
}

// The `kept` largest eigenvalues of the tridiagonal matrix, and their eigenvectors as columns of X, `size` rows of
// `width` numbers.
inline void Truncation::by_rotations(double* d, double* e, int64_t size, int64_t kept, double* x, int64_t width,
                                     double* values) {
  diagonalize(d, e, size, rotations_);
  order_.resize(size);
  for (int64_t i = 0; i < size; i++) order_[i] = i;
  std::stable_sort(order_.begin(), order_.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
  std::memset(x, 0, size * width * sizeof(double));
  for (int64_t i = 0; i < kept; i++) {
    values[i] = d[order_[i]];
    x[order_[i] * width + i] = 1;
  }
  apply_rotations(rotations_, x, width, width);
}

inline void Truncation::make(double* ga, double* gb, int64_t size, int64_t ld, int64_t kept) {
  const int64_t square = ld * ld, width = padded(kept);
  work_.need(4 * square + 2 * width * ld + 2 * ld * PAD + 9 * ld);
  double *lt = work_.get(), *t = lt + square, *c = t + square, *reflectors = c + square;
  double *x = reflectors + square, *vectors = x + width * ld, *spare = vectors + width * ld;
  double *d = spare + 2 * ld * PAD, *e = d + ld, *tau = e + ld, *values = tau + ld;
  double *scale_a = values + ld, *scale_b = scale_a + ld, largest;
  factor_a.need(width * ld);
  factor_b.need(width * ld);
  gone = 0;
  finite = balance(ga, gb, size, ld, scale_a, scale_b, &largest);
  if (!finite) return;
  std::memset(factor_a.get(), 0, width * ld * sizeof(double));
  std::memset(factor_b.get(), 0, width * ld * sizeof(double));
  std::memset(lt, 0, square * sizeof(double));
  const int64_t count = pivoted_cholesky(ga, size, ld, NEGLIGIBLE, lt, spare), found = std::min(kept, count);
  if (count == 0) return;
  combine(lt, ld, padded(count), size, gb, ld, padded(size), t, ld);  // L^T (B B^T)
  std::memset(c, 0, padded(count) * ld * sizeof(double));
  add_row_products(t, padded(count), lt, padded(count), ld, padded(size), true, c, ld);
  for (int64_t i = 0; i < count; i++) std::memset(c + i * ld + count, 0, (ld - count) * sizeof(double));
  mirror(c, count, ld);
  tridiagonalize(c, count, ld, d, e, reflectors, tau, spare);

  double all = 0;  // the sum of the squares of all singular values, a trace
  for (int64_t i = 0; i < count; i++) all += d[i];
  const auto rank = [&] {
    int64_t i = 0;
    while (i < found && values[i] > std::max(NEGLIGIBLE * values[0], 0.0)) i++;
    return i;
  };
  largest_eigenvalues(d, e, count, found, values, spare);
  int64_t live = rank();
  eigenvectors(d, e, count, values, padded(live), x, width, spare);
  apply_reflectors(reflectors, tau, count, ld, x, width, padded(live));
  transpose(x, count, width, live, vectors, ld);
  if (double* found_there = orthonormalize(vectors, x, live, count, ld, c)) {
    vectors = found_there;
  } else {
    by_rotations(d, e, count, found, x, width, values);
    live = rank();
    apply_reflectors(reflectors, tau, count, ld, x, width, padded(live));
    transpose(x, count, width, live, vectors, ld);
  }
  combine(vectors, ld, padded(live), count, t, ld, padded(size), factor_a.get(), ld);
  combine(vectors, ld, padded(live), count, lt, ld, padded(size), factor_b.get(), ld);

  const double unit = std::sqrt(largest);
  double dropped = found < count ? all : 0;
  for (int64_t i = 0; i < found && found < count; i++) dropped -= values[i];
  for (int64_t i = 0; i < live; i++) {
    const double value = std::sqrt(values[i]), by_b = unit * std::sqrt(value) / value, by_a = by_b / value;
    for (int64_t r = 0; r < size; r++) {
      factor_a.get()[i * ld + r] *= by_a * scale_a[r];
      factor_b.get()[i * ld + r] *= by_b * scale_b[r];
    }
  }
  // Less than the rounding errors of so many numbers of that sum is nothing: `lost` counts as 0 what a truncation
  // leaves out if its norm is at most sqrt(2^-52 `count`) of that of the whole product, 1.7e-7 for 128 rows.
  gone = largest * std::sqrt(dropped > 0x1p-52 * count * all ? dropped : 0);
}

}  // namespace

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
};

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
      ga[i * ld + j] = ga[j * ld + i] = ga[i * ld + j] * scale_a[i] * scale_a[j];
      gb[i * ld + j] = gb[j * ld + i] = gb[i * ld + j] * scale_b[i] * scale_b[j];
    }
  }
  return true;
}

inline void Truncation::make(double* ga, double* gb, int64_t size, int64_t ld, int64_t kept) {
  const int64_t square = ld * ld, width = padded(kept);
  work_.need(4 * square + 2 * width * ld + 7 * ld);
  double *lt = work_.get(), *t = lt + square, *c = t + square, *reflectors = c + square;
  double *x = reflectors + square, *xt = x + width * ld;
  double *d = xt + width * ld, *e = d + ld, *tau = e + ld, *scale_a = tau + ld, *scale_b = scale_a + ld;
  double *spare = scale_b + ld, largest;
  factor_a.need(width * ld);
  factor_b.need(width * ld);
  gone = 0;
  finite = balance(ga, gb, size, ld, scale_a, scale_b, &largest);
  if (!finite) return;
  std::memset(lt, 0, square * sizeof(double));
  const int64_t count = pivoted_cholesky(ga, size, ld, NEGLIGIBLE, lt, spare);
  if (count == 0) {
    std::memset(factor_a.get(), 0, width * ld * sizeof(double));
    std::memset(factor_b.get(), 0, width * ld * sizeof(double));
    return;
  }
  combine(lt, ld, padded(count), size, gb, ld, padded(size), t, ld);  // L^T (B B^T)
  std::memset(c, 0, padded(count) * ld * sizeof(double));
  add_row_products(t, padded(count), lt, padded(count), ld, padded(size), true, c, ld);
  for (int64_t i = 0; i < count; i++) {
    for (int64_t j = 0; j < i; j++) c[j * ld + i] = c[i * ld + j];
    for (int64_t j = count; j < ld; j++) c[i * ld + j] = 0;
  }
  tridiagonalize(c, count, ld, d, e, reflectors, tau, spare);
  rotations_.clear();
  const int64_t found = diagonalize(d, e, count, kept, spare, rotations_);

  order_.resize(found);
  for (int64_t i = 0; i < found; i++) order_[i] = i;
  std::stable_sort(order_.begin(), order_.end(), [&](int64_t i, int64_t j) { return d[i] > d[j]; });
  const double floor = NEGLIGIBLE * d[order_[0]];
  const auto singular = [&](int64_t i) { return i < found && d[order_[i]] > floor ? std::sqrt(d[order_[i]]) : 0.0; };
  std::memset(x, 0, count * width * sizeof(double));
  for (int64_t i = 0; i < std::min(kept, found); i++) x[order_[i] * width + i] = 1;
  apply_rotations(rotations_, x, width, width);
  apply_reflectors(reflectors, tau, count, ld, x, width, width);
  std::memset(xt, 0, width * ld * sizeof(double));
  for (int64_t q = 0; q < count; q++)
    for (int64_t i = 0; i < kept; i++) xt[i * ld + q] = x[q * width + i];
  combine(xt, ld, width, count, t, ld, padded(size), factor_a.get(), ld);
  combine(xt, ld, width, count, lt, ld, padded(size), factor_b.get(), ld);

  const double unit = std::sqrt(largest);
  double dropped = 0;                                       // sum of squares
  for (int64_t i = found; i < count; i++) dropped += d[i];  // of a trace: the eigenvalues that were not computed
  for (int64_t i = kept; i < found; i++) dropped += d[order_[i]];
  for (int64_t i = 0; i < kept; i++) {
    const double value = singular(i);
    const double by_b = value > 0 ? unit * std::sqrt(value) / value : 0, by_a = value > 0 ? by_b / value : 0;
    for (int64_t r = 0; r < size; r++) {
      factor_a.get()[i * ld + r] *= by_a * scale_a[r];
      factor_b.get()[i * ld + r] *= by_b * scale_b[r];
    }
  }
  gone = largest * std::sqrt(dropped > floor ? dropped : 0);
}

}  // namespace

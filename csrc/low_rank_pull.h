// The pull of a user's factors to the anchor, A diag(q) and B diag(p), for the importance Omega = rho kappa^T. The
// formula is in ttt.ops.low_rank_compress.
#pragma once
#include <algorithm>
#include <cmath>

#include "api.h"
#include "product.h"
#include "wide.h"

namespace {

constexpr int64_t BLOCK_COLUMNS = 128;  // columns of the new rows that are computed at a time
static_assert(BLOCK_COLUMNS % NC == 0);

struct Pull {
  const bool on;
  const int64_t m, n;
  Wide rho, kappa;  // followed by zeros
  double highest_rho = 0, highest_kappa = 0;

  explicit Pull(const ttt::LowRankCompress& a) : on(a.lam > 0), m(a.m), n(a.n) {
    if (!on) return;
    rho.need(wide(m));
    kappa.need(wide(n));
    widen(a.importance_m, m, wide(m), rho.get());
    widen(a.importance_n, n, wide(n), kappa.get());
    for (int64_t i = 0; i < m; i++) highest_rho = std::max<double>(highest_rho, a.importance_m[i]);
    for (int64_t j = 0; j < n; j++) highest_kappa = std::max<double>(highest_kappa, a.importance_n[j]);
  }

  // Four matrices of `rows` x `rows`: A A^T, A diag(kappa) A^T, B B^T, B diag(rho) B^T.
  static double* gram(double* grams, int64_t rows, bool of_a, bool weighted) {
    return grams + ((of_a ? 0 : 2) + (weighted ? 1 : 0)) * rows * rows;
  }

  // Computes row `i` of the two matrices of one factor, and its mirror image.
  void weigh(bool of_a, const double* own, int64_t rows, int64_t i, double* grams) const {
    const int64_t width = wide(of_a ? n : m);
    const double *weight = (of_a ? kappa : rho).get(), *left = own + i * width;
    double *plain = gram(grams, rows, of_a, false), *weighted = gram(grams, rows, of_a, true);
    for (int64_t r = 0; r <= i; r++) {
      vw sums = {}, weighted_sums = {};
      for (int64_t j = 0; j < width; j += WL) {
        const vw square = load_wide(left + j) * load_wide(own + r * width + j);
        sums += square;
        weighted_sums += square * load_wide(weight + j);
      }
      plain[i * rows + r] = plain[r * rows + i] = sum(sums);
      weighted[i * rows + r] = weighted[r * rows + i] = sum(weighted_sums);
    }
  }

  // Multiplies a block of columns of `own` by q or p.
  void apply(bool of_a, const double* own, int64_t rows, int64_t first, double strength, const double* grams,
             double* out) const {
    const int64_t width = wide(of_a ? n : m);
    const double* plain = gram(const_cast<double*>(grams), rows, !of_a, false);
    const double* weighted = gram(const_cast<double*>(grams), rows, !of_a, true);
    const double* weight = (of_a ? kappa : rho).get() + first;
    const double highest = of_a ? highest_rho : highest_kappa;
    for (int64_t j = 0; j < BLOCK_COLUMNS && first + j < width; j += WL) {
      const double* at = own + first + j;
      vw total = {}, part = {};
      for (int64_t i = 0; i < rows; i++) {
        vw x = {}, y = {};
        for (int64_t r = 0; r < rows; r++) {
          const vw v = load_wide(at + r * width);
          x += plain[i * rows + r] * v;
          y += weighted[i * rows + r] * v;
        }
        total += x * load_wide(at + i * width);
        part += y * load_wide(at + i * width);
      }
      double shrink[WL];
      for (int l = 0; l < WL; l++) {
        // In a column of very small numbers the mean consists of rounding errors.
        const double mean = total[l] > 0 ? std::min(std::max(part[l] / total[l], 0.0), highest) : 0.0;
        shrink[l] = 1 / std::sqrt(1 + strength * weight[j + l] * mean);
      }
      for (int64_t i = 0; i < rows; i++)
        store(out + i * BLOCK_COLUMNS + j, load_wide(at + i * width) * load_as<vw>(shrink));
    }
  }
};

}  // namespace

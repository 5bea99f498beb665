// The inner layer norm of memories that learn: `normed` and `loss_gradient` of ttt/ops/sequence/dual_form.py.
#pragma once
#include <algorithm>
#include <cmath>

#include "sequence_product.h"

namespace {

// The inner norm of a head. Its parameters and all rows are `wide` = whole_vectors(width) long, with zeros behind the
// last column. Rows are taken VL at a time, so that one vector holds their means, or other sums.
class InnerNorm {
 public:
  InnerNorm(const float* weight, const float* bias, float eps, int64_t width)
      : weight(weight), bias(bias), eps(eps), width(width), wide(whole_vectors(width)), inside() {
    for (int64_t l = 0; l < VL; l++) inside[l] = wide - VL + l < width ? ~0u : 0u;
  }

  // Each row of z becomes its `rate` times the gradient of |x + LN(z) - v|^2 / 2 by z. Rates are `rate_step` apart.
  void gradient(float* z, const float* x, const float* v, const float* rate, int64_t rate_step, int64_t rows) const {
    for (int64_t at = 0; at < rows; at += VL) {
      const int64_t some = std::min<int64_t>(VL, rows - at);
      gradient_of_some(z + at * wide, x + at * wide, v + at * wide, rate + at * rate_step, rate_step, some);
    }
  }

  // Each row of z becomes x + LN(z).
  void apply(float* z, const float* x, int64_t rows) const {
    for (int64_t at = 0; at < rows; at += VL)
      apply_to_some(z + at * wide, x + at * wide, std::min<int64_t>(VL, rows - at));
  }

 private:
  const float *weight, *bias;
  float eps;
  int64_t width, wide;
  vu inside;  // which lanes of the last vector of a row are columns

  // One vector of a row, zeros behind the last column.
  vf cut(vf values, int64_t j) const { return j + VL < wide ? values : (vf)((vu)values & inside); }

  // The mean and the inverse deviation of each row.
  void moments(const float* z, int64_t rows, float* mean, float* inverse) const {
    float parts[VL * VL];
    for (int64_t r = 0; r < rows; r++) {
      vf total = {};
      for (int64_t j = 0; j < wide; j += VL) total += load(z + r * wide + j);
      store(parts + r * VL, total);
    }
    store(mean, sums_of_rows(parts, rows) / splat(width));
    for (int64_t r = 0; r < rows; r++) {
      vf square = {};
      for (int64_t j = 0; j < wide; j += VL) {
        const vf centred = cut(load(z + r * wide + j) - splat(mean[r]), j);
        square += centred * centred;
      }
      store(parts + r * VL, square);
    }
    store(inverse, sums_of_rows(parts, rows) / splat(width));
    for (int64_t r = 0; r < rows; r++) inverse[r] = 1.0f / std::sqrt(inverse[r] + eps);
  }

  void gradient_of_some(float* z, const float* x, const float* v, const float* rate, int64_t rate_step,
                        int64_t rows) const {
    float mean[VL], inverse[VL], totals[VL * VL], alongs[VL * VL];
    moments(z, rows, mean, inverse);
    for (int64_t r = 0; r < rows; r++) {
      vf total = {}, along = {};
      for (int64_t j = 0; j < wide; j += VL) {
        const int64_t i = r * wide + j;
        const vf plain = (load(z + i) - splat(mean[r])) * splat(inverse[r]), w = load(weight + j);
        const vf d = (plain * w + load(bias + j) + load(x + i) - load(v + i)) * w;
        total += d;
        along += d * plain;
      }
      store(totals + r * VL, total);
      store(alongs + r * VL, along);
    }
    float mean_d[VL], mean_along[VL];
    store(mean_d, sums_of_rows(totals, rows) / splat(width));
    store(mean_along, sums_of_rows(alongs, rows) / splat(width));
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < wide; j += VL) {
        const int64_t i = r * wide + j;
        const vf plain = (load(z + i) - splat(mean[r])) * splat(inverse[r]), w = load(weight + j);
        const vf d = (plain * w + load(bias + j) + load(x + i) - load(v + i)) * w;
        const vf change = (d - splat(mean_d[r]) - plain * splat(mean_along[r]));
        store(z + i, cut(change * splat(rate[r * rate_step] * inverse[r]), j));
      }
  }

  void apply_to_some(float* z, const float* x, int64_t rows) const {
    float mean[VL], inverse[VL];
    moments(z, rows, mean, inverse);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < wide; j += VL) {
        const int64_t i = r * wide + j;
        const vf plain = (load(z + i) - splat(mean[r])) * splat(inverse[r]);
        store(z + i, load(x + i) + plain * load(weight + j) + load(bias + j));
      }
  }
};

}  // namespace

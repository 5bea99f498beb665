// The inner layer norm of memories that learn: `normed` and `loss_gradient` of ttt/ops/sequence/dual_form.py, and their
// derivatives.
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

  // Each row of z becomes (z - mean) / deviation, and `inverse` holds 1 / deviation of each.
  void standardise(float* z, float* inverse, int64_t rows) const {
    for (int64_t at = 0; at < rows; at += VL) {
      float mean[VL], found[VL];
      const int64_t some = std::min<int64_t>(VL, rows - at);
      moments(z + at * wide, some, mean, found);
      for (int64_t r = 0; r < some; r++) {
        float* row = z + (at + r) * wide;
        inverse[at + r] = found[r];
        for (int64_t j = 0; j < wide; j += VL)
          store(row + j, cut((load(row + j) - splat(mean[r])) * splat(found[r]), j));
      }
    }
  }

  // d, the gradient of LN(z), becomes that of z. `plain` and `inverse` are what `standardise` finds; the gradients of
  // weight and bias are added to d_weight and d_bias, `wide` numbers each.
  void backward(const float* plain, const float* inverse, float* d, float* d_weight, float* d_bias,
                int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) {
      const float* x = plain + r * wide;
      float* to = d + r * wide;
      vf total = {}, along = {};
      for (int64_t j = 0; j < wide; j += VL) {
        const vf given = load(to + j), by_plain = given * load(weight + j);
        store(d_weight + j, load(d_weight + j) + given * load(x + j));
        store(d_bias + j, load(d_bias + j) + given);
        total += by_plain;
        along += by_plain * load(x + j);
        store(to + j, by_plain);
      }
      project(x, inverse[r], sum(total), sum(along), to);
    }
  }

  // d, the gradient of what `gradient` finds of z, becomes that of z. d_k becomes that of x, which is minus that of v,
  // and d_rate that of the rates.
  void gradient_backward(const float* plain, const float* inverse, const float* k, const float* v, const float* rate,
                         int64_t rate_step, float* d, float* d_k, float* d_rate, float* d_weight, float* d_bias,
                         int64_t rows) const {
    const float count = static_cast<float>(width);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t i = r * wide;
      vf sums[5] = {};  // of u = y w, u x, d, d x and d u, with y = LN(z) + k - v and x the standardised z
      for (int64_t j = 0; j < wide; j += VL) {
        const vf x = load(plain + i + j), w = load(weight + j), given = load(d + i + j);
        const vf u = (x * w + load(bias + j) + load(k + i + j) - load(v + i + j)) * w;
        sums[0] += u;
        sums[1] += u * x;
        sums[2] += given;
        sums[3] += given * x;
        sums[4] += given * u;
      }
      const float mean_u = sum(sums[0]) / count, mean_ux = sum(sums[1]) / count, total = sum(sums[2]);
      const float along = sum(sums[3]), by = rate[r * rate_step], inv = inverse[r];
      const float of_rate = inv * (sum(sums[4]) - total * mean_u - along * mean_ux);
      d_rate[r * rate_step] = of_rate;
      vf total_x = {}, along_x = {};
      for (int64_t j = 0; j < wide; j += VL) {
        const vf x = load(plain + i + j), w = load(weight + j), given = splat(by) * load(d + i + j);
        const vf y = x * w + load(bias + j) + load(k + i + j) - load(v + i + j);
        const vf d_u = splat(inv) * (given - splat(by * total / count) - x * splat(by * along / count));
        const vf d_y = d_u * w;
        const vf d_x = d_y * w - splat(inv) * (given * splat(mean_ux) + y * w * splat(by * along / count));
        store(d_weight + j, load(d_weight + j) + d_u * y + d_y * x);
        store(d_bias + j, load(d_bias + j) + d_y);
        store(d_k + i + j, d_y);
        store(d + i + j, d_x);
        total_x += d_x;
        along_x += d_x * x;
      }
      // The last term: u is divided by the deviation, too.
      project(plain + i, inv, sum(total_x), sum(along_x) + by * of_rate, d + i);
    }
  }

 private:
  const float *weight, *bias;
  float eps;
  int64_t width, wide;
  vu inside;  // which lanes of the last vector of a row are columns

  // One vector of a row, zeros behind the last column.
  vf cut(vf values, int64_t j) const { return j + VL < wide ? values : (vf)((vu)values & inside); }

  // d, the gradient of a standardised row x, becomes that of the row; total and along: the sums of d and of d x.
  void project(const float* x, float inverse, float total, float along, float* d) const {
    const float count = static_cast<float>(width);
    for (int64_t j = 0; j < wide; j += VL) {
      const vf change = load(d + j) - splat(total / count) - load(x + j) * splat(along / count);
      store(d + j, cut(splat(inverse) * change, j));
    }
  }

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

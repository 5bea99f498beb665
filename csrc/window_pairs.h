// (x_t . X_c) (delta_t . D_c) for rows t and rows c of a window: how new gradients agree with the latest update
// (ttt/nn/feedback.py).
#pragma once
#include <algorithm>

#include "window_linear.h"

namespace {

template <class T>
void window_pairs(const ttt::WindowPairs& a) {
  const T *win_x = static_cast<const T*>(a.win_x), *win_delta = static_cast<const T*>(a.win_delta);
  std::fill(a.out, a.out + a.rows * a.window, 0.0f);
  std::vector<int64_t> live;  // a row whose weight is 0 is empty and is never read
  for (int64_t c = 0; c < a.window; c++)
    if (a.weight[c] != 0) live.push_back(c);
  if (a.rows == 0 || live.empty()) return;

  const Tokens<T> x(static_cast<const T*>(a.x), a.rows, a.n), delta(static_cast<const T*>(a.delta), a.rows, a.m);
  const int64_t x_stride = x.row(1) - x.row(0), delta_stride = delta.row(1) - delta.row(0);
  const int64_t count = static_cast<int64_t>(live.size());
  Scratch products(2 * 4 * a.rows * ((count + 3) / 4));
  const int threads = static_cast<double>(count) * a.rows * (a.m + a.n) < 65536 ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t c = 0; c < count; c += 4) {
    const int some = static_cast<int>(std::min<int64_t>(4, count - c));
    float *inputs = products.get() + 2 * c * a.rows, *outputs = inputs + 4 * a.rows;
    const T* row[4] = {};
    for (int r = 0; r < some; r++) row[r] = win_x + live[c + r] * a.n;
    dot_products_any(row, some, x.row(0), x_stride, a.n, a.rows, inputs, a.rows, 1);
    for (int r = 0; r < some; r++) row[r] = win_delta + live[c + r] * a.m;
    dot_products_any(row, some, delta.row(0), delta_stride, a.m, a.rows, outputs, a.rows, 1);
    for (int r = 0; r < some; r++)
      for (int64_t t = 0; t < a.rows; t++)
        a.out[t * a.window + live[c + r]] = inputs[r * a.rows + t] * outputs[r * a.rows + t];
  }
}

void run_window_pairs(const ttt::WindowPairs& a) {
  if (a.dtype == ttt::kF32)
    window_pairs<float>(a);
  else
    window_pairs<bf16>(a);
}

}  // namespace

// y = x W^T + b - ((x X^T) * eta) D for a few tokens: W is read once, as one stream per row.
// Where torch's matmul does the product (many tokens), only the window's part is subtracted here.
#pragma once
#include <omp.h>

#include "scratch.h"
#include "vec.h"

namespace {

// Dot products of one row with `tokens` vectors; four partial sums each hide the latency of the adds.
template <int tokens, class T>
inline void dots(const T* row, const float* x, int64_t n, float* out) {
  constexpr int unroll = tokens == 1 ? 8 : (tokens == 2 ? 4 : 2);
  vf acc[tokens][unroll] = {};
  int64_t j = 0;
  for (; j + unroll * VL <= n; j += unroll * VL) {
#pragma GCC unroll 8
    for (int u = 0; u < unroll; u++) {
      const vf w = load(row + j + u * VL);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) acc[t][u] += w * load(x + t * n + j + u * VL);
    }
  }
  for (; j < n; j += VL) {
    const int64_t count = n - j;
    const vf w = load_upto(row + j, count);
    for (int t = 0; t < tokens; t++) acc[t][0] += w * load_upto(x + t * n + j, count);
  }
  for (int t = 0; t < tokens; t++) {
    vf total = acc[t][0];
    for (int u = 1; u < unroll; u++) total += acc[t][u];
    out[t] = sum(total);
  }
}

template <class T>
inline void dots_any(const T* row, const float* x, int64_t n, int64_t tokens, float* out) {
  for (; tokens >= 4; tokens -= 4, x += 4 * n, out += 4) dots<4>(row, x, n, out);
  if (tokens == 3) dots<3>(row, x, n, out);
  if (tokens == 2) dots<2>(row, x, n, out);
  if (tokens == 1) dots<1>(row, x, n, out);
}

template <class T>
void window_linear(const ttt::WindowLinear& a) {
  const int64_t m = a.m, n = a.n, tokens = a.tokens;
  const T* x16 = static_cast<const T*>(a.x);
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const T* win_x = static_cast<const T*>(a.win_x);
  const T* win_delta = static_cast<const T*>(a.win_delta);
  T* y = static_cast<T*>(a.y);

  // The rows in use; a row with eta = 0 is empty and what stands in it is never read.
  Scratch live_scratch(a.window + 1);
  int* live = reinterpret_cast<int*>(live_scratch.get());
  int64_t rows = 0;
  for (int64_t c = 0; c < a.window; c++)
    if (a.win_eta[c] != 0) live[rows++] = static_cast<int>(c);
  if (tokens == 0 || (a.product_done && rows == 0)) return;

  Scratch x_scratch(sizeof(T) == 4 ? 0 : tokens * n);
  const float* x;
  if constexpr (sizeof(T) == 4) {
    x = x16;
  } else {
    float* wide = x_scratch.get();
    for (int64_t j = 0; j < tokens * n; j++) wide[j] = load1(x16 + j);
    x = wide;
  }
  Scratch coef_scratch(rows * tokens);
  float* coef = coef_scratch.get();  // rows x tokens: eta_c (x_t . X_c)
  const int64_t blocks = (m + VL - 1) / VL;
  Scratch y_scratch(blocks * VL * tokens);
  float* part = y_scratch.get();  // block, token, lane

  const double work =
      static_cast<double>(m) * n * (a.product_done ? 0 : 1) + static_cast<double>(rows) * tokens * (m + n);
  const int threads = work < 65536 ? 1 : a.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < rows; c++) {
      dots_any(win_x + live[c] * n, x, n, tokens, coef + c * tokens);
      for (int64_t t = 0; t < tokens; t++) coef[c * tokens + t] *= a.win_eta[live[c]];
    }
    // Shared machines lose a core at any moment: blocks are handed out as threads become free.
#pragma omp for schedule(dynamic, 8)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t i0 = block * VL, count = m - i0 < VL ? m - i0 : VL;
      float* out = part + block * VL * tokens;
      if (!a.product_done) {
        for (int64_t i = 0; i < count; i++) {
          float sums[64];
          for (int64_t t = 0; t < tokens; t += 64) {
            const int64_t some = tokens - t < 64 ? tokens - t : 64;
            dots_any(weight + (i0 + i) * n, x + t * n, n, some, sums);
            for (int64_t s = 0; s < some; s++) out[(t + s) * VL + i] = sums[s];
          }
        }
      }
      for (int64_t t = 0; t < tokens; t++) {
        T* to = y + t * m + i0;
        vf value = a.product_done ? load_upto(to, count) : load_upto(out + t * VL, count);
        if (!a.product_done && bias != nullptr) value += load_upto(bias + i0, count);
        for (int64_t c = 0; c < rows; c++)
          value -= coef[c * tokens + t] * load_upto(win_delta + live[c] * m + i0, count);
        T rounded[VL];
        store_nearest(rounded, value);
        std::memcpy(to, rounded, count * sizeof(T));
      }
    }
  }
}

void run_window_linear(const ttt::WindowLinear& a) {
  if (a.dtype == ttt::kF32)
    window_linear<float>(a);
  else
    window_linear<bf16>(a);
}

}  // namespace

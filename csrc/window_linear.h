// y = x W^T + b - ((x X^T) * eta) D for a few tokens: W is read once, as one stream per row.
// Where torch's matmul does the product (many tokens), only the window's part is subtracted here.
#pragma once
#include <omp.h>

#include "product.h"
#include "scratch.h"
#include "vec.h"

namespace {

// The tokens as the dot products want them: rows of `width` elements, zeros behind column n. As float32 in the order of
// the strips of T; where the processor multiplies pairs of bfloat16 (product.h), as they are.
template <class T>
struct Tokens {
  int64_t width;
  Scratch storage;

  Tokens(const T* x, int64_t tokens, int64_t n) : width((n + STRIP - 1) / STRIP * STRIP), storage(tokens * width) {
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t j = 0; j < width; j += STRIP) {
        float* to = row(t) + (dots<T> ? j / 2 : j);
        if constexpr (dots<T>) {
          std::memset(to, 0, STRIP * sizeof(T));
          std::memcpy(to, x + t * n + j, (n - j < STRIP ? n - j : STRIP) * sizeof(T));
        } else {
          const Two strip = load2_upto<splits<T>>(x + t * n + j, n - j);
          store(to, strip.a);
          store(to + VL, strip.b);
        }
      }
  }
  float* row(int64_t t) const { return storage.get() + t * (dots<T> ? width / 2 : width); }
};

// acc += one strip of a row of T times the same strip of a token, which begins at x.
template <class T>
inline void add_strip(vf& a, vf& b, const T* row, const float* x) {
#if TTT_DOT
  if constexpr (dots<T>) {
    a = (vf)_mm512_dpbf16_ps((__m512)a, (__m512bh)load_as<vu>(row), (__m512bh)load_as<vu>(x));
    return;
  }
#endif
  const Two w = load2<splits<T>>(row);
  a += w.a * load(x);
  b += w.b * load(x + VL);
}

// Dot products of one row with `tokens` tokens, the first at x; several partial sums hide the latency of the adds.
template <int tokens, class T>
inline void dot_products(const T* row, const float* x, int64_t stride, int64_t n, float* out) {
  constexpr int unroll = tokens == 1 ? 4 : (tokens == 2 ? 2 : 1);
  constexpr int step = dots<T> ? STRIP / 2 : STRIP;  // floats that a strip of a token takes
  vf acc[tokens][unroll][2] = {};
  int64_t j = 0;
  for (; j + unroll * STRIP <= n; j += unroll * STRIP, x += unroll * step) {
#pragma GCC unroll 4
    for (int u = 0; u < unroll; u++)
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++)
        add_strip(acc[t][u][0], acc[t][u][1], row + j + u * STRIP, x + t * stride + u * step);
  }
  for (; j < n; j += STRIP, x += step) {
    T part[STRIP] = {};
    std::memcpy(part, row + j, (n - j < STRIP ? n - j : STRIP) * sizeof(T));
    for (int t = 0; t < tokens; t++) add_strip(acc[t][0][0], acc[t][0][1], part, x + t * stride);
  }
  for (int t = 0; t < tokens; t++) {
    vf total = {};
    for (int u = 0; u < unroll; u++) total += acc[t][u][0] + acc[t][u][1];
    out[t] = sum(total);
  }
}

template <class T>
inline void dot_products_any(const T* row, const Tokens<T>& x, int64_t n, int64_t first, int64_t tokens, float* out) {
  const int64_t stride = x.row(1) - x.row(0), end = first + tokens;
  int64_t t = first;
  for (; t + 4 <= end; t += 4) dot_products<4>(row, x.row(t), stride, n, out + t - first);
  if (end - t == 3) dot_products<3>(row, x.row(t), stride, n, out + t - first);
  if (end - t == 2) dot_products<2>(row, x.row(t), stride, n, out + t - first);
  if (end - t == 1) dot_products<1>(row, x.row(t), stride, n, out + t - first);
}

template <class T>
void window_linear(const ttt::WindowLinear& a) {
  const int64_t m = a.m, n = a.n, tokens = a.tokens;
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

  const Tokens<T> x(static_cast<const T*>(a.x), tokens, n);
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
      dot_products_any(win_x + live[c] * n, x, n, 0, tokens, coef + c * tokens);
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
            dot_products_any(weight + (i0 + i) * n, x, n, t, some, sums);
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

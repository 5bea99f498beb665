// y = x W^T + b - ((x X^T) * eta) D for a few tokens: W is read once, as one stream per row.
// With many tokens torch's matmul makes the product, and only the window's part is subtracted here.
#pragma once
#include <omp.h>

#include <algorithm>

#include "product.h"
#include "scratch.h"
#include "vec.h"

namespace {

// The tokens, packed for the dot products: rows of `width` elements, with zeros from column n on. They are float32 in
// the order of the strips of T, or unconverted if the processor multiplies pairs of bfloat16 (product.h).
template <class T>
struct Tokens {
  int64_t width;
  Scratch storage;

  // `which`: the rows of x to pack; null for the first ones.
  Tokens(const T* x, int64_t tokens, int64_t n, const int* which = nullptr)
      : width((n + STRIP - 1) / STRIP * STRIP), storage(tokens * width) {
    for (int64_t t = 0; t < tokens; t++) {
      const T* from = x + (which == nullptr ? t : which[t]) * n;
      for (int64_t j = 0; j < width; j += STRIP) {
        float* to = row(t) + (dots<T> ? j / 2 : j);
        if constexpr (dots<T>) {
          std::memset(to, 0, STRIP * sizeof(T));
          std::memcpy(to, from + j, (n - j < STRIP ? n - j : STRIP) * sizeof(T));
        } else {
          const Two strip = load2_upto<splits<T>>(from + j, n - j);
          store(to, strip.a);
          store(to + VL, strip.b);
        }
      }
    }
  }
  float* row(int64_t t) const { return storage.get() + t * (dots<T> ? width / 2 : width); }
};

// acc + one strip of a row of T times the same strip of a token at x.
template <class T>
inline vf add_strip(vf acc, const T* row, const float* x) {
#if TTT_DOT
  if constexpr (dots<T>) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)load_as<vu>(row), (__m512bh)load_as<vu>(x));
#endif
  const Two w = load2<splits<T>>(row);
  return acc + w.a * load(x) + w.b * load(x + VL);
}

// out[r * 4 + t] = row r . token t, with the first token at x. The rows are prefetched `ahead` bytes before they are
// read, into the cache of `level`. Several rows are read at once, because four streams from memory are faster than one,
// and each strip of the tokens is loaded once for all of them. All loops over the sums are unrolled, so that GCC 12
// keeps them out of memory, which it would clear with an instruction (rep stos) during which nothing is read ahead.
// This, and no test of the level in the loop, take 0.04 of 0.94 ms away (4096 x 4096 in bfloat16, one token, Zen 5).
template <int level, int rows, int tokens, class T>
inline void dot_products(const T* const* row, const float* x, int64_t stride, int64_t n, float* out, int64_t ahead) {
  constexpr int unroll = rows * tokens >= 8 ? 1 : 8 / (rows * tokens);
  constexpr int step = dots<T> ? STRIP / 2 : STRIP;  // floats of a packed strip of a token
  vf acc[rows][tokens][unroll] = {};
  int64_t j = 0;
  for (; j + unroll * STRIP <= n; j += unroll * STRIP, x += unroll * step) {
#pragma GCC unroll 8
    for (int u = 0; u < unroll; u++)
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
          acc[r][t][u] = add_strip(acc[r][t][u], row[r] + j + u * STRIP, x + t * stride + u * step);
#pragma GCC unroll 8
    for (int u = 0; u < unroll; u++)
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) prefetch_strip<level>(row[r] + j + u * STRIP, ahead);
  }
  for (; j < n; j += STRIP, x += step)
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      T part[STRIP] = {};
      std::memcpy(part, row[r] + j, (n - j < STRIP ? n - j : STRIP) * sizeof(T));
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) acc[r][t][0] = add_strip(acc[r][t][0], part, x + t * stride);
    }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
      vf total = acc[r][t][0];
#pragma GCC unroll 8
      for (int u = 1; u < unroll; u++) total += acc[r][t][u];
      out[r * 4 + t] = sum(total);
    }
}

template <int level, int tokens, class T>
inline void dot_products_of(const T* const* row, int rows, const float* x, int64_t stride, int64_t n, float* out,
                            int64_t ahead) {
  if (rows == 4) {
    dot_products<level, 4, tokens>(row, x, stride, n, out, ahead);
    return;
  }
  for (int r = 0; r < rows; r++) dot_products<level, 1, tokens>(row + r, x, stride, n, out + r * 4, ahead);
}

template <int level, class T>
inline void dot_products_from(const T* const* row, int rows, const float* x, int64_t stride, int64_t n, int64_t tokens,
                              float* out, int64_t by_row, int64_t by_token, int64_t ahead) {
  for (int64_t t = 0; t < tokens; t += 4) {
    const int some = tokens - t < 4 ? static_cast<int>(tokens - t) : 4;
    float part[16];
    if (some == 1) dot_products_of<level, 1>(row, rows, x + t * stride, stride, n, part, ahead);
    if (some == 2) dot_products_of<level, 2>(row, rows, x + t * stride, stride, n, part, ahead);
    if (some == 3) dot_products_of<level, 3>(row, rows, x + t * stride, stride, n, part, ahead);
    if (some == 4) dot_products_of<level, 4>(row, rows, x + t * stride, stride, n, part, ahead);
    for (int r = 0; r < rows; r++)
      for (int q = 0; q < some; q++) out[r * by_row + (t + q) * by_token] = part[r * 4 + q];
  }
}

// out[r * by_row + t * by_token] = row r . token t for at most four rows and any number of tokens that are `stride`
// floats apart. `later` is the distance in elements from these rows to the ones that are read next, or 0 if it is
// unknown.
template <class T>
inline void dot_products_any(const T* const* row, int rows, const float* x, int64_t stride, int64_t n, int64_t tokens,
                             float* out, int64_t by_row, int64_t by_token, int64_t later = 0) {
  if (later == 0 && streams_fit_first_level())
    dot_products_from<1>(row, rows, x, stride, n, tokens, out, by_row, by_token, AHEAD);
  else
    dot_products_from<2>(row, rows, x, stride, n, tokens, out, by_row, by_token,
                         later == 0 ? AHEAD : later * static_cast<int64_t>(sizeof(T)));
}

// How many tokens meet a block of the window's rows at once. AVX-512 has 32 registers, SSE and AVX2 have 16.
constexpr int AT_ONCE = VL == 16 ? 4 : 2;

// y - coef D of `some` tokens from t on, for the 4 VL outputs from i0 on. Unless the product is in y already, `part`
// holds it: block of VL outputs, token, lane.
template <int some, class T>
inline void subtract_window(const ttt::WindowLinear& a, int64_t t, int64_t i0, const float* part, const float* coef,
                            const int* live, int64_t rows) {
  const int64_t m = a.m;
  const T *win_delta = static_cast<const T*>(a.win_delta) + i0, *bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y) + t * m + i0;
  int64_t count[4];
  for (int b = 0; b < 4; b++) count[b] = std::max<int64_t>(std::min<int64_t>(m - i0 - b * VL, VL), 0);
  vf value[some][4] = {};
#pragma GCC unroll 4
  for (int q = 0; q < some; q++)
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
      value[q][b] = a.product_done ? load_upto(y + q * m + b * VL, count[b]) : load(part + (b * a.tokens + t + q) * VL);
      if (!a.product_done && bias != nullptr) value[q][b] += load_upto(bias + i0 + b * VL, count[b]);
    }
  const auto subtract = [&](auto row_at) {
    for (int64_t c = 0; c < rows; c++) {
      const T* row = win_delta + live[c] * m;
      vf delta[4];
#pragma GCC unroll 4
      for (int b = 0; b < 4; b++) delta[b] = row_at(row, b);
#pragma GCC unroll 4
      for (int q = 0; q < some; q++) {
        const vf factor = splat(coef[(t + q) * rows + c]);
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) value[q][b] -= factor * delta[b];
      }
    }
  };
  if (count[3] == VL)
    subtract([](const T* row, int b) { return load(row + b * VL); });
  else
    subtract([&](const T* row, int b) { return load_upto(row + b * VL, count[b]); });
#pragma GCC unroll 4
  for (int q = 0; q < some; q++)
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
      T rounded[VL];
      store_nearest(rounded, value[q][b]);
      std::memcpy(y + q * m + b * VL, rounded, count[b] * sizeof(T));
    }
}

template <int most, class T>
inline void subtract_window_of(int some, const ttt::WindowLinear& a, int64_t t, int64_t i0, const float* part,
                               const float* coef, const int* live, int64_t rows) {
  if constexpr (most > 1)
    if (some < most) return subtract_window_of<most - 1, T>(some, a, t, i0, part, coef, live, rows);
  subtract_window<most, T>(a, t, i0, part, coef, live, rows);
}

template <class T>
void window_linear(const ttt::WindowLinear& a) {
  const int64_t m = a.m, n = a.n, tokens = a.tokens;
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const T* win_x = static_cast<const T*>(a.win_x);

  // The rows in use; a row with eta = 0 is empty and is never read.
  Scratch live_scratch(a.window + 1);
  int* live = reinterpret_cast<int*>(live_scratch.get());
  int64_t rows = 0;
  for (int64_t c = 0; c < a.window; c++)
    if (a.win_eta[c] != 0) live[rows++] = static_cast<int>(c);
  if (tokens == 0 || (a.product_done && rows == 0)) return;

  const Tokens<T> x(static_cast<const T*>(a.x), tokens, n);
  const int64_t stride = x.row(1) - x.row(0);
  Scratch coef_scratch(rows * tokens);
  float* coef = coef_scratch.get();  // tokens x rows: eta_c (x_t . X_c)
  const int64_t groups = (m + 4 * VL - 1) / (4 * VL);
  Scratch y_scratch(groups * 4 * VL * tokens);
  float* part = y_scratch.get();  // block of VL outputs, token, lane

  const double work =
      static_cast<double>(m) * n * (a.product_done ? 0 : 1) + static_cast<double>(rows) * tokens * (m + n);
  const int threads = work < 65536 ? 1 : a.threads;
  // Whenever a thread asks for its next groups, an atomic operation waits for everything that is being read.
  const int64_t run = threads == 1 ? groups : std::max<int64_t>(2, groups / (8 * threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < rows; c += 4) {
      const int some = rows - c < 4 ? static_cast<int>(rows - c) : 4;
      const T* row[4] = {};
      for (int r = 0; r < some; r++) row[r] = win_x + live[c + r] * n;
      dot_products_any(row, some, x.row(0), stride, n, tokens, coef + c, 1, rows);
      for (int64_t t = 0; t < tokens; t++)
        for (int r = 0; r < some; r++) coef[t * rows + c + r] *= a.win_eta[live[c + r]];
    }
    // A group is four blocks of VL outputs; each block reads a stretch of consecutive rows of W. Scheduling is dynamic,
    // because on shared machines a core can be taken away at any time.
#pragma omp for schedule(dynamic, run)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t i0 = group * 4 * VL;
      float* out = part + i0 * tokens;
      for (int64_t i = 0; i < VL && !a.product_done; i++) {
        const T* row[4] = {};
        int some = 0;
        for (; some < 4 && i0 + some * VL + i < m; some++) row[some] = weight + (i0 + some * VL + i) * n;
        if (some > 0) dot_products_any(row, some, x.row(0), stride, n, tokens, out + i, VL * tokens, VL);
      }
      for (int64_t t = 0; t < tokens; t += AT_ONCE) {
        const int some = tokens - t < AT_ONCE ? static_cast<int>(tokens - t) : AT_ONCE;
        subtract_window_of<AT_ONCE, T>(some, a, t, i0, out, coef, live, rows);
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

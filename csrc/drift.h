// The drift E: the difference of the outputs on the replay rows from those of the anchor, by one pass over W and W*.
#pragma once
#include <type_traits>

#include "factors.h"
#include "product.h"
#include "replay.h"
#include "vec.h"

namespace {

struct Nothing {};

// acc[i][q] += a strip of (W_i - W*_i - carry M_i) . the same of replay row r + q; M only where V is not Nothing.
template <int wide, int deep, class W, class V>
inline void add_strips(vf (&acc)[wide][deep], const W* w, const W* w0, const V* momentum, float carry, int64_t stride,
                       int64_t left, const Replay& replay, int64_t r, int64_t j) {
  Two value[deep];
#pragma GCC unroll 4
  for (int q = 0; q < deep; q++) value[q] = {load(replay.at(r + q, j)), load(replay.at(r + q, j) + VL)};
#pragma GCC unroll 4
  for (int i = 0; i < wide; i++) {
    const Two now = load2_upto<splits<W>>(w + i * stride, left), then = load2_upto<splits<W>>(w0 + i * stride, left);
    vf a = now.a - then.a, b = now.b - then.b;
    if constexpr (!std::is_same_v<V, Nothing>) {
      const Two velocity = load2_upto<splits<W>>(momentum + i * stride, left);
      a -= carry * velocity.a;
      b -= carry * velocity.b;
    }
#pragma GCC unroll 4
    for (int q = 0; q < deep; q++) {
      acc[i][q] += a * value[q].a;
      acc[i][q] += b * value[q].b;
    }
  }
}

#if TTT_DOT
// The same with products of pairs. The products with W and with -W* follow each other, so that sums stay small.
template <int wide, int deep>
inline void add_pairs(vf (&acc)[wide][deep], const bf16* w, const bf16* w0, int64_t stride, int64_t left,
                      const Replay& replay, int64_t r, int64_t j) {
  __m512bh value[deep];
#pragma GCC unroll 4
  for (int q = 0; q < deep; q++) value[q] = (__m512bh)load(replay.pairs_at(r + q, j));
#pragma GCC unroll 4
  for (int i = 0; i < wide; i++) {
    const __m512bh now = (__m512bh)load_raw(w + i * stride, left);
    const __m512bh then = (__m512bh)((vu)load_raw(w0 + i * stride, left) ^ constant<0x80008000u>());
#pragma GCC unroll 4
    for (int q = 0; q < deep; q++) {
      acc[i][q] = (vf)_mm512_dpbf16_ps((__m512)acc[i][q], now, value[q]);
      acc[i][q] = (vf)_mm512_dpbf16_ps((__m512)acc[i][q], then, value[q]);
    }
  }
}
#endif

// E for `wide` rows of W, `apart` rows from one another, and `deep` replay rows: drift[(r + q) * BLOCK_ROWS + i apart].
template <int wide, int deep, class W, class V>
inline void drift_tile(const W* w, const W* w0, const V* momentum, float carry, int64_t n, int64_t apart,
                       const Replay& replay, int64_t r, float* drift) {
  const int64_t stride = apart * n;
  vf acc[wide][deep] = {};
  const auto add = [&](int64_t j, int64_t left) {
#if TTT_DOT
    if constexpr (splits<W> && std::is_same_v<V, Nothing>) {
      add_pairs(acc, w + j, w0 + j, stride, left, replay, r, j);
      return;
    }
#endif
    add_strips(acc, w + j, w0 + j, momentum ? momentum + j : nullptr, carry, stride, left, replay, r, j);
  };
  int64_t j = 0;
  for (; j + STRIP <= n; j += STRIP) {
#pragma GCC unroll 4
    for (int i = 0; i < wide; i++) {
      prefetch_strip(w + i * stride + j);
      prefetch_strip(w0 + i * stride + j);
    }
    add(j, STRIP);
  }
  if (j < n) add(j, n - j);
  for (int i = 0; i < wide; i++)
    for (int q = 0; q < deep; q++) drift[(r + q) * BLOCK_ROWS + i * apart] = sum(acc[i][q]);
}

template <class W, class V = Nothing>
void drift_of_rows(const W* weight, const W* anchor, int64_t n, int64_t rows, const Replay& replay, float* drift,
                   const V* momentum = nullptr, float carry = 0) {
  // The strips of the replay rows are read from the second-level cache, and four rows of W share each of them (Zen 4,
  // 4096 x 4096, T = 1, R = 4, bfloat16: 8.5 ms; two rows: 9.0; one: 10.2). The four rows are `apart` rows from each
  // other for the reason given at `Tiling`.
  constexpr int wide = VL == 16 ? 4 : 1;
  const int64_t apart = rows / wide;
  const auto tile = [&](auto high, auto deep, int64_t i, int64_t r) {
    drift_tile<high, deep>(weight + i * n, anchor + i * n, momentum ? momentum + i * n : nullptr, carry, n, apart,
                           replay, r, drift + i);
  };
  constexpr std::integral_constant<int, 1> one;
  int64_t i = 0;
  for (; i < apart; i++) {
    int64_t r = 0;
    for (; r + 4 <= replay.rows; r += 4)
      tile(std::integral_constant<int, wide>(), std::integral_constant<int, 4>(), i, r);
    for (; r < replay.rows; r++) tile(std::integral_constant<int, wide>(), one, i, r);
  }
  for (i = apart * wide; i < rows; i++)
    for (int64_t r = 0; r < replay.rows; r++) tile(one, one, i, r);
}

}  // namespace

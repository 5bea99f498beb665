// How far the outputs on the replay rows have moved from those of the anchor: a pass over W and W*.
#pragma once
#include <type_traits>

#include "factors.h"
#include "product.h"
#include "replay.h"
#include "vec.h"

namespace {

struct Nothing {};

// E for `rows` rows of W: drift[r * BLOCK_ROWS + i] = X_r . (W_i - W*_i - carry M_i); for V = Nothing without M.
template <int wide, int deep, class W, class V>
inline void drift_tile(const W* w, const W* w0, const V* momentum, float carry, int64_t n, const Replay& replay,
                       int64_t r, float* drift) {
  vf acc[wide][deep] = {};
  const float* x = replay.at(r, 0);
  for (int64_t j = 0; j < n; j += STRIP, x += replay.rows * STRIP) {
    Two value[deep];
#pragma GCC unroll 4
    for (int q = 0; q < deep; q++) value[q] = {load(x + q * STRIP), load(x + q * STRIP + VL)};
#pragma GCC unroll 4
    for (int i = 0; i < wide; i++) {
      prefetch_strip<2>(w + i * n + j, 1024);  // not AHEAD: in short rows that is the tile's own next row
      prefetch_strip<2>(w0 + i * n + j, 1024);
      const Two now = load2_upto<splits<W>>(w + i * n + j, n - j), then = load2_upto<splits<W>>(w0 + i * n + j, n - j);
      vf a = now.a - then.a, b = now.b - then.b;
      if constexpr (!std::is_same_v<V, Nothing>) {
        const Two velocity = load2_upto<splits<W>>(momentum + i * n + j, n - j);
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
  for (int i = 0; i < wide; i++)
    for (int q = 0; q < deep; q++) drift[(r + q) * BLOCK_ROWS + i] = sum(acc[i][q]);
}

template <class W, class V = Nothing>
void drift_of_rows(const W* weight, const W* anchor, int64_t n, int64_t rows, const Replay& replay, float* drift,
                   const V* momentum = nullptr, float carry = 0) {
  // The strips of the replay rows come from the second-level cache: four rows of W share each (Zen 4, 4096 x 4096, T =
  // 1, R = 4, bfloat16: 8.5 ms; two rows: 9.0; one: 10.2).
  constexpr int wide = VL == 16 ? 4 : 1;
  const auto tile = [&](auto high, auto deep, int64_t i, int64_t r) {
    drift_tile<high, deep>(weight + i * n, anchor + i * n, momentum ? momentum + i * n : nullptr, carry, n, replay, r,
                           drift + i);
  };
  constexpr std::integral_constant<int, 1> one;
  int64_t i = 0;
  for (; i + wide <= rows; i += wide) {
    int64_t r = 0;
    for (; r + 4 <= replay.rows; r += 4)
      tile(std::integral_constant<int, wide>(), std::integral_constant<int, 4>(), i, r);
    for (; r < replay.rows; r++) tile(std::integral_constant<int, wide>(), one, i, r);
  }
  for (; i < rows; i++)
    for (int64_t r = 0; r < replay.rows; r++) tile(one, one, i, r);
}

}  // namespace

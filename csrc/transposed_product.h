// y = x W for a few rows x, as a backward pass needs it: W is read once, row after row, for every four rows of x.
#pragma once
#include <algorithm>

#include "low_rank.h"

namespace {

template <class T>
void transposed_product(const ttt::TransposedProduct& a) {
  constexpr int64_t width = LOW_RANK_COLUMNS / 4;  // columns that are summed at a time, of four rows
  const int64_t m = a.m, n = a.n;
  Scratch factors(a.rows * m + VL);
  float* factor = factors.get();
  for (int64_t t = 0; t < a.rows; t++)
    for (int64_t i = 0; i < m; i += VL)  // what is written behind a row is overwritten by the next one
      store(factor + t * m + i, load_upto(static_cast<const T*>(a.x) + t * m + i, m - i));
  const int threads = static_cast<double>(m) * n < 65536 ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
  for (int64_t j0 = 0; j0 < n; j0 += width) {
    const int64_t count = std::min(width, n - j0);
    const T* weight = static_cast<const T*>(a.weight) + j0;
    alignas(64) float acc[4 * width];
    for (int64_t t = 0; t < a.rows; t += 4) {
      const int some = static_cast<int>(std::min<int64_t>(4, a.rows - t));
      std::fill(acc, acc + some * width, 0.0f);
      if (some == 1) add_all_rows<1>(acc, width, factor + t * m, m, weight, n, count, width);
      if (some == 2) add_all_rows<2>(acc, width, factor + t * m, m, weight, n, count, width);
      if (some == 3) add_all_rows<3>(acc, width, factor + t * m, m, weight, n, count, width);
      if (some == 4) add_all_rows<4>(acc, width, factor + t * m, m, weight, n, count, width);
      for (int r = 0; r < some; r++) store_strips(acc + r * width, count, static_cast<T*>(a.y) + (t + r) * n + j0);
    }
  }
}

void run_transposed_product(const ttt::TransposedProduct& a) {
  if (a.dtype == ttt::kF32)
    transposed_product<float>(a);
  else
    transposed_product<bf16>(a);
}

}  // namespace

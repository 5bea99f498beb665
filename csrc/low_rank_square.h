// |B^T A|^2 from the Gram matrices of the factors, as compression computes them.
#pragma once
#include "low_rank_compress.h"

namespace {

template <class T>
double low_rank_square(const ttt::LowRankSquare& f) {
  ttt::LowRankCompress a = {};
  a.a = const_cast<void*>(f.a);
  a.b = const_cast<void*>(f.b);
  a.capacity = f.rows;
  a.m = f.m;
  a.n = f.n;
  const Compression<T> work(a);
  const int64_t ld = work.ld;
  thread_local Compressed s;  // kept for the next call, because new memory pages are slow to get
  thread_local Wide scratch;
  s.slot = s.wide_panels = 0;
  s.held = f.rows;
  s.replays = false;
  s.grams.need((work.pieces(true) + work.pieces(false)) * ld * ld);
  scratch.need(ld * GRAM_COLUMNS);
  for (const bool of_a : {true, false})
    for (int64_t p = 0; p < work.pieces(of_a); p++) work.gram(s, of_a, p, scratch.get());
  const auto [ga, gb] = work.sums(s);
  double total = 0;
  for (int64_t i = 0; i < f.rows; i++) {
    double below = 0;
    for (int64_t j = 0; j < i; j++) below += ga[i * ld + j] * gb[i * ld + j];
    total += 2 * below + ga[i * ld + i] * gb[i * ld + i];
  }
  if (ld > KEPT_ROWS) {
    s.grams = Wide();
    scratch = Wide();
  }
  return total;
}

double run_low_rank_square(const ttt::LowRankSquare& f) {
  return f.dtype == ttt::kF32 ? low_rank_square<float>(f) : low_rank_square<bf16>(f);
}

}  // namespace

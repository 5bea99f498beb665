// y_t += B_u^T (A_u x_t), each token with the rows of its own user's slot; and the rows that learning appends to slots.
// A user's tokens stand together, so that a slot is read once for all of them. No sum runs over tokens: what a token
// gets depends on no token of another user.
#pragma once
#include <algorithm>
#include <vector>

#include "product.h"
#include "scratch.h"
#include "vec.h"
#include "window_linear.h"

namespace {

// Of y, of all tokens at a time: the first-level cache holds them while B's rows pass.
constexpr int64_t LOW_RANK_COLUMNS = 2048;

// A run of tokens of one user, in the order of `LowRankBatch`.
struct LowRankGroup {
  int64_t slot, first, count, rows;
  int64_t inner;  // where its count x rows products A x begin
};

struct LowRankBatch {
  std::vector<int> token;  // those that have a user, by user and then as they came
  std::vector<LowRankGroup> groups;
  int64_t products = 0;

  bool one_each() const { return groups.size() == token.size(); }

  explicit LowRankBatch(const ttt::LowRankLinear& a) {
    for (int64_t t = 0; t < a.tokens; t++)
      if (a.users[t] >= 0 && a.rows[a.users[t]] > 0) token.push_back(static_cast<int>(t));
    std::stable_sort(token.begin(), token.end(), [&](int s, int t) { return a.users[s] < a.users[t]; });
    for (size_t i = 0; i < token.size(); i++) {
      const int64_t slot = a.users[token[i]];
      if (groups.empty() || groups.back().slot != slot)
        groups.push_back({slot, static_cast<int64_t>(i), 0, std::min<int64_t>(a.rows[slot], a.capacity), 0});
      groups.back().count++;
    }
    for (auto& g : groups) {
      g.inner = products;
      products += g.count * g.rows;
    }
  }
};

// y_t += sum over `rows` rows of factor[t * stride + r] row_r for `tokens` tokens and `count` columns of y and B, in
// the order of B's strips.
template <int tokens, int rows, class T>
inline void add_rows(float* acc, int64_t width, const float* factor, int64_t stride, const T* b, int64_t m,
                     int64_t count, int64_t later) {
  for (int64_t j = 0; j < count; j += STRIP) {
    Two value[tokens];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) value[t] = {load(acc + t * width + j), load(acc + t * width + j + VL)};
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const Two row = load2_upto<splits<T>>(b + r * m + j, count - j);
      prefetch_strip(b + r * m + later + j, 0);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; t++) {
        value[t].a += factor[t * stride + r] * row.a;
        value[t].b += factor[t * stride + r] * row.b;
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
      store(acc + t * width + j, value[t].a);
      store(acc + t * width + j + VL, value[t].b);
    }
  }
}

// From row `r` on, `each` rows at a time, while there are so many; the first row that is left.
template <int tokens, int each, class T>
inline int64_t add_rows_by(int64_t r, float* acc, int64_t width, const float* factor, int64_t held, const T* b,
                           int64_t m, int64_t count, int64_t next) {
  for (; r + each <= held; r += each) {
    const int64_t later = r + each < held ? each * m : next - r * m;
    add_rows<tokens, each>(acc, width, factor + r, held, b + r * m, m, count, later);
  }
  return r;
}

// `next`: how many elements behind these rows others begin that come after them.
template <int tokens, class T>
inline void add_all_rows(float* acc, int64_t width, const float* factor, int64_t held, const T* b, int64_t m,
                         int64_t count, int64_t next) {
  int64_t r = add_rows_by<tokens, 8>(0, acc, width, factor, held, b, m, count, next);
  r = add_rows_by<tokens, 4>(r, acc, width, factor, held, b, m, count, next);
  r = add_rows_by<tokens, 2>(r, acc, width, factor, held, b, m, count, next);
  add_rows_by<tokens, 1>(r, acc, width, factor, held, b, m, count, next);
}

template <class T>
void low_rank_linear(const ttt::LowRankLinear& a) {
  const int64_t m = a.m, n = a.n;
  const LowRankBatch batch(a);
  if (batch.token.empty()) return;
  const Tokens<T> x(static_cast<const T*>(a.x), batch.token.size(), n, batch.token.data());
  const int64_t stride = x.row(1) - x.row(0);
  Scratch inner(batch.products);

  struct Unit {
    const LowRankGroup* group;
    int64_t at;  // row of A, or column of B
  };
  // Long stretches of a row are read faster, but each thread should get several.
  const bool many = static_cast<int64_t>(batch.groups.size()) * m >= 4 * a.threads * LOW_RANK_COLUMNS;
  const int64_t width = many && batch.one_each() ? LOW_RANK_COLUMNS : LOW_RANK_COLUMNS / 4;
  std::vector<Unit> dots, sums;
  double work = 0;
  for (const auto& g : batch.groups) {
    for (int64_t r = 0; r < g.rows; r += 4) dots.push_back({&g, r});
    for (int64_t i = 0; i < m; i += width) sums.push_back({&g, i});
    work += static_cast<double>(g.rows) * g.count * (m + n);
  }
  const int threads = work < 65536 ? 1 : a.threads;
  // Units that follow each other are read ahead for: a thread gets several, but of each 16th of all only so many.
  const auto run = [&](const std::vector<Unit>& units) {
    return std::clamp(static_cast<int>(units.size()) / (8 * threads), 2, 16);
  };
  const int dots_run = run(dots), sums_run = run(sums);
  const auto row_a = [&](const Unit& u) {
    return static_cast<const T*>(a.a) + (u.group->slot * a.capacity + u.at) * n;
  };
  const auto row_b = [&](const Unit& u) { return static_cast<const T*>(a.b) + u.group->slot * a.capacity * m + u.at; };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // inner[t * rows + r] = A_r . x_t
#pragma omp for schedule(dynamic, dots_run)
    for (size_t unit = 0; unit < dots.size(); unit++) {
      const LowRankGroup& g = *dots[unit].group;
      const int64_t r0 = dots[unit].at;
      const int some = static_cast<int>(std::min<int64_t>(4, g.rows - r0));
      const T* row[4] = {};
      for (int r = 0; r < some; r++) row[r] = row_a(dots[unit]) + r * n;
      const int64_t later = unit + 1 < dots.size() ? row_a(dots[unit + 1]) - row[0] : 0;
      dot_products_any(row, some, x.row(g.first), stride, n, g.count, inner.get() + g.inner + r0, 1, g.rows, later);
    }
#pragma omp for schedule(dynamic, sums_run)
    for (size_t unit = 0; unit < sums.size(); unit++) {
      const LowRankGroup& g = *sums[unit].group;
      const int64_t i0 = sums[unit].at, count = std::min(width, m - i0);
      const T* b = row_b(sums[unit]);
      const int64_t next = unit + 1 < sums.size() ? row_b(sums[unit + 1]) - b : 0;
      alignas(64) float acc[LOW_RANK_COLUMNS];
      for (int64_t t = 0; t < g.count; t += 4) {
        const int some = static_cast<int>(std::min<int64_t>(4, g.count - t));
        for (int k = 0; k < some; k++) {
          const T* y = static_cast<const T*>(a.y) + batch.token[g.first + t + k] * m + i0;
          for (int64_t j = 0; j < count; j += STRIP) {
            const Two strip = load2_upto<splits<T>>(y + j, count - j);
            store(acc + k * width + j, strip.a);
            store(acc + k * width + j + VL, strip.b);
          }
        }
        const float* factor = inner.get() + g.inner + t * g.rows;
        if (some == 1) add_all_rows<1>(acc, width, factor, g.rows, b, m, count, next);
        if (some == 2) add_all_rows<2>(acc, width, factor, g.rows, b, m, count, next);
        if (some == 3) add_all_rows<3>(acc, width, factor, g.rows, b, m, count, next);
        if (some == 4) add_all_rows<4>(acc, width, factor, g.rows, b, m, count, next);
        for (int k = 0; k < some; k++) {
          T* y = static_cast<T*>(a.y) + batch.token[g.first + t + k] * m + i0;
          for (int64_t j = 0; j < count; j += STRIP) {
            float strip[STRIP];
            T rounded[STRIP];
            store2<splits<T>>(strip, {load(acc + k * width + j), load(acc + k * width + j + VL)});
            store_nearest(rounded, load(strip));
            store_nearest(rounded + VL, load(strip + VL));
            std::memcpy(y + j, rounded, std::min<int64_t>(STRIP, count - j) * sizeof(T));
          }
        }
      }
    }
  }
}

// a[u, rows[u]] = x_t, b[u, rows[u]] = -eta_t delta_t for each token, in order. There is room: the caller checked.
template <class T>
void low_rank_append(const ttt::LowRankAppend& a) {
  std::vector<int64_t> to(a.tokens, -1);
  for (int64_t t = 0; t < a.tokens; t++) {
    const int64_t u = a.users[t];
    if (u < 0) continue;
    to[t] = u * a.capacity + a.rows[u]++;
    a.eta_sum[u] += a.eta[t];
  }
  const int threads = a.tokens * (a.m + a.n) < 65536 ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t t = 0; t < a.tokens; t++) {
    if (to[t] < 0) continue;
    std::memcpy(static_cast<T*>(a.a) + to[t] * a.n, static_cast<const T*>(a.x) + t * a.n, a.n * sizeof(T));
    const T* delta = static_cast<const T*>(a.delta) + t * a.m;
    T* b = static_cast<T*>(a.b) + to[t] * a.m;
    for (int64_t i = 0; i < a.m; i += VL) {
      T rounded[VL];
      store_nearest(rounded, -a.eta[t] * load_upto(delta + i, a.m - i));
      std::memcpy(b + i, rounded, std::min<int64_t>(VL, a.m - i) * sizeof(T));
    }
  }
}

void run_low_rank_linear(const ttt::LowRankLinear& a) {
  if (a.dtype == ttt::kF32)
    low_rank_linear<float>(a);
  else
    low_rank_linear<bf16>(a);
}

void run_low_rank_append(const ttt::LowRankAppend& a) {
  if (a.dtype == ttt::kF32)
    low_rank_append<float>(a);
  else
    low_rank_append<bf16>(a);
}

}  // namespace

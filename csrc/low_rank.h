// The low-rank part of a mixed batch, y_t += B_u^T (A_u x_t) for the user u of each token, and the appending of learnt
// rows to slots.
//
// Tokens are grouped by user, so that each slot is read once for all tokens of its user. No sum runs over tokens: the
// bits that a token gets do not depend on tokens of other users.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "product.h"
#include "scratch.h"
#include "vec.h"
#include "window_linear.h"

namespace {

// Columns of y that are summed at a time: the first-level cache holds those of a few tokens while B's rows are read.
constexpr int64_t LOW_RANK_COLUMNS = 2048;

// The tokens of one user: `count` of them from `first` on in the order of `LowRankBatch::token`.
struct LowRankGroup {
  int64_t slot, first, count, rows;
  int64_t inner;  // offset of its count x rows products A x
};

// The tokens of a batch whose users have rows, grouped by user.
struct LowRankBatch {
  std::vector<int> token;  // indices of those tokens, by slot and then in their order in the batch
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

// acc_t += sum over `rows` rows of factor[t * stride + r] row_r for `tokens` tokens and `count` columns. Columns are in
// the order of B's strips (vec.h).
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

// `add_rows` from row `r` on, `each` rows at a time while as many are left. Returns the first row that is left.
template <int tokens, int each, class T>
inline int64_t add_rows_by(int64_t r, float* acc, int64_t width, const float* factor, int64_t held, const T* b,
                           int64_t m, int64_t count, int64_t next) {
  for (; r + each <= held; r += each) {
    const int64_t later = r + each < held ? each * m : next - r * m;
    add_rows<tokens, each>(acc, width, factor + r, held, b + r * m, m, count, later);
  }
  return r;
}

// `add_rows` of all `held` rows. `next`: distance, in elements, to the rows that are read after these (for
// prefetching).
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
    int64_t at;  // first row of A, or first column of B
  };
  // Long contiguous reads are faster, but each thread should get several units.
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
  // A thread gets several consecutive units at a time, because the next unit's rows are prefetched.
  const auto run = [&](const std::vector<Unit>& units) {
    const int count = static_cast<int>(units.size());
    return threads == 1 ? std::max(count, 1) : std::clamp(count / (8 * threads), 2, 16);
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
        for (int k = 0; k < some; k++)
          store_strips(acc + k * width, count, static_cast<T*>(a.y) + batch.token[g.first + t + k] * m + i0);
      }
    }
  }
}

// a[u, rows[u]] = x_t, b[u, rows[u]] = -eta_t delta_t for each token, in order. The caller has checked that there is
// room (low_rank_checks.h). The definition in torch is `low_rank_append` of ttt/ops/low_rank/reference.py; the two are
// compared by test_append_is_the_gradient_step of tests/ops/test_low_rank.py.
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

// Whether no number is infinite or NaN: the largest bit pattern without the sign is below that of infinity.
template <class V>
bool all_finite(const void* x, int64_t count) {
  using Bits = std::remove_reference_t<decltype(V{}[0])>;
  constexpr int lanes = sizeof(V) / sizeof(Bits), unroll = 4;
  constexpr Bits infinity = sizeof(Bits) == 2 ? 0x7f80 : 0x7f800000, magnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const Bits* p = static_cast<const Bits*>(x);
  V most[unroll] = {};
  int64_t j = 0;
  for (; j + unroll * lanes <= count; j += unroll * lanes)
    for (int k = 0; k < unroll; k++) {
      const V v = load_as<V>(p + j + k * lanes) & magnitude;
      most[k] = v > most[k] ? v : most[k];
    }
  Bits top = 0;
  for (int k = 0; k < unroll; k++)
    for (int l = 0; l < lanes; l++) top = std::max<Bits>(top, most[k][l]);
  for (; j < count; j++) top = std::max<Bits>(top, p[j] & magnitude);
  return top < infinity;
}

bool run_all_finite(const void* x, int64_t count, int dtype) {
  return dtype == ttt::kF32 ? all_finite<vu>(x, count) : all_finite<vh>(x, count);
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

// The fused commit: one pass over W, W*, Omega and F, no m x n temporary. See ttt.ops.commit for the formula.
//
// Rows of W are taken in blocks. For each block the drift of the replay rows is computed first, which
// brings its rows of W and W* into the cache; then register tiles of G and of the trace's sum are made
// by a small matrix product over the tokens and finished at once by the update of that tile.
//
// G's replay part is part of the same product: E and V are T + 1 ... T + R th "tokens".
#pragma once
#include <omp.h>

#include "replay.h"
#include "rounding.h"
#include "scratch.h"
#include "vec.h"

namespace {

// A register tile is MR rows by NV vectors. With 16 registers (AVX2), 3 x 4 leaves one for each factor.
constexpr int MR = 3;
constexpr int NV = 4;  // and NV * VL columns are the 4 words of VL counters (rounding.h)
constexpr int NC = NV * VL;

// acc[r][v] = sum over t of d[t][r] * f(x[t][v]); f is x, x^2 or |x|.
template <int kind>
inline void tile_product(const float* __restrict d, const float* __restrict x, int64_t tokens, float* __restrict out) {
  vf acc[MR][NV] = {};
  for (int64_t t = 0; t < tokens; t++, d += MR, x += NC) {
    vf dr[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) dr[r] = splat(d[r]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      vf value = load(x + v * VL);
      if (kind == 1) value *= value;
      if (kind == 2) value = abs(value);
#pragma GCC unroll 8
      for (int r = 0; r < MR; r++) acc[r][v] += dr[r] * value;
    }
  }
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) store(out + r * NC + v * VL, acc[r][v]);
}

// Columns [j, j + NC) of one row, `count` of them real.
template <class W, class O, class F>
struct Row {
  W* weight;
  const W* anchor;
  const O* importance;
  F* trace;
};

struct Scalars {
  float pull;      // lam * sum(eta)
  float keep;      // gamma^T
  bool si, draws;  // draws: random bits are needed
  uint64_t seed;
  uint32_t step;
};

template <class W, class O, class F>
inline void update(const Row<W, O, F>& row, const float* g, const float* s, const uint32_t* bits, const Scalars& k) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; v++) {
    const int at = v * VL;
    vu random = {};
    if (k.draws) std::memcpy(&random, bits + at, sizeof random);
    const vf old = load(row.weight + at);
    vf change = load(g + at);
    if (row.importance != nullptr) {
      // The proximal step W* + (W - G - W*) / (1 + a), written so that G = 0 and a = 0 change no bit.
      const vf pull = k.pull * load(row.importance + at);
      change = (change + pull * (old - load(row.anchor + at))) / (1.0f + pull);
    }
    const vf now = store_rounded(row.weight + at, old - change, random);
    if (row.trace != nullptr) {
      vf grown = load(s + at);
      if (k.si) grown *= old - now;
      store_rounded(row.trace + at, k.keep * load(row.trace + at) + grown, random >> 16);
    }
  }
}

template <class W, class O, class F>
inline void update_part(const Row<W, O, F>& row, int64_t count, const float* g, const float* s, const uint32_t* bits,
                        const Scalars& k) {
  W weight[NC] = {}, anchor[NC] = {};
  O importance[NC] = {};
  F trace[NC] = {};
  Row<W, O, F> copy = {weight, anchor, row.importance ? importance : nullptr, row.trace ? trace : nullptr};
  std::memcpy(weight, row.weight, count * sizeof(W));
  if (row.anchor) std::memcpy(anchor, row.anchor, count * sizeof(W));
  if (row.importance) std::memcpy(importance, row.importance, count * sizeof(O));
  if (row.trace) std::memcpy(trace, row.trace, count * sizeof(F));
  update(copy, g, s, bits, k);
  std::memcpy(row.weight, weight, count * sizeof(W));
  if (row.trace) std::memcpy(row.trace, trace, count * sizeof(F));
}

// E for `rows` rows of W: drift[r * rows + i] = X_r . (W_i - W*_i), the difference made once per row.
template <class W>
void drift_of_rows(const W* weight, const W* anchor, int64_t n, int64_t rows, const Replay& replay, float* difference,
                   float* drift) {
  const int64_t r_rows = replay.rows;
  for (int64_t i = 0; i < rows; i++) {
    const W *w = weight + i * n, *w0 = anchor + i * n;
    for (int64_t j = 0; j < n; j += VL) {
      const vf d = load_upto(w + j, n - j) - load_upto(w0 + j, n - j);
      std::memcpy(difference + j, &d, (n - j < VL ? n - j : VL) * sizeof(float));
    }
    int64_t r = 0;
    for (; r + 4 <= r_rows; r += 4) {
      const float* x = replay.x.get() + r * n;
      vf acc[4][2] = {};
      int64_t j = 0;
      for (; j + 2 * VL <= n; j += 2 * VL) {
        const vf d0 = load(difference + j), d1 = load(difference + j + VL);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
          acc[q][0] += d0 * load(x + q * n + j);
          acc[q][1] += d1 * load(x + q * n + j + VL);
        }
      }
      for (; j < n; j += VL)
        for (int q = 0; q < 4; q++) acc[q][0] += load_upto(difference + j, n - j) * load_upto(x + q * n + j, n - j);
      for (int q = 0; q < 4; q++) drift[(r + q) * rows + i] = sum(acc[q][0] + acc[q][1]);
    }
    for (; r < r_rows; r++) {
      vf acc = {};
      for (int64_t j = 0; j < n; j += VL)
        acc += load_upto(difference + j, n - j) * load_upto(replay.x.get() + r * n + j, n - j);
      drift[r * rows + i] = sum(acc);
    }
  }
}

template <class W, class O, class F>
void commit(const ttt::Commit& a) {
  const int64_t m = a.m, n = a.n, tokens = a.tokens;
  const W *x = static_cast<const W*>(a.x), *delta = static_cast<const W*>(a.delta);
  const W* trace_delta = static_cast<const W*>(a.trace_delta);
  W* weight = static_cast<W*>(a.weight);
  const W* anchor = static_cast<const W*>(a.anchor);

  double total_eta = 0;
  for (int64_t t = 0; t < tokens; t++) total_eta += a.eta[t];
  const float sum_eta = static_cast<float>(total_eta);
  Replay replay(filled_rows(a) > 0 ? a.replay_rows : 0, n);
  draw_replay<W>(a, sum_eta, replay);
  const int64_t all = tokens + replay.rows;
  const bool pulls = a.lam > 0, traces = a.trace != nullptr && tokens > 0;

  // gamma^(T-1-t) for each token, and gamma^T for the trace itself.
  Scratch age_scratch(tokens + 1);
  float* age = age_scratch.get();
  double power = 1;
  for (int64_t t = tokens - 1; t >= 0; t--, power *= a.gamma) age[t] = static_cast<float>(power);
  Scalars k;
  k.keep = static_cast<float>(power);
  k.pull = a.lam * sum_eta;
  k.si = a.kind == ttt::kSi;
  k.draws = sizeof(W) == 2 || (traces && sizeof(F) == 2);
  k.seed = a.seed;
  k.step = static_cast<uint32_t>(*a.step);

  // Column panels of the tokens' inputs and of V, padded with zeros: panel, row, NC columns.
  const int64_t panels = (n + NC - 1) / NC;
  Scratch packed(panels * all * NC);
  // (X_r X^T) * eta: what the tokens being written do to the remembered outputs.
  Scratch cross(replay.rows * tokens);

  // Row blocks: with replay, W and W* of one block stay in the L2 cache between drift and update.
  const int64_t bytes_per_row = 2 * n * static_cast<int64_t>(sizeof(W));
  int64_t block = replay.rows ? (384 << 10) / bytes_per_row : 48;
  block = block < 2 * MR ? 2 * MR : (block > 48 ? 48 : block);
  block = block / MR * MR;
  // Panels in one group stay in the L2 cache while the block's rows go over them; a small X is one group.
  const int64_t panel_bytes = all * NC * 4;
  int64_t group = all * n * 4 <= (1 << 20) ? panels : (256 << 10) / (panel_bytes ? panel_bytes : 1);
  if (group < 1) group = 1;

  const double work = static_cast<double>(m) * n * (4 + all);
  const int threads = work < 65536 ? 1 : a.threads;
  const int64_t own = block * all + block * tokens + replay.rows * block + (replay.rows ? n : 0) + 64;
  Scratch scratch(own * threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* d_pack = scratch.get() + own * omp_get_thread_num();
    float* p_pack = d_pack + block * all;
    float* drift = p_pack + block * tokens;
    float* difference = drift + replay.rows * block;

#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t j0 = p * NC, count = n - j0 < NC ? n - j0 : NC;
      float* to = packed.get() + p * all * NC;
      for (int64_t t = 0; t < tokens; t++, to += NC)
        for (int64_t j = 0; j < NC; j++) to[j] = j < count ? load1(x + t * n + j0 + j) : 0.0f;
      for (int64_t r = 0; r < replay.rows; r++, to += NC)
        for (int64_t j = 0; j < NC; j++) to[j] = j < count ? replay.v.get()[r * n + j0 + j] : 0.0f;
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      for (int64_t r = 0; r < replay.rows; r++) {
        vf acc = {};
        for (int64_t j = 0; j < n; j += VL)
          acc += load_upto(x + t * n + j, n - j) * load_upto(replay.x.get() + r * n + j, n - j);
        cross.get()[t * replay.rows + r] = sum(acc) * a.eta[t];
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i0 = 0; i0 < m; i0 += block) {
      const int64_t rows = m - i0 < block ? m - i0 : block;
      if (replay.rows) {
        drift_of_rows(weight + i0 * n, anchor + i0 * n, n, rows, replay, difference, drift);
        for (int64_t t = 0; t < tokens; t++)
          for (int64_t r = 0; r < replay.rows; r++) {
            const float c = cross.get()[t * replay.rows + r];
            for (int64_t i = 0; i < rows; i++) drift[r * rows + i] -= c * load1(delta + t * m + i0 + i);
          }
      }
      // The left factors of both products, MR rows interleaved; rows beyond the end are zero.
      for (int64_t i = 0; i < rows; i += MR)
        for (int r = 0; r < MR; r++) {
          const bool real = i + r < rows;
          float* d = d_pack + i * all + r;
          for (int64_t t = 0; t < tokens; t++, d += MR) *d = real ? a.eta[t] * load1(delta + t * m + i0 + i + r) : 0.0f;
          for (int64_t q = 0; q < replay.rows; q++, d += MR) *d = real ? drift[q * rows + i + r] : 0.0f;
          if (!traces) continue;
          float* p = p_pack + i * tokens + r;
          for (int64_t t = 0; t < tokens; t++, p += MR) {
            const float value = real ? load1(trace_delta + t * m + i0 + i + r) : 0.0f;
            *p = k.si ? value : (a.kind == ttt::kMas ? (value < 0 ? -value : value) : value * value) * age[t];
          }
        }
      for (int64_t p0 = 0; p0 < panels; p0 += group) {
        const int64_t p1 = p0 + group < panels ? p0 + group : panels;
        for (int64_t i = 0; i < rows; i += MR) {
          for (int64_t p = p0; p < p1; p++) {
            alignas(64) float g[MR * NC], s[MR * NC];
            alignas(64) uint32_t bits[NC];
            const float* xp = packed.get() + p * all * NC;
            tile_product<0>(d_pack + i * all, xp, all, g);
            if (traces) {
              const float* pp = p_pack + i * tokens;
              if (k.si)
                tile_product<0>(pp, xp, tokens, s);
              else if (a.kind == ttt::kMas)
                tile_product<2>(pp, xp, tokens, s);
              else
                tile_product<1>(pp, xp, tokens, s);
            }
            const int64_t j0 = p * NC;
            for (int r = 0; r < MR && i + r < rows; r++) {
              const int64_t at = (i0 + i + r) * n + j0;
              Row<W, O, F> row = {weight + at, anchor ? anchor + at : nullptr,
                                  pulls ? static_cast<const O*>(a.importance) + at : nullptr,
                                  traces ? static_cast<F*>(a.trace) + at : nullptr};
              if (k.draws)
                rounding_bits(static_cast<uint32_t>(j0 / 4), static_cast<uint32_t>(i0 + i + r), k.step, k.seed, bits);
              if (j0 + NC <= n)
                update(row, g + r * NC, s + r * NC, bits, k);
              else
                update_part(row, n - j0, g + r * NC, s + r * NC, bits, k);
            }
          }
        }
      }
    }
  }
  *a.step += 1;
}

template <class W, class O>
void commit_by_trace(const ttt::Commit& a) {
  if (a.trace_dtype == ttt::kF32)
    commit<W, O, float>(a);
  else
    commit<W, O, bf16>(a);
}

template <class W>
void commit_by_importance(const ttt::Commit& a) {
  if (a.importance_dtype == ttt::kF32)
    commit_by_trace<W, float>(a);
  else
    commit_by_trace<W, bf16>(a);
}

void run_commit(const ttt::Commit& a) {
  if (a.dtype == ttt::kF32)
    commit_by_importance<float>(a);
  else
    commit_by_importance<bf16>(a);
}

}  // namespace

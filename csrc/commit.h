// The fused commit: one pass over W, W*, Omega and F, no m x n temporary. See ttt.ops.commit for the formula.
//
// Rows of W are processed in blocks. For each block the drift of the replay rows is computed first, which brings the
// block's rows of W and W* into the cache. Then register tiles of G and of the trace's sum S are computed by a small
// matrix product over the tokens (product.h), and each tile is written at once (update.h).
//
// The replay part E^T V of G belongs to the same product: E and V are appended as tokens T + 1 to T + R.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "drift.h"
#include "factors.h"
#include "product.h"
#include "replay.h"
#include "scratch.h"
#include "update.h"

namespace {

// Sets carry, gain, remember and share, which ttt/ops/momentum.py derives (`remember` is called `keep` there).
inline void set_momentum(const ttt::Commit& a, Scalars& k) {
  const double mu = a.mu, keep = std::pow(mu, static_cast<double>(a.tokens));
  const double share = (1 - keep) / (static_cast<double>(a.tokens) * (1 - mu));
  k.remember = static_cast<float>(keep);
  k.share = static_cast<float>(share);
  k.carry = static_cast<float>(mu * (1 - keep) / (1 - mu));
  k.gain = static_cast<float>((1 - mu * share) / (1 - mu));
}

// Whether matrix units compute the products of this commit.
inline bool tiles_fit(bool dot, const ttt::Commit& a) {
  return dot && NC == ttt::TILE_COLUMNS && a.tiles != nullptr && a.tokens >= a.tiles->fewest;
}

template <int MR>
__attribute__((always_inline)) inline void take_sums(vf (&to)[MR][NV], const float* sums, float scale) {
#pragma GCC unroll 8
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) to[r][v] = load(sums + r * NC + v * VL) * scale;
}

// Tiles are FLAT for up to HANDFUL tokens and MID for fewer than MANY_TOKENS. (4096 x 4096 in bfloat16, T = 16:
// FLAT 8.6 ms and MID 7.5 on one thread of Zen 5, but 5.8 and 6.1 on two of Zen 4; T = 1, Zen 5: 6.0 and 6.3.) TALL is
// 6 % faster at 256 tokens and up to 12 % slower at 64.
constexpr int64_t HANDFUL = 4;
constexpr int64_t MANY_TOKENS = 256;
// With replay and at most this many tokens, blocks are so small that rows of W stay in the cache between drift and
// update.
constexpr int64_t FEW_TOKENS = 32;
// How many tiles ahead of the one being written W, W*, Omega and F are prefetched; high tiles take longer, so that
// fewer are enough. (2048 x 2048 in bfloat16, Zen 4: T = 64 6.1 ms with 2, 6.7 with 1; T = 16 2.20 with 2, 2.30
// with 3.)
template <int MR>
constexpr int64_t TILES_AHEAD = VL == 16 && MR != FLAT ? 2 : 3;

// `dot`: multiply pairs of bfloat16; otherwise both factors are widened to float32. `moves`: there is a momentum.
template <int MR, bool dot, bool moves, class W, class S>
void commit(const ttt::Commit& a) {
  const int64_t m = a.m, n = a.n, tokens = a.tokens;
  const W *x = static_cast<const W*>(a.x), *delta = static_cast<const W*>(a.delta);
  W* weight = static_cast<W*>(a.weight);
  const W* anchor = static_cast<const W*>(a.anchor);

  double total_eta = 0;
  bool one_eta = true;
  for (int64_t t = 0; t < tokens; t++) {
    total_eta += a.eta[t];
    one_eta = one_eta && a.eta[t] == a.eta[0];
  }
  const float sum_eta = static_cast<float>(total_eta);
  Replay replay(filled_rows(a) > 0 ? a.replay_rows : 0, n);
  draw_replay<W>(a, replay);
  const bool pulls = a.lam > 0 || a.decay > 0, traces = a.trace != nullptr && tokens > 0;
  const Traced traced = traces ? traced_tokens(a) : Traced();
  const int64_t chosen = static_cast<int64_t>(traced.token.size());

  Scalars k;
  double keep = 1;
  for (int64_t t = 0; t < tokens; t++) keep *= a.gamma;
  k.keep = static_cast<float>(keep);
  k.pull = a.lam * sum_eta;
  k.decay = a.decay * sum_eta;
  k.si = a.kind == ttt::kSi;
  k.writes = replay.rows > 0 || moves;
  for (int64_t t = 0; t < tokens; t++) k.writes = k.writes || a.eta[t] != 0;
  k.draws = (sizeof(W) == 2 && k.writes) || (traces && sizeof(S) < 4) || (moves && a.momentum_dtype == ttt::kBF16);
  if constexpr (moves) set_momentum(a, k);
  const StepKey step_key(a.seed, static_cast<uint32_t>(*a.step));

  Units u;
  u.g = dot ? (tokens + 1) / 2 : tokens;
  u.s = dot ? (chosen + 1) / 2 : chosen;
  u.rows = replay.rows;
  u.parts = dot && !one_eta ? 2 : 1;
  u.scale = dot && one_eta && tokens ? a.eta[0] : 1.0f;
  const bool tiled = tiles_fit(dot, a);
  if (tiled) {
    const auto whole = [](int64_t units) { return (units + ttt::TILE - 1) / ttt::TILE * ttt::TILE; };
    u.g = whole(u.g);
    u.s = whole(u.s);
  }
  Units of_tokens = u;
  of_tokens.rows = 0;

  const int64_t panels = (n + NC - 1) / NC;
  Scratch packed(panels * u.right());
  // (X_r X^T) * eta: with delta, the change of the remembered outputs by the tokens being written.
  Scratch cross(replay.rows * tokens);

  // Row blocks: with replay, W and W* of one block stay in the L2 cache between drift and update, unless there are so
  // many tokens that reading their panels again for each block would cost more.
  const int64_t bytes_per_row = 2 * n * static_cast<int64_t>(sizeof(W));
  int64_t block = replay.rows && tokens <= FEW_TOKENS ? (384 << 10) / bytes_per_row : BLOCK_ROWS;
  block = block < 2 * TALL ? 2 * TALL : (block > BLOCK_ROWS ? BLOCK_ROWS : block);
  block = block / MR * MR;
  // Panels in one group stay in the L2 cache while the block's rows go over them, with as much left for these rows.
  // (4096 x 4096 in bfloat16, T = 64, Zen 5 with 1 MB: 16.6 ms with panels of 256 KB, 15.2 with 512, 16.5 with 768.)
  const int64_t panel_bytes = u.right() * 4,
                half_cache = std::clamp<int64_t>(second_level_bytes() / 2, 256 << 10, 1 << 20);
  int64_t group = panel_bytes * panels <= half_cache ? panels : half_cache / panel_bytes;
  if (group < 1 || tiled) group = 1;

  const double work = static_cast<double>(m) * n * (4 + tokens + replay.rows);
  const int threads = work < 65536 ? 1 : a.threads;
  const int64_t left_size = (block * u.left() + 15) / 16 * 16, drift_size = replay.rows * BLOCK_ROWS;
  const int64_t tile_size = tiled ? BLOCK_ROWS * (u.parts * u.g + u.s + 2 * NC) + 16 : 0;
  const int64_t own = left_size + drift_size + tile_size + 64;
  Scratch scratch(own * threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* left = scratch.get() + own * omp_get_thread_num();
    float* drift = left + left_size;
    uint32_t* left_tiles = reinterpret_cast<uint32_t*>(drift + drift_size);
    float* sums = drift + drift_size + BLOCK_ROWS * (u.parts * u.g + u.s);  // of G, and below them of S
    alignas(64) char configured[64] = {};
    if (tiled) a.tiles->begin(configured);
    RowKey keys[BLOCK_ROWS];

#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t j0 = p * NC, count = n - j0;
      float* to = packed.get() + p * u.right();
      const int step = dot ? 2 : 1;
      const auto pack = [&](int64_t first, int64_t second, int kind) {  // -1: no token
        pack_unit<W, dot>(x + first * n + j0, second < 0 ? nullptr : x + second * n + j0, first < 0 ? 0 : count, kind,
                          to);
        to += NC;
      };
      for (int64_t t = 0; t < step * u.g; t += step) pack(t < tokens ? t : -1, t + 1 < tokens ? t + 1 : -1, ttt::kSi);
      for (int64_t r = 0; r < replay.rows; r++, to += NC)
        std::memcpy(to, replay.v.get() + r * replay.width + j0, NC * sizeof(float));
      for (int64_t c = 0; c < step * u.s; c += step)
        pack(c < chosen ? traced.token[c] : -1, c + 1 < chosen ? traced.token[c + 1] : -1, a.kind);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      for (int64_t r = 0; r < replay.rows; r++) {
        Two acc = {};
        for (int64_t j = 0; j < n; j += STRIP) {
          const Two v = load2_upto<splits<W>>(x + t * n + j, n - j);
          acc.a += v.a * load(replay.at(r, j));
          acc.b += v.b * load(replay.at(r, j) + VL);
        }
        cross.get()[t * replay.rows + r] = sum(acc.a + acc.b) * a.eta[t] * (moves ? k.gain : 1.0f);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i0 = 0; i0 < m; i0 += block) {
      const int64_t rows = m - i0 < block ? m - i0 : block;
      for (int64_t i = 0; i < rows && k.draws; i++) keys[i] = step_key.of_row(i0 + i);
      if (replay.rows) {
        const W *w = weight + i0 * n, *w0 = anchor + i0 * n;
        if constexpr (!moves)
          drift_of_rows(w, w0, n, rows, replay, drift);
        else if (a.momentum_dtype == ttt::kF32)
          drift_of_rows(w, w0, n, rows, replay, drift, static_cast<const float*>(a.momentum) + i0 * n, k.carry);
        else
          drift_of_rows(w, w0, n, rows, replay, drift, static_cast<const bf16*>(a.momentum) + i0 * n, k.carry);
        for (int64_t t = 0; t < tokens; t++)
          for (int64_t r = 0; r < replay.rows; r++) {
            const vf c = splat(cross.get()[t * replay.rows + r]);
            float* to = drift + r * BLOCK_ROWS;
            for (int64_t i = 0; i < rows; i += VL)
              store(to + i, load(to + i) - c * load_upto(delta + t * m + i0 + i, m - i0 - i));
          }
      }
      const Tiling<MR> tiling(rows, tiled);
      pack_left<MR, dot, W>(a, u, traced, drift, i0, tiling, left);
      const int64_t row_tiles = (rows + ttt::TILE - 1) / ttt::TILE, chunks_g = u.g / ttt::TILE;
      uint32_t* s_tiles = left_tiles + row_tiles * u.parts * u.g * ttt::TILE;
      if (tiled) {
        for (int64_t part = 0; part < u.parts; part++)
          tiles_of<MR>(left + part * u.g * MR, u.left(), u.g, rows, left_tiles + part * row_tiles * u.g * ttt::TILE);
        tiles_of<MR>(left + (u.parts * u.g + u.rows) * MR, u.left(), u.s, rows, s_tiles);
      }
      for (int64_t p0 = 0; p0 < panels; p0 += group) {
        if (tiled) {
          const uint32_t* right = reinterpret_cast<const uint32_t*>(packed.get() + p0 * u.right());
          for (int64_t part = 0; part < u.parts; part++)
            a.tiles->multiply(left_tiles + part * row_tiles * u.g * ttt::TILE, right, chunks_g, row_tiles, part > 0,
                              sums);
          a.tiles->multiply(s_tiles, right + (u.g + u.rows) * NC, u.s / ttt::TILE, row_tiles, false,
                            sums + BLOCK_ROWS * NC);
        }
        const int64_t p1 = p0 + group < panels ? p0 + group : panels;
        for (int64_t at = 0; at < tiling.tiles; at++) {
          const int64_t i = tiling.first(at);
          const int tall = tiling.tall(at);
          const float* factors = left + at * MR * u.left();
          for (int64_t p = p0; p < p1; p++) {
            vf g[MR][NV] = {}, s[MR][NV] = {};
            const int64_t j0 = p * NC;
            Rows<MR, W, S> tile(a, i0 + i, j0, tiling.apart);
            // The tile to prefetch: some tiles from here, possibly in the next rows.
            const int64_t q = p + (TILES_AHEAD<MR> < p1 - p0 ? TILES_AHEAD<MR> : p1 - p0), beyond = q - p1;
            const Rows<MR, W, S> ahead(a, i0 + tiling.first(beyond < 0 ? at : at + 1),
                                       (beyond < 0 ? q : p0 + beyond) * NC, tiling.apart);
            const float* right = packed.get() + p * u.right();
            if (tiled) {
              take_sums<MR>(g, sums + i * NC, u.scale);
              take_sums<MR>(s, sums + (BLOCK_ROWS + i) * NC, 1.0f);
            }
            if constexpr (moves) {
              if (!tiled) sum_g<MR, dot>(g, of_tokens, factors, right);
              tile.pass_momentum(tall, g, keys + i, k);
              add_products<MR>(g, factors + u.parts * u.g * MR, right + u.g * NC, u.rows);
            } else if (tiled) {
              add_products<MR>(g, factors + u.parts * u.g * MR, right + u.g * NC, u.rows);
            } else if (k.writes) {
              sum_g<MR, dot>(g, u, factors, right);
            }
            if (traces && !tiled) sum_s<MR, dot>(s, u, factors, right);
            tile.update(tall, g, s, keys + i, k, pulls, traces, ahead);
          }
        }
      }
    }
    if (tiled) a.tiles->end(configured);
  }
  *a.step += 1;
}

template <bool dot, class W, class S>
void commit_by_size(const ttt::Commit& a) {
  if (a.momentum != nullptr && a.tokens > 0)  // one height of tiles for all token counts keeps the code small
    commit<MID, dot, true, W, S>(a);
  else if (FLAT != TALL && a.tokens <= HANDFUL)
    commit<FLAT, dot, false, W, S>(a);
  else if (MID != TALL && a.tokens < MANY_TOKENS)
    commit<MID, dot, false, W, S>(a);
  else
    commit<TALL, dot, false, W, S>(a);
}

template <class W, class S>
void commit_by_rate(const ttt::Commit& a) {
  // A float32 momentum needs float32 products: eta delta as a sum of two bfloat16 would be off by 5e-7.
  const bool precise = a.momentum != nullptr && a.momentum_dtype == ttt::kF32;
  if (dots<W> && !precise && (!a.slow_dots || a.tokens <= HANDFUL || tiles_fit(true, a)))
    commit_by_size<dots<W>, W, S>(a);
  else
    commit_by_size<false, W, S>(a);
}

template <class W>
void commit_by_state(const ttt::Commit& a) {
  if (a.state_dtype == ttt::kF32)
    commit_by_rate<W, float>(a);
  else if (a.state_dtype == ttt::kBF16)
    commit_by_rate<W, bf16>(a);
  else
    commit_by_rate<W, log8>(a);
}

void run_commit(const ttt::Commit& given) {
  if (given.dtype == ttt::kF32) {
    commit_by_state<float>(given);
    return;
  }
  // NaN rates from other devices may have all bits set: see `plain_nan`.
  ttt::Commit a = given;
  std::vector<float> eta(a.eta, a.eta + a.tokens);
  for (float& rate : eta)
    if (std::isnan(rate)) rate = std::numeric_limits<float>::quiet_NaN();
  a.eta = eta.data();
  commit_by_state<bf16>(a);
}

}  // namespace

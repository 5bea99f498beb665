// The left factors of the commit's products: delta of the tokens, the drift of the replay rows, and f(P) of the trace.
#pragma once
#include <vector>

#include "philox.h"
#include "product.h"
#include "vec.h"

namespace {

constexpr int64_t BLOCK_ROWS = 48;  // most rows of W in a block: whole tiles and whole vectors

// The tiles of a block of rows. Row r of tile q is row `first(q) + r apart` of the block. So the block is divided into
// MR stretches of consecutive rows, and tile after tile reads each stretch as one stream from its begin to its end.
// With tiles of neighbouring rows, streams would end after every row (1024 columns of bfloat16 are half a page), and
// the processor's prefetchers would start again (1024 x 1024 from memory, T = 1, Zen 4: 0.37 ms instead of 0.24).
// Matrix units take neighbouring rows.
template <int MR>
struct Tiling {
  int64_t rows, tiles, apart;

  Tiling(int64_t rows, bool neighbours) : rows(rows), tiles((rows + MR - 1) / MR), apart(neighbours ? 1 : tiles) {}
  int64_t first(int64_t q) const { return apart == 1 ? q * MR : q; }
  int tall(int64_t q) const {  // rows of tile q
    const int64_t count = (rows - first(q) + apart - 1) / apart;
    return count < MR ? static_cast<int>(count) : MR;
  }
};

// The tokens over which the trace's S sums, and their weights: gamma^age times the size of the token's group.
struct Traced {
  std::vector<int64_t> token;
  std::vector<float> weight;
};

inline Traced traced_tokens(const ttt::Commit& a) {
  Traced out;
  std::vector<float> age(a.tokens);
  double power = 1;
  for (int64_t t = a.tokens - 1; t >= 0; t--, power *= a.gamma) age[t] = static_cast<float>(power);
  uint32_t words[4] = {};
  for (int64_t k = 0, t0 = 0; t0 < a.tokens; k++, t0 += a.trace_every) {
    const int64_t size = a.tokens - t0 < a.trace_every ? a.tokens - t0 : a.trace_every;
    int64_t t = t0;
    if (a.trace_every > 1) {
      if (k % 4 == 0) philox(static_cast<uint32_t>(k / 4), 0, static_cast<uint32_t>(*a.step), kToken, a.seed, words);
      t += static_cast<int64_t>((static_cast<uint64_t>(words[k % 4]) * static_cast<uint64_t>(size)) >> 32);
    }
    out.token.push_back(t);
    out.weight.push_back((a.kind == ttt::kSi ? 1.0f : age[t]) * static_cast<float>(size));
  }
  return out;
}

// Packs the left factors for the rows of W from i0 on, with the rows of a tile interleaved: out[(tile * u.left() +
// unit)
// * MR + row]. Values for rows past the end of W are not used.
template <int MR, bool dot, class W>
inline void pack_left(const ttt::Commit& a, const Units& u, const Traced& traced, const float* drift, int64_t i0,
                      const Tiling<MR>& tiling, float* out) {
  const W *delta = static_cast<const W*>(a.delta), *trace_delta = static_cast<const W*>(a.trace_delta);
  const int64_t chosen = static_cast<int64_t>(traced.token.size());
  const auto rows_of = [&](const W* of, int64_t t, int64_t i) {
    return load_upto(of + t * a.m + i0 + i, a.m - i0 - i);
  };
  const auto of_g = [&](int64_t t, int64_t i) { return t < a.tokens ? rows_of(delta, t, i) : vf{}; };
  const auto of_s = [&](int64_t c, int64_t i) {
    if (c >= chosen) return vf{};
    return factor_of({rows_of(trace_delta, traced.token[c], i), vf{}}, a.kind).a * traced.weight[c];
  };
  const auto pair = [](vf v, vf w) { return (vf)((nearest(v) >> 16) | (nearest(w) & 0xffff0000u)); };
  // Packs the next unit; value(i) gives VL rows from row i on.
  alignas(64) float unit[BLOCK_ROWS + VL] = {};
  const auto put = [&](auto value) {
    for (int64_t i = 0; i < tiling.rows; i += VL) store(unit + i, value(i));
    for (int64_t q = 0; q < tiling.tiles; q++)
      for (int r = 0; r < MR; r++) out[q * MR * u.left() + r] = unit[tiling.first(q) + r * tiling.apart];
    out += MR;
  };
  if constexpr (dot) {
    const auto scaled = [&](int64_t t, int64_t i) { return t < a.tokens ? of_g(t, i) * a.eta[t] : vf{}; };
    const auto rest = [](vf v) { return v - (vf)(nearest(v) & 0xffff0000u); };
    for (int64_t t = 0; t < 2 * u.g; t += 2)
      if (u.parts == 1)
        put([&](int64_t i) { return pair(of_g(t, i), of_g(t + 1, i)); });
      else
        put([&](int64_t i) { return pair(scaled(t, i), scaled(t + 1, i)); });
    for (int64_t t = 0; t < 2 * u.g && u.parts == 2; t += 2)
      put([&](int64_t i) { return pair(rest(scaled(t, i)), rest(scaled(t + 1, i))); });
  } else {
    for (int64_t t = 0; t < a.tokens; t++) put([&](int64_t i) { return a.eta[t] * of_g(t, i); });
  }
  for (int64_t q = 0; q < u.rows; q++) put([&](int64_t i) { return load(drift + q * BLOCK_ROWS + i); });
  if constexpr (dot)
    for (int64_t c = 0; c < 2 * u.s; c += 2) put([&](int64_t i) { return pair(of_s(c, i), of_s(c + 1, i)); });
  else
    for (int64_t c = 0; c < chosen; c++) put([&](int64_t i) { return of_s(c, i); });
}

// Repacks the first `units` units that pack_left packed for neighbouring rows into tiles of 16 rows and 16 units
// (tiles.h), with units innermost. Rows from `rows` on are zero.
template <int MR>
inline void tiles_of(const float* packed, int64_t stride, int64_t units, int64_t rows, uint32_t* out) {
  constexpr int64_t tile = ttt::TILE;
  for (int64_t i0 = 0; i0 < rows; i0 += tile)
    for (int64_t u0 = 0; u0 < units; u0 += tile, out += tile * tile)
      for (int64_t i = i0; i < i0 + tile; i++)
        for (int64_t u = 0; u < tile; u++) {
          uint32_t pair = 0;
          if (i < rows) std::memcpy(&pair, packed + i / MR * MR * stride + (u0 + u) * MR + i % MR, sizeof pair);
          out[(i - i0) * tile + u] = pair;
        }
}

}  // namespace

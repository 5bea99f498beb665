// Register tiles of the two products over tokens: G = (eta D)^T X + E^T V and S = f(P)^T f(X).
//
// Both factors are packed first: the left one with MR rows interleaved, the right one in panels of NC columns, in the
// order of W's strips (vec.h). If the processor multiplies pairs of bfloat16 (TTT_DOT), a unit of the products is two
// tokens; otherwise it is one token in float32. Replay rows are always float32.
#pragma once
#if defined(TTT_ISA_AVX512BF16)
#include <immintrin.h>
#define TTT_DOT 1
#else
#define TTT_DOT 0
#endif

#include "vec.h"

namespace {

// A register tile is MR rows by NV vectors. With very many tokens a commit is bound by arithmetic, and MR is TALL: the
// most sums that leave registers for the factors (SSE and AVX2 have 16 registers, AVX-512 has 32). With few tokens it
// is bound by memory, and MR is FLAT: few rows of each of its matrices stream faster than many. In between MR is
// MID, whose update is unrolled. NC is a multiple of 32, the columns of an 8-bit block.
constexpr int TALL = VL == 16 ? 6 : (VL == 8 ? 3 : 1);
constexpr int MID = VL == 16 ? 4 : TALL;
constexpr int FLAT = VL == 16 ? 2 : TALL;
constexpr int NV = VL == 4 ? 8 : 4;
constexpr int NC = NV * VL;

template <class W>
constexpr bool dots = TTT_DOT && splits<W>;

// acc[r][v] += sum over t of d[t][r] * x[t][v]
template <int MR>
__attribute__((always_inline)) inline void add_products(vf (&acc)[MR][NV], const float* __restrict d,
                                                        const float* __restrict x, int64_t count) {
  for (int64_t t = 0; t < count; t++, d += MR, x += NC) {
    vf value[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) value[v] = load(x + v * VL);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      const vf dr = splat(d[r]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[r][v] += dr * value[v];
    }
  }
}

// The same for pairs of bfloat16 in d and x: two tokens at once.
template <int MR>
__attribute__((always_inline)) inline void add_dots([[maybe_unused]] vf (&acc)[MR][NV],
                                                    [[maybe_unused]] const uint32_t* __restrict d,
                                                    [[maybe_unused]] const uint32_t* __restrict x,
                                                    [[maybe_unused]] int64_t pairs) {
#if TTT_DOT
  for (int64_t t = 0; t < pairs; t++, d += MR, x += NC) {
    __m512bh value[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) value[v] = (__m512bh)load_as<vu>(x + v * VL);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++) {
      const __m512bh dr = (__m512bh)_mm512_set1_epi32(static_cast<int>(d[r]));
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], dr, value[v]);
    }
  }
#endif
}

// The number of units of each product. The packed factors hold the units of G, then the replay rows, then those of S.
struct Units {
  int64_t g;      // units of G
  int64_t parts;  // left factors of each unit of G: 2 if eta delta is split into two bfloat16, else 1
  int64_t rows;   // replay rows
  int64_t s;      // units of S
  float scale;    // of G's units: eta if it is the same for all tokens (the left factor is then delta alone), else 1

  int64_t left() const { return parts * g + rows + s; }  // times MR
  int64_t right() const { return (g + rows + s) * NC; }
};

template <int MR, bool dot>
__attribute__((always_inline)) inline void sum_g(vf (&acc)[MR][NV], const Units& u, const float* left,
                                                 const float* right) {
  if constexpr (dot) {
    for (int64_t part = 0; part < u.parts; part++)
      add_dots<MR>(acc, reinterpret_cast<const uint32_t*>(left) + part * u.g * MR,
                   reinterpret_cast<const uint32_t*>(right), u.g);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[r][v] *= u.scale;
    add_products<MR>(acc, left + u.parts * u.g * MR, right + u.g * NC, u.rows);
  } else {
    add_products<MR>(acc, left, right, u.g + u.rows);
  }
}

template <int MR, bool dot>
__attribute__((always_inline)) inline void sum_s(vf (&acc)[MR][NV], const Units& u, const float* left,
                                                 const float* right) {
  left += (u.parts * u.g + u.rows) * MR;
  right += (u.g + u.rows) * NC;
  if constexpr (dot)
    add_dots<MR>(acc, reinterpret_cast<const uint32_t*>(left), reinterpret_cast<const uint32_t*>(right), u.s);
  else
    add_products<MR>(acc, left, right, u.s);
}

// -- packing ------------------------------------------------------------------------------------------------------

inline Two squared(Two v) { return {v.a * v.a, v.b * v.b}; }

// The factor of S for each kind of trace: x, |x| or x^2.
inline Two factor_of(Two v, int kind) {
  if (kind == ttt::kFisher) return squared(v);
  if (kind == ttt::kMas) return {abs(v.a), abs(v.b)};
  return v;
}
inline float factor_of(float v, int kind) {
  if (kind == ttt::kFisher) return v * v;
  if (kind == ttt::kMas) return v < 0 ? -v : v;
  return v;
}

// Packs NC columns of a token as float32, or of a pair of tokens as bfloat16 (x1 is null for a single token). Columns
// from `count` on are zero.
template <class W, bool dot>
inline void pack_unit(const W* x0, const W* x1, int64_t count, int kind, float* to) {
  for (int at = 0; at < NC; at += STRIP, to += STRIP) {
    Two v = {}, w = {};
    const int64_t left = count - at;
    if (left > 0) v = factor_of(load2_upto<splits<W>>(x0 + at, left), kind);
    if constexpr (dot) {
      if (left > 0 && x1 != nullptr) w = factor_of(load2_upto<splits<W>>(x1 + at, left), kind);
      v.a = (vf)((nearest(v.a) >> 16) | (nearest(w.a) & 0xffff0000u));
      v.b = (vf)((nearest(v.b) >> 16) | (nearest(w.b) & 0xffff0000u));
    }
    store(to, v.a);
    store(to + VL, v.b);
  }
}

inline uint32_t nearest1(float v) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  if (v != v) return 0x7fc0u;
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

inline float widened(uint32_t bits) {
  const bf16 b = {static_cast<uint16_t>(bits)};
  return load1(&b);
}

}  // namespace

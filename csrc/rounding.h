// Random bits for the rows of one register tile: Philox 4x32-7, 16 bits for each column.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "philox.h"
#include "product.h"
#include "vec.h"

namespace {

// Products of the even 32-bit lanes, 64 bits each. Compilers do not see that one instruction does this:
// written as a 64-bit product it takes three.
inline vq multiply_even(vq x, uint32_t by) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(by));
#else
  return (x & 0xffffffffu) * by;
#endif
}

// [p0 q0 p2 q2 ...] and [p1 q1 p3 q3 ...]
#if defined(__AVX512F__)
inline vq even64(vq p, vq q) { return (vq)_mm512_unpacklo_epi64((__m512i)p, (__m512i)q); }
inline vq odd64(vq p, vq q) { return (vq)_mm512_unpackhi_epi64((__m512i)p, (__m512i)q); }
#elif defined(__AVX2__)
inline vq even64(vq p, vq q) { return (vq)_mm256_unpacklo_epi64((__m256i)p, (__m256i)q); }
inline vq odd64(vq p, vq q) { return (vq)_mm256_unpackhi_epi64((__m256i)p, (__m256i)q); }
#else
inline vq even64(vq p, vq q) { return vq{p[0], q[0]}; }
inline vq odd64(vq p, vq q) { return vq{p[1], q[1]}; }
#endif

// 16 bits for columns [0, 4 VL) of `rows` rows, in column order, and likewise of the next `across` - 1 panels of NC
// columns. out[(c * rows + r) * NC / 2 + column / 2] is a word of two columns; counters are (c0 + column / 8, c1 + r,
// c2). They stay in 64-bit lanes, whose upper halves hold waste: the products read lower halves only, so that no round
// has to move anything between lanes.
template <int rows, int across>
inline void rounding_bits(uint32_t c0, uint32_t c1, uint32_t c2, uint64_t seed, uint32_t* __restrict out) {
  constexpr int lanes = VL / 2, chains = rows * across;
  vq a[chains], b[chains], c[chains], d[chains];
  vq first;
  // So that even64 and odd64 below leave the counters in order.
  for (int l = 0; l < lanes; l++) first[l] = c0 + l / 2 + (l % 2) * (lanes / 2);
  for (int q = 0; q < chains; q++) {
    a[q] = first + static_cast<uint64_t>(q / rows * (NC / 8));
    b[q] = vq{} + (c1 + q % rows);
    c[q] = vq{} + c2;
    d[q] = vq{} + static_cast<uint64_t>(kRound);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 8
  for (int round = 0; round < kRoundRounds; round++) {
#pragma GCC unroll 8
    for (int q = 0; q < chains; q++) {
      const vq p0 = multiply_even(a[q], 0xD2511F53u), p1 = multiply_even(c[q], 0xCD9E8D57u);
      a[q] = (p1 >> 32) ^ b[q] ^ static_cast<uint64_t>(k0);
      c[q] = (p0 >> 32) ^ d[q] ^ static_cast<uint64_t>(k1);
      b[q] = p1;
      d[q] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#pragma GCC unroll 8
  for (int q = 0; q < chains; q++) {
    const vq ab = (a[q] & 0xffffffffu) | (b[q] << 32), cd = (c[q] & 0xffffffffu) | (d[q] << 32);
    const vq words[2] = {even64(ab, cd), odd64(ab, cd)};
    std::memcpy(out + q * (NC / 2), words, sizeof words);
  }
}

}  // namespace

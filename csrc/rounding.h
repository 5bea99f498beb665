// Random bits for one row of one register tile: Philox on VL counters at once.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "philox.h"
#include "vec.h"

namespace {

typedef uint64_t vq __attribute__((vector_size(4 * VL)));

// Products of the even 32-bit lanes, 64 bits each. Compilers do not see that one instruction does this:
// written as a 64-bit product it took three, and the whole generator 3.6 ns an element instead of 0.9.
inline vq multiply_even(vu x, uint32_t by) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(by));
#else
  return ((vq)x & 0xffffffffu) * by;
#endif
}

inline void multiply(vu x, uint32_t by, vu& high, vu& low) {
  const vq even = multiply_even(x, by), odd = multiply_even((vu)((vq)x >> 32), by);
  const vq upper = vq{} + 0xffffffff00000000u;
  high = (vu)((even >> 32) | (odd & upper));
  low = (vu)((even & ~upper) | (odd << 32));
}

// [p0 q0 p1 q1] and [p2 q2 p3 q3] of every 128-bit lane, in units of 32 or of 64 bits.
#if defined(__AVX512F__)
inline vu low32(vu p, vu q) { return (vu)_mm512_unpacklo_epi32((__m512i)p, (__m512i)q); }
inline vu high32(vu p, vu q) { return (vu)_mm512_unpackhi_epi32((__m512i)p, (__m512i)q); }
inline vu low64(vu p, vu q) { return (vu)_mm512_unpacklo_epi64((__m512i)p, (__m512i)q); }
inline vu high64(vu p, vu q) { return (vu)_mm512_unpackhi_epi64((__m512i)p, (__m512i)q); }
#elif defined(__AVX2__)
inline vu low32(vu p, vu q) { return (vu)_mm256_unpacklo_epi32((__m256i)p, (__m256i)q); }
inline vu high32(vu p, vu q) { return (vu)_mm256_unpackhi_epi32((__m256i)p, (__m256i)q); }
inline vu low64(vu p, vu q) { return (vu)_mm256_unpacklo_epi64((__m256i)p, (__m256i)q); }
inline vu high64(vu p, vu q) { return (vu)_mm256_unpackhi_epi64((__m256i)p, (__m256i)q); }
#else
inline vu low32(vu p, vu q) { return vu{p[0], q[0], p[1], q[1]}; }
inline vu high32(vu p, vu q) { return vu{p[2], q[2], p[3], q[3]}; }
inline vu low64(vu p, vu q) { return vu{p[0], p[1], q[0], q[1]}; }
inline vu high64(vu p, vu q) { return vu{p[2], p[3], q[2], q[3]}; }
#endif

// The words of counters (c0 ... c0 + VL - 1, c1, c2), word w of counter l in out[4 * l + w]: column order.
inline void rounding_bits(uint32_t c0, uint32_t c1, uint32_t c2, uint64_t seed, uint32_t* __restrict out) {
  vu a, b = vu{} + c1, c = vu{} + c2, d = vu{} + static_cast<uint32_t>(kRound);
  // Lane 4q + p carries counter p VL/4 + q: the transposition below, which stays within 128-bit lanes,
  // then leaves the words in order.
  for (int l = 0; l < VL; l++) a[l] = c0 + (l % 4) * (VL / 4) + l / 4;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    vu high0, low0, high1, low1;
    multiply(a, 0xD2511F53u, high0, low0);
    multiply(c, 0xCD9E8D57u, high1, low1);
    a = high1 ^ b ^ k0;
    c = high0 ^ d ^ k1;
    b = low1;
    d = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const vu ab0 = low32(a, b), ab1 = high32(a, b), cd0 = low32(c, d), cd1 = high32(c, d);
  const vu words[4] = {low64(ab0, cd0), high64(ab0, cd0), low64(ab1, cd1), high64(ab1, cd1)};
  std::memcpy(out, words, sizeof words);
}

}  // namespace

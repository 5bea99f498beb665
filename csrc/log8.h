// Importance and trace in 8 bits; the format is defined in ttt/ops/log8.py.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "vec.h"

namespace {

struct log8 {
  uint8_t code;
};

constexpr int BLOCK = 32;               // columns that share an exponent
constexpr uint32_t FIRST = 111 << 4;    // the bits of 2^-16, shifted right by 19
constexpr float SMALLEST = 0x1.1p-16f;  // code 1

template <int order>
using Order = std::integral_constant<int, order>;

inline int64_t packed_width(int64_t n) { return n + (n + BLOCK - 1) / BLOCK; }

inline float scale_of(uint32_t exponent) {
  const uint32_t u = exponent << 23;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// Decodes one strip of codes, which lies within one block.
template <bool split>
inline void codes2(const log8* p, vu& a, vu& b) {
  if constexpr (split) {
    const vu pairs = __builtin_convertvector(load_as<vh>(p), vu);
    a = pairs & 0xffu;
    b = pairs >> 8;
  } else {
    typedef uint8_t vb __attribute__((vector_size(VL)));
    a = __builtin_convertvector(load_as<vb>(p), vu);
    b = __builtin_convertvector(load_as<vb>(p + VL), vu);
  }
}

inline vf decode(vu code, float scale) {
  const vf value = (vf)((code + FIRST) << 19) * scale;
  return code != 0 ? value : vf{};
}

template <bool split>
inline Two decode2(const log8* p, uint8_t exponent) {
#if defined(__AVX512BW__)
  if constexpr (split) {  // both columns of a pair at once, as the upper halves of two floats
    const __m512i codes = _mm512_cvtepu8_epi16(load_as<__m256i>(p));
    const __mmask32 some = _mm512_test_epi16_mask(codes, codes);
    // The scale is added to the exponents, which is exact if the smallest code is a normal number.
    const int scale = exponent > 16 ? (exponent - 127) << 7 : 0;
    const __m512i first = _mm512_set1_epi16(static_cast<short>((FIRST << 3) + scale));
    const vu pairs = (vu)_mm512_maskz_add_epi16(some, _mm512_slli_epi16(codes, 3), first);
    const Two v = {(vf)(pairs << 16), (vf)(pairs & constant<0xffff0000u>())};
    if (__builtin_expect(exponent > 16, 1)) return v;
    return {v.a * scale_of(exponent), v.b * scale_of(exponent)};
  }
#endif
  vu a, b;
  codes2<split>(p, a, b);
  const float scale = scale_of(exponent);
  return {decode(a, scale), decode(b, scale)};
}

// The code of v / scale, rounded by 16 bits r.
inline vu encode(vf v, vf inverse, vu r) {
  const vf scaled = v * inverse;
  const vi code = (vi)(((vu)scaled + ((r << 3) | 4u)) >> 19) - static_cast<int32_t>(FIRST);
  const float unit = SMALLEST * 0x1p-16f;
  const vf threshold = __builtin_convertvector((vi)r, vf) * unit + 0.5f * unit;
  const vi one = vi{} + 1, top = vi{} + 255;
  const vi inside = code > top ? top : code;
  const vi small = scaled > threshold ? one : vi{};
  return (vu)(scaled < SMALLEST ? small : inside);
}

template <bool split>
inline void store_codes2(log8* p, vu a, vu b) {
  if constexpr (split) {
    const vh pairs = __builtin_convertvector(a | (b << 8), vh);
    std::memcpy(p, &pairs, sizeof pairs);
  } else {
    typedef uint8_t vb __attribute__((vector_size(VL)));
    const vb first = __builtin_convertvector(a, vb), second = __builtin_convertvector(b, vb);
    std::memcpy(p, &first, sizeof first);
    std::memcpy(p + VL, &second, sizeof second);
  }
}

// Encodes one strip with one set of random bits per lane.
template <bool split>
inline void encode_strip(log8* p, const Two& v, vf inverse, const Bits& bits) {
  store_codes2<split>(p, encode(v.a, inverse, bits.a), encode(v.b, inverse, bits.b));
}

// The bits of the largest of values >= 0; such bits are ordered like the values.
inline uint32_t largest(vu v) {
#if defined(__AVX512F__)
  return static_cast<uint32_t>(_mm512_reduce_max_epi32((__m512i)v));
#else
  uint32_t lanes[VL], top = 0;
  std::memcpy(lanes, &v, sizeof v);
  for (int l = 0; l < VL; l++) top = lanes[l] > top ? lanes[l] : top;
  return top;
#endif
}

inline uint32_t exponent_for(uint32_t top) {
  if (top == 0) return 0;
  const uint32_t exponent = ((top + 0x7ffffu) >> 23) + 1;
  return exponent > 253 ? 253 : exponent;
}

inline vu larger(vu a, vu b) {
#if defined(__AVX512F__)
  return (vu)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  return (vi)a > (vi)b ? a : b;
#endif
}

// Encodes BLOCK columns, given as strips, with one set of random bits per lane. Returns the exponent.
template <bool split>
inline uint8_t encode_block(log8* p, const Two* strips, const Bits* bits) {
  constexpr int count = BLOCK / STRIP;
  vu top = {};
  for (int s = 0; s < count; s++) top = larger(larger((vu)strips[s].a, (vu)strips[s].b), top);
  const uint32_t exponent = exponent_for(largest(top));
  const float inverse = scale_of(254 - exponent);
  for (int s = 0; s < count; s++) encode_strip<split>(p + s * STRIP, strips[s], vf{} + inverse, bits[s]);
  return static_cast<uint8_t>(exponent);
}

#if defined(__AVX512BW__)
// Encodes a block that is one strip, both columns of a pair at once. `inverse` is the inverse scale in all lanes.
inline void encode_pairs(log8* p, const Two& v, vf inverse, const Bits& bits) {
  const vu four = constant<4>();
  const vu a = (vu)(v.a * inverse) + (bits.a << 3 | four), b = (vu)(v.b * inverse) + (bits.b << 3 | four);
  const vu pairs = merge(b >> 3, constant<0xffff0000u>(), a >> 19);
  // A code of 2 or more was at least 1 before it was rounded. Zeros have no bits left. Other values this small are
  // rare.
  constexpr uint32_t one = FIRST + 1;
  const __mmask32 inside = _mm512_cmpgt_epu16_mask((__m512i)pairs, (__m512i)constant<one << 16 | one>());
  if (__builtin_expect(!_kortestc_mask32_u8(inside, inside), 0) &&
      _mm512_mask_test_epi16_mask(~inside, (__m512i)pairs, (__m512i)pairs)) {
    encode_strip<true>(p, v, inverse, bits);
    return;
  }
  const __m512i code = _mm512_sub_epi16((__m512i)pairs, (__m512i)constant<FIRST << 16 | FIRST>());
  const __m256i codes = _mm512_maskz_cvtusepi16_epi8(inside, code);
  std::memcpy(p, &codes, sizeof codes);
}

// Encodes two such blocks, whose maxima are found together.
inline void encode_two(log8* p, uint8_t* exponents, const Two* strips, const Bits* bits) {
  const vu first = larger((vu)strips[0].a, (vu)strips[0].b), second = larger((vu)strips[1].a, (vu)strips[1].b);
  const auto quarters = [](vu a, vu b, auto order) {
    return (vu)_mm512_shuffle_i64x2((__m512i)a, (__m512i)b, decltype(order)::value);
  };
  const auto within = [](vu a, auto order) {
    return (vu)_mm512_shuffle_epi32((__m512i)a, static_cast<_MM_PERM_ENUM>(decltype(order)::value));
  };
  // The lower half of the vector belongs to the first block, the upper half to the second.
  vu top = larger(quarters(first, second, Order<0x44>()), quarters(first, second, Order<0xee>()));
  top = larger(top, quarters(top, top, Order<0xb1>()));
  top = larger(top, within(top, Order<0x4e>()));
  top = larger(top, within(top, Order<0xb1>()));
  const __m512i beyond = (__m512i)(((top + constant<0x7ffffu>()) >> 23) + constant<1>());
  const __mmask16 some = _mm512_test_epi32_mask((__m512i)top, (__m512i)top);
  const vu exponent = (vu)_mm512_maskz_min_epu32(some, beyond, (__m512i)constant<253>());
  const __m128i bytes = _mm_bsrli_si128(_mm512_cvtepi32_epi8((__m512i)exponent), VL / 2 - 1);
  std::memcpy(exponents, &bytes, 2);
  const vu inverse = (constant<254>() - exponent) << 23;
  encode_pairs(p, strips[0], (vf)quarters(inverse, inverse, Order<0x00>()), bits[0]);
  encode_pairs(p + STRIP, strips[1], (vf)quarters(inverse, inverse, Order<0xff>()), bits[1]);
}
#endif

// Encodes the blocks of a row of `strips` strips.
template <bool split, int strips>
inline void encode_blocks(log8* p, uint8_t* exponents, const Two (&values)[strips], const Bits (&bits)[strips]) {
#if defined(__AVX512BW__)
  if constexpr (split && strips == 2) {
    encode_two(p, exponents, values, bits);
    return;
  }
#endif
  constexpr int each = BLOCK / STRIP;
#pragma GCC unroll 4
  for (int b = 0; b < strips / each; b++)
    exponents[b] = encode_block<split>(p + b * BLOCK, values + b * each, bits + b * each);
}

}  // namespace

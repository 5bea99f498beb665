// Importance and trace in 8 bits; the format is defined in ttt/ops/log8.py.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace {

struct log8 {
  uint8_t code;
};

constexpr int BLOCK = 32;               // columns that share an exponent
constexpr uint32_t FIRST = 111 << 4;    // the bits of 2^-16, shifted right by 19
constexpr float SMALLEST = 0x1.1p-16f;  // code 1

inline int64_t packed_width(int64_t n) { return n + (n + BLOCK - 1) / BLOCK; }

inline float scale_of(uint32_t exponent) {
  const uint32_t u = exponent << 23;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// One strip of codes, none of it beyond the block's end.
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
  vu a, b;
  codes2<split>(p, a, b);
  const float scale = scale_of(exponent);
  return {decode(a, scale), decode(b, scale)};
}

// The code of v / scale, rounded by 16 bits r.
inline vu encode(vf v, float inverse, vu r) {
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

// The largest of values >= 0, as bits: they order like the values.
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

inline vu larger(vu a, vu b) { return (vi)a > (vi)b ? a : b; }

// Encode BLOCK columns, given as strips; bits are those of the strips' lanes. Returns the exponent.
template <bool split>
inline uint8_t encode_block(log8* p, const Two* strips, const Bits<split>* bits) {
  constexpr int count = BLOCK / STRIP;
  vu top = {};
  for (int s = 0; s < count; s++) top = larger(larger((vu)strips[s].a, (vu)strips[s].b), top);
  const uint32_t exponent = exponent_for(largest(top));
  const float inverse = scale_of(254 - exponent);
  for (int s = 0; s < count; s++) {
    vu a, b;
    if constexpr (split)
      a = bits[s].pairs & 0xffffu, b = bits[s].pairs >> 16;
    else
      a = bits[s].a, b = bits[s].b;
    store_codes2<split>(p + s * STRIP, encode(strips[s].a, inverse, a), encode(strips[s].b, inverse, b));
  }
  return static_cast<uint8_t>(exponent);
}

}  // namespace

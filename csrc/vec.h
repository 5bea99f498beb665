// Vectors of VL floats in the compiler's vector extension: compiler flags turn the same source into SSE2/NEON, AVX2 or
// AVX-512 code. Included by kernels.cpp only.
//
// Matrices are read in strips of 2 VL columns, as two vectors. For 16-bit weights these are the even and the odd
// columns, which one shift and one mask extract from a vector of pairs; two contiguous halves would take shuffles, in
// both directions. Other operands are packed in the same order as the strips that they meet.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__unix__)
#include <unistd.h>
#endif

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace {

constexpr int VL = TTT_VL;
constexpr int STRIP = 2 * VL;

typedef float vf __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint64_t vq __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

struct bf16 {
  uint16_t bits;
};

struct Two {
  vf a, b;
};

#if defined(__AVX512F__)
// A vector constant that is loaded from memory. Otherwise compilers build it from a general register, with two
// instructions at each use when all vector registers are taken.
template <uint32_t value>
struct InMemory {
  static constexpr uint32_t word = value;
};
template <uint32_t value>
inline vu constant() {
  vu v;
  asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(InMemory<value>::word));
  return v;
}
// (x and y) or z.
inline vu merge(vu x, vu y, vu z) { return (vu)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)y, (__m512i)z, 0xea); }
#else
template <uint32_t value>
inline vu constant() {
  return vu{} + value;
}
#endif

inline vf splat(float s) { return s - vf{}; }

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const float* p) { return load_as<vf>(p); }
inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16); }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// The first `count` < VL elements, followed by zeros.
template <class T>
inline vf load_upto(const T* p, int64_t count) {
  if (count >= VL) return load(p);
  T part[VL] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) {
  const uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// Whether the two vectors of a strip of T are its even and odd columns; otherwise they are its two halves.
template <class T>
constexpr bool splits = sizeof(T) == 2;

// The position of column j of a strip in its two vectors.
template <bool split>
inline int place(int j) {
  return split ? j / 2 + (j % 2) * VL : j;
}

// Replaces each NaN by the one that arithmetic makes, whose lower half is zero. NaNs from other devices may have all
// bits set.
inline vf plain_nan(vf v) { return v == v ? v : (vf)(vu{} + 0x7fc00000u); }

template <bool split>
inline Two load2(const float* p) {
  if constexpr (!split) return {load(p), load(p + VL)};
  Two v;
  for (int l = 0; l < VL; l++) v.a[l] = p[2 * l];
  for (int l = 0; l < VL; l++) v.b[l] = p[2 * l + 1];
  return {plain_nan(v.a), plain_nan(v.b)};  // store2_rounded: what is computed from them may be rounded
}
template <bool split>
inline Two load2(const bf16* p) {
  if constexpr (split) {
    const vu raw = load_as<vu>(p);
    return {(vf)(raw << 16), (vf)(raw & constant<0xffff0000u>())};
  }
  return {load(p), load(p + VL)};
}

// The first `count` < STRIP columns, followed by zeros.
template <bool split, class T>
inline Two load2_part(const T* p, int64_t count) {
  T part[STRIP] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load2<split>(part);
}
template <bool split, class T>
inline Two load2_upto(const T* p, int64_t count) {
  return count >= STRIP ? load2<split>(p) : load2_part<split>(p, count);
}

// The first `count` numbers of a strip of 16-bit numbers in the order of memory, followed by zeros.
template <class T>
inline vf load_raw(const T* p, int64_t count) {
  if (count >= STRIP) return load_as<vf>(p);
  T part[STRIP] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load_as<vf>(part);
}

// Prefetches the next part of a stream over a matrix, past the end of a row too: the processor's own prefetchers stop
// at each page, and a row of 4096 bfloat16 is two pages. The target is the second-level cache, because the first can
// wait for fewer lines at a time, and streams of many rows 4 KB apart would evict each other from it.
constexpr int AHEAD = 1024;

template <int level = 2, class T>
inline void prefetch_strip(const T* p, int64_t ahead = AHEAD) {
  for (size_t byte = 0; byte < STRIP * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead + byte, 0, 4 - level);
}

// The sizes of a core's data caches in bytes; 0 where they are unknown.
inline int64_t first_level_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  return size;
#else
  return 0;
#endif
}
inline int64_t second_level_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return size;
#else
  return 0;
#endif
}

// Whether streams are prefetched into the first-level cache instead, in whose 48 KB with 12 ways they do not evict each
// other.
inline bool streams_fit_first_level() { return first_level_bytes() >= 48 << 10; }

// Lanes that are not finite have an exponent of ones: isfinite has no vector form.
inline vu finite_mask(vu u) { return (vu)((u & 0x7f800000u) != 0x7f800000u); }

// The first half of stochastic rounding to bfloat16: adds 16 random bits to the lower half of a float32, which the
// caller then drops.
inline vu round_up_by(vf v, vu bits) {
#if defined(__AVX512DQ__)
  const __mmask16 not_finite = _mm512_fpclass_ps_mask((__m512)v, 0x99);
  return (vu)_mm512_mask_add_epi32((__m512i)v, static_cast<__mmask16>(~not_finite), (__m512i)v, (__m512i)bits);
#else
  return (vu)v + (bits & finite_mask((vu)v));
#endif
}

// The random bits of a strip: 16 for each column, in the lower half of its lane.
struct Bits {
  vu a, b;
};

// The bits of words that hold those of two columns each.
template <bool split>
inline Bits bits_of(vu words) {
  if constexpr (split) {
    return {words & 0xffffu, words >> 16};
  } else {
    vh half[2];
    std::memcpy(half, &words, sizeof half);
    return {__builtin_convertvector(half[0], vu), __builtin_convertvector(half[1], vu)};
  }
}

// Stores a strip in the order of its columns.
template <bool split>
inline void store2(float* p, Two v) {
  if constexpr (split) {
    for (int l = 0; l < VL; l++) p[2 * l] = v.a[l];
    for (int l = 0; l < VL; l++) p[2 * l + 1] = v.b[l];
  } else {
    store(p, v.a);
    store(p + VL, v.b);
  }
}

// The same, rounded stochastically if T is bfloat16. Returns the stored values.
template <bool split>
inline Two store2_rounded(float* p, Two v, const Bits&) {
  store2<split>(p, v);
  return v;
}
template <bool split>
inline Two store2_rounded(bf16* p, Two v, const Bits& bits) {
  if constexpr (split) {
    // Infinity stays as it is, because its lower half is zero. So does a NaN from a 16-bit number or from `plain_nan`.
    // Testing for others here would double the number of instructions.
    const vu a = (vu)v.a + bits.a, b = (vu)v.b + bits.b;
#if defined(__AVX512F__)
    const vu pairs = merge(b, constant<0xffff0000u>(), a >> 16);
#else
    const vu pairs = (b & 0xffff0000u) | (a >> 16);
#endif
    std::memcpy(p, &pairs, sizeof pairs);
    return {(vf)(pairs << 16), (vf)(pairs & constant<0xffff0000u>())};
  } else {
    const vu a = round_up_by(v.a, bits.a), b = round_up_by(v.b, bits.b);
    const vh first = __builtin_convertvector(a >> 16, vh), second = __builtin_convertvector(b >> 16, vh);
    std::memcpy(p, &first, sizeof first);
    std::memcpy(p + VL, &second, sizeof second);
    return {(vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u)};
  }
}

// Rounds to nearest even; the upper half of the result is the bfloat16.
inline vu nearest(vf v) {
  const vu u = (vu)v, is_nan = (vu)(v != v);
  return ((u + 0x7fffu + ((u >> 16) & 1u)) & ~is_nan) | (0x7fc00000u & is_nan);
}

inline void store_nearest(float* p, vf v) { store(p, v); }
inline void store_nearest(bf16* p, vf v) {
  const vh h = __builtin_convertvector(nearest(v) >> 16, vh);
  std::memcpy(p, &h, sizeof h);
}

// Rounds `count` columns in the order of strips to T, in the order of columns.
template <class T>
inline void store_strips(const float* acc, int64_t count, T* y) {
  for (int64_t j = 0; j < count; j += STRIP) {
    float strip[STRIP];
    T rounded[STRIP];
    store2<splits<T>>(strip, {load(acc + j), load(acc + j + VL)});
    store_nearest(rounded, load(strip));
    store_nearest(rounded + VL, load(strip + VL));
    std::memcpy(y + j, rounded, (count - j < STRIP ? count - j : STRIP) * sizeof(T));
  }
}

inline vf abs(vf v) { return (vf)((vu)v & 0x7fffffffu); }

inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);  // in the same order as below, which takes twice as long through memory
#endif
  float lanes[VL];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = VL / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

}  // namespace

// Vectors of VL floats in the compiler's own vector extension: the same source becomes SSE2/NEON,
// AVX2 or AVX-512 code by the flags it is compiled with. Included by kernels.cpp only.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr int VL = TTT_VL;

typedef float vf __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

struct bf16 {
  uint16_t bits;
};

inline vf splat(float s) { return s - vf{}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) {
  const uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Finite lanes are selected by an all-ones exponent: -ffast-math is never used, but isfinite has no vector form.
inline vu finite_mask(vu u) { return (vu)((u & 0x7f800000u) != 0x7f800000u); }

inline vf store_rounded(float* p, vf v, vu) {
  store(p, v);
  return v;
}
// Stochastic rounding: add 16 random bits below the cut, then cut. Returns what was stored.
inline vf store_rounded(bf16* p, vf v, vu bits) {
  vu u = (vu)v;
  u = (u + (bits & 0xffffu & finite_mask(u))) >> 16;
  const vh h = __builtin_convertvector(u, vh);
  std::memcpy(p, &h, sizeof h);
  return (vf)(u << 16);
}
// Round to nearest even, for activations.
inline void store_nearest(float* p, vf v) { store(p, v); }
inline void store_nearest(bf16* p, vf v) {
  vu u = (vu)v;
  const vu is_nan = (vu)(v != v);
  u = ((u + 0x7fffu + ((u >> 16) & 1u)) & ~is_nan) | (0x7fc00000u & is_nan);
  const vh h = __builtin_convertvector(u >> 16, vh);
  std::memcpy(p, &h, sizeof h);
}

inline vf abs(vf v) { return (vf)((vu)v & 0x7fffffffu); }

inline float sum(vf v) {
  float lanes[VL];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = VL / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

// The first `count` < VL elements, zeros behind them.
template <class T>
inline vf load_part(const T* p, int64_t count) {
  T part[VL] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <class T>
inline vf load_upto(const T* p, int64_t count) {
  return count >= VL ? load(p) : load_part(p, count);
}

}  // namespace

// GELU by the tanh formula, and its derivative: `gelu` and `gelu_slope` of ttt/ops/sequence/dual_form.py.
//
// With u = c (z + a z^3), e = exp(-2 u) and s = 1 / (1 + e), (1 + tanh u) / 2 is s. So gelu(z) = z s, and its
// derivative is s + 2 z s (1 - s) c (1 + 3 a z^2). With t = s (1 - s), u' = c (1 + 3 a z^2) and u'' = 6 a c z, the
// second derivative is t (4 u' + z (2 u'' + 4 u'^2 (1 - 2 s))).
#pragma once
#include "vec.h"

namespace {

constexpr float GELU_C = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float GELU_A = 0.044715f;

// 2^x with an error of at most two units in the last place; infinite from 128 on and for NaN, 0 up to -126.
inline vf power_of_two(vf x) {
  x = x < 128.0f ? x : splat(128.0f);
  // The sum with 1.5 * 2^23 has the nearest whole number in its lowest bits.
  const vf shifted = x + splat(12582912.0f), r = x - (shifted - splat(12582912.0f));
  // The polynomial closest to 2^r for |r| <= 1/2 among those that are 1 at 0: its relative error is 2e-9, with
  // coefficients in float32 2e-8.
  vf p = splat(0.000153577785f);
  p = p * r + splat(0.001339896f);
  p = p * r + splat(0.00961842015f);
  p = p * r + splat(0.0555033237f);
  p = p * r + splat(0.240226477f);
  p = p * r + splat(0.693147182f);
  p = p * r + splat(1.0f);
  p = (vf)((vu)p + ((vu)shifted << 23));
  return x > -126.0f ? p : vf{};
}

// e, for z and its square.
inline vf gelu_exponential(vf z, vf square) {
  constexpr float scale = -2.0f * GELU_C * 1.4426950408889634f;  // by log2(e)
  return power_of_two(z * (splat(scale) + splat(scale * GELU_A) * square));
}

inline vf gelu(vf z) { return z / (splat(1.0f) + gelu_exponential(z, z * z)); }

// gelu(z), and its derivative in `slope`.
inline vf gelu(vf z, vf* slope) {
  const vf square = z * z, e = gelu_exponential(z, square), s = splat(1.0f) / (splat(1.0f) + e), value = z * s;
  // 1 - s: near s = 1 the difference would lose its digits, and where s is 0, e may be infinite.
  const vf rest = z > 0.0f ? e * s : splat(1.0f) - s;
  *slope = s + value * rest * (splat(2.0f * GELU_C) + splat(6.0f * GELU_A * GELU_C) * square);
  return value;
}

// gelu(z), and its first two derivatives in `slope` and `curve`.
inline vf gelu(vf z, vf* slope, vf* curve) {
  const vf square = z * z, e = gelu_exponential(z, square), s = splat(1.0f) / (splat(1.0f) + e), value = z * s;
  const vf rest = z > 0.0f ? e * s : splat(1.0f) - s;
  const vf rise = splat(2.0f * GELU_C) + splat(6.0f * GELU_A * GELU_C) * square;  // 2 u'
  *slope = s + value * rest * rise;
  const vf bend = splat(12.0f * GELU_A * GELU_C) * square + rise * (splat(2.0f) + z * rise * (rest - s));
  // Far from 0 it is 0, and the factors might be infinite.
  *curve = abs(z) < 16.0f ? s * rest * bend : vf{};
  return value;
}

}  // namespace

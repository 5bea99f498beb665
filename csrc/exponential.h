// The exponential function of vectors.
#pragma once
#include <limits>

#include "vec.h"

namespace {

// e^x for x <= 0, with an error of one unit in the last place; 0 below -87, and infinite for NaN.
inline vf exponential(vf x) {
  // The sum with 1.5 * 2^23 has the nearest whole number in its lowest bits.
  const vf shifted = x * 1.44269504f + splat(12582912.0f), whole = shifted - splat(12582912.0f);
  // ln 2 in two parts, of which the first has so few digits that its product with a whole number is exact.
  const vf r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  p = (vf)((vu)p + ((vu)shifted << 23));
  return x > -87.0f ? p : (x == x ? vf{} : splat(std::numeric_limits<float>::infinity()));
}

}  // namespace

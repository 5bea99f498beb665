// Vectors of WL doubles, and products of small matrices, of doubles or of bfloat16 numbers, which are faster and exact.
#pragma once
#include <algorithm>
#include <memory>
#include <type_traits>

#include "product.h"
#include "scratch.h"
#include "vec.h"

namespace {

constexpr int WL = VL / 2;
// Rows and columns of small matrices are padded with zeros to a multiple of this.
constexpr int PAD = VL == 4 ? 4 : 2 * WL;

typedef double vw __attribute__((vector_size(8 * WL)));
typedef float vn __attribute__((vector_size(4 * WL)));
typedef uint32_t vnu __attribute__((vector_size(4 * WL)));
typedef uint16_t vnh __attribute__((vector_size(2 * WL)));

template <class Real>
using Lanes = std::conditional_t<std::is_same_v<Real, double>, vw, vf>;

inline int64_t padded(int64_t size) { return (size + PAD - 1) / PAD * PAD; }
inline int64_t wide(int64_t size) { return (size + WL - 1) / WL * WL; }

// A buffer of uninitialised doubles that only grows.
class Wide {
 public:
  void need(int64_t doubles) {
    if (doubles <= size_) return;
    data_ = std::make_unique<Scratch>(2 * doubles);
    size_ = doubles;
  }
  double* get() const { return data_ ? reinterpret_cast<double*>(data_->get()) : nullptr; }

 private:
  std::unique_ptr<Scratch> data_;
  int64_t size_ = 0;
};

inline vw load_wide(const double* p) { return load_as<vw>(p); }
inline vw load_wide(const float* p) { return __builtin_convertvector(load_as<vn>(p), vw); }
inline vw load_wide(const bf16* p) {
  return __builtin_convertvector((vn)(__builtin_convertvector(load_as<vnh>(p), vnu) << 16), vw);
}
template <class Real, class T>
inline Lanes<Real> load_lanes(const T* p) {
  if constexpr (std::is_same_v<Real, double>)
    return load_wide(p);
  else
    return load(p);
}
inline void store(double* p, vw v) { std::memcpy(p, &v, sizeof v); }

inline double sum(vw v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);  // in the same order as below, which takes twice as long through memory
#endif
  double lanes[WL];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = WL / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Widens `count` numbers to doubles or floats and pads them with zeros up to `width`, a multiple of the lanes.
template <class Real, class T>
inline void widen(const T* from, int64_t count, int64_t width, Real* to) {
  constexpr int lanes = sizeof(Lanes<Real>) / sizeof(Real);
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) store(to + j, load_lanes<Real>(from + j));
  if (j < count) {
    T part[lanes] = {};
    std::memcpy(part, from + j, (count - j) * sizeof(T));
    store(to + j, load_lanes<Real>(part));
    j += lanes;
  }
  for (; j < width; j += lanes) store(to + j, Lanes<Real>{});
}

// `size` is a multiple of WL.
inline double dot(const double* x, const double* y, int64_t size) {
  vw acc = {};
  for (int64_t j = 0; j < size; j += WL) acc += load_wide(x + j) * load_wide(y + j);
  return sum(acc);
}

// acc + left * right for a vector of E, the type of the numbers in memory: doubles, floats, or pairs of bfloat16.
template <class E>
struct Multiply {
  using Sum = Lanes<E>;
  static constexpr int step = sizeof(Sum) / sizeof(E);
  static Sum add(Sum acc, Sum left, Sum right) { return acc + left * right; }
};
#if TTT_DOT
template <>
struct Multiply<bf16> {
  using Sum = vf;
  static constexpr int step = 2 * VL;
  static Sum add(Sum acc, Sum left, Sum right) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)left, (__m512bh)right);
  }
};
#endif

// The sums of each of 16 vectors, with AVX-512 by a tree of shuffles: lane by lane they would take as long as the
// products of a short row.
template <class V>
inline void sums16(const V (&v)[4][4], double* out) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vf>) {
    __m512 fours[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      const __m512 a = (__m512)v[r][0], b = (__m512)v[r][1], c = (__m512)v[r][2], d = (__m512)v[r][3];
      const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
      const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
      fours[r] = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
    }
    const auto halved = [](__m512 a, __m512 b) {
      return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    };
    const vf all = (vf)halved(halved(fours[0], fours[1]), halved(fours[2], fours[3]));
    float part[16];
    std::memcpy(part, &all, sizeof part);
    for (int k = 0; k < 16; k++) out[k] = part[k];
  } else {
    const auto halved = [](__m512d a, __m512d b) {
      return _mm512_shuffle_f64x2(a, b, 0x88) + _mm512_shuffle_f64x2(a, b, 0xdd);
    };
    __m512d fours[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      const __m512d a = (__m512d)v[r][0], b = (__m512d)v[r][1], c = (__m512d)v[r][2], d = (__m512d)v[r][3];
      fours[r] = halved(_mm512_unpacklo_pd(a, b) + _mm512_unpackhi_pd(a, b),
                        _mm512_unpacklo_pd(c, d) + _mm512_unpackhi_pd(c, d));
    }
    const __m512d eights[2] = {halved(fours[0], fours[1]), halved(fours[2], fours[3])};
    std::memcpy(out, eights, sizeof eights);
  }
#else
#pragma GCC unroll 16
  for (int k = 0; k < 16; k++) out[k] = sum(v[k / 4][k % 4]);
#endif
}

// out[i][j] += x_i . y_j for rows of `size` numbers, `stride` apart. Both numbers of rows are multiples of 4, and
// `size` of Multiply<E>::step. With `lower`, only entries with j <= i are needed; a few others are computed too.
template <class E>
inline void add_row_products(const E* x, int64_t x_rows, const E* y, int64_t y_rows, int64_t stride, int64_t size,
                             bool lower, double* out, int64_t ld) {
  using Sum = typename Multiply<E>::Sum;
  constexpr int DJ = VL == 16 ? 4 : 2;  // columns of a tile's 4 x 4 sums at a time, limited by the registers
  for (int64_t i = 0; i < x_rows; i += 4)
    for (int64_t j = 0; j < (lower ? i + 4 : y_rows); j += 4) {
      Sum tile[4][4];
      for (int half = 0; half < 4; half += DJ) {
        Sum acc[4][DJ] = {};
        const E *xi = x + i * stride, *yj = y + (j + half) * stride;
        for (int64_t k = 0; k < size; k += Multiply<E>::step) {
          Sum right[DJ];
#pragma GCC unroll 4
          for (int s = 0; s < DJ; s++) right[s] = load_as<Sum>(yj + s * stride + k);
#pragma GCC unroll 4
          for (int r = 0; r < 4; r++) {
            const Sum left = load_as<Sum>(xi + r * stride + k);
#pragma GCC unroll 4
            for (int s = 0; s < DJ; s++) acc[r][s] = Multiply<E>::add(acc[r][s], left, right[s]);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
          for (int s = 0; s < DJ; s++) tile[r][half + s] = acc[r][s];
      }
      double sums[16];
      sums16(tile, sums);
      for (int r = 0; r < 4; r++)
        for (int s = 0; s < 4; s++) out[(i + r) * ld + j + s] += sums[4 * r + s];
    }
}

// out[i][:] = sum over r of factor[i][r] from[r][:]. `rows` is a multiple of PAD, `columns` of twice the lanes.
template <class Real>
inline void combine(const Real* factor, int64_t ld_factor, int64_t rows, int64_t inner, const Real* from,
                    int64_t ld_from, int64_t columns, Real* out, int64_t ld_out) {
  using V = Lanes<Real>;
  constexpr int CI = VL == 16 ? 8 : 4, CV = 2, lanes = sizeof(V) / sizeof(Real);
  for (int64_t i = 0; i < rows; i += CI)
    for (int64_t j = 0; j < columns; j += CV * lanes) {
      V acc[CI][CV] = {};
      for (int64_t r = 0; r < inner; r++) {
        V value[CV];
#pragma GCC unroll 4
        for (int v = 0; v < CV; v++) value[v] = load_as<V>(from + r * ld_from + j + v * lanes);
#pragma GCC unroll 8
        for (int k = 0; k < CI; k++)
#pragma GCC unroll 4
          for (int v = 0; v < CV; v++) acc[k][v] += factor[(i + k) * ld_factor + r] * value[v];
      }
#pragma GCC unroll 8
      for (int k = 0; k < CI; k++)
#pragma GCC unroll 4
        for (int v = 0; v < CV; v++) store(out + (i + k) * ld_out + j + v * lanes, acc[k][v]);
    }
}

}  // namespace

// Vectors of WL doubles, and products of small matrices of doubles.
#pragma once
#include <algorithm>
#include <memory>

#include "scratch.h"
#include "vec.h"

namespace {

constexpr int WL = VL / 2;
// Matrices of doubles have rows and columns padded with zeros to a multiple of this.
constexpr int PAD = VL == 4 ? 4 : 2 * WL;

typedef double vw __attribute__((vector_size(8 * WL)));
typedef float vn __attribute__((vector_size(4 * WL)));
typedef uint32_t vnu __attribute__((vector_size(4 * WL)));
typedef uint16_t vnh __attribute__((vector_size(2 * WL)));

inline int64_t padded(int64_t size) { return (size + PAD - 1) / PAD * PAD; }
inline int64_t wide(int64_t size) { return (size + WL - 1) / WL * WL; }

// Uninitialised doubles, as many as were ever needed.
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
inline void store(double* p, vw v) { std::memcpy(p, &v, sizeof v); }

inline double sum(vw v) {
  double lanes[WL];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = WL / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
  return lanes[0];
}

// `count` numbers as doubles, zeros behind them up to `width`, a multiple of WL.
template <class T>
inline void widen(const T* from, int64_t count, int64_t width, double* to) {
  int64_t j = 0;
  for (; j + WL <= count; j += WL) store(to + j, load_wide(from + j));
  if (j < count) {
    T part[WL] = {};
    std::memcpy(part, from + j, (count - j) * sizeof(T));
    store(to + j, load_wide(part));
    j += WL;
  }
  for (; j < width; j += WL) store(to + j, vw{});
}

// `size` is a multiple of WL.
inline double dot(const double* x, const double* y, int64_t size) {
  vw acc = {};
  for (int64_t j = 0; j < size; j += WL) acc += load_wide(x + j) * load_wide(y + j);
  return sum(acc);
}

// out[i][j] += x_i . y_j for rows of `size` numbers, `stride` apart; both numbers of rows are multiples of 4. `lower`:
// only for j up to i, and a few beyond.
inline void add_row_products(const double* x, int64_t x_rows, const double* y, int64_t y_rows, int64_t stride,
                             int64_t size, bool lower, double* out, int64_t ld) {
  constexpr int DI = 4, DJ = VL == 16 ? 4 : 2;  // as many sums as leave registers for the factors
  for (int64_t i = 0; i < x_rows; i += DI)
    for (int64_t j = 0; j < (lower ? i + DI : y_rows); j += DJ) {
      vw acc[DI][DJ] = {};
      const double *xi = x + i * stride, *yj = y + j * stride;
      for (int64_t k = 0; k < size; k += WL) {
        vw right[DJ];
#pragma GCC unroll 4
        for (int s = 0; s < DJ; s++) right[s] = load_wide(yj + s * stride + k);
#pragma GCC unroll 4
        for (int r = 0; r < DI; r++) {
          const vw left = load_wide(xi + r * stride + k);
#pragma GCC unroll 4
          for (int s = 0; s < DJ; s++) acc[r][s] += left * right[s];
        }
      }
      for (int r = 0; r < DI; r++)
        for (int s = 0; s < DJ; s++) out[(i + r) * ld + j + s] += sum(acc[r][s]);
    }
}

// out[i][:] = sum over r of factor[i][r] from[r][:]. `rows` and `columns` are multiples of PAD.
inline void combine(const double* factor, int64_t ld_factor, int64_t rows, int64_t inner, const double* from,
                    int64_t ld_from, int64_t columns, double* out, int64_t ld_out) {
  constexpr int CI = VL == 16 ? 8 : 4, CV = 2;
  for (int64_t i = 0; i < rows; i += CI)
    for (int64_t j = 0; j < columns; j += CV * WL) {
      vw acc[CI][CV] = {};
      for (int64_t r = 0; r < inner; r++) {
        vw value[CV];
#pragma GCC unroll 4
        for (int v = 0; v < CV; v++) value[v] = load_wide(from + r * ld_from + j + v * WL);
#pragma GCC unroll 8
        for (int k = 0; k < CI; k++)
#pragma GCC unroll 4
          for (int v = 0; v < CV; v++) acc[k][v] += factor[(i + k) * ld_factor + r] * value[v];
      }
      for (int k = 0; k < CI; k++)
        for (int v = 0; v < CV; v++) store(out + (i + k) * ld_out + j + v * WL, acc[k][v]);
    }
}

}  // namespace

// Products of small matrices in the cache, for the kernels of sequence layers.
//
// The right factor and the result have rows that are a multiple of VL long; the left factor is read by elements, so it
// may be transposed.
#pragma once
#include <algorithm>

#include "vec.h"

namespace {

// A register tile is TILE_ROWS rows by TILE_VECTORS vectors: AVX-512 has 32 registers, SSE and AVX2 have 16.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = VL == 16 ? 4 : 2;

enum Mode { kSet, kAdd, kSubtract };

// What is known to be zero: nothing; columns of the result above the diagonal; columns of the left factor above it;
// those below it.
enum Shape { kFull, kLowerResult, kLowerLeft, kUpperLeft };

struct Left {
  const float* data;
  int64_t by_row, by_column;  // steps in memory
};

inline int64_t whole_vectors(int64_t count) { return (count + VL - 1) / VL * VL; }

// Inline, so that the addresses are not found anew for each tile: with 16 tokens that took a fifth of the time.
template <int rows, int vectors, Mode mode>
__attribute__((always_inline)) inline void product_tile(Left a, const float* b, int64_t b_row, float* c, int64_t c_row,
                                                        int64_t inner) {
  vf sums[rows][vectors] = {};
  for (int64_t k = 0; k < inner; k++) {
    vf right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) right[j] = load(b + k * b_row + j * VL);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const vf left = splat(a.data[r * a.by_row + k * a.by_column]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) sums[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
      float* to = c + r * c_row + j * VL;
      if constexpr (mode == kSet) store(to, sums[r][j]);
      if constexpr (mode == kAdd) store(to, load(to) + sums[r][j]);
      if constexpr (mode == kSubtract) store(to, load(to) - sums[r][j]);
    }
}

template <int rows, Mode mode>
inline void product_rows(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t columns,
                         int64_t inner) {
  int64_t j = 0;
  for (; j + TILE_VECTORS * VL <= columns; j += TILE_VECTORS * VL)
    product_tile<rows, TILE_VECTORS, mode>(a, b + j, b_row, c + j, c_row, inner);
  for (; j < columns; j += VL) product_tile<rows, 1, mode>(a, b + j, b_row, c + j, c_row, inner);
}

template <Mode mode>
inline void product_block(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
                          int64_t inner, Shape shape) {
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    const int64_t some = rows - i < TILE_ROWS ? rows - i : TILE_ROWS, end = i + some;
    const int64_t wide = shape == kLowerResult && whole_vectors(end) < columns ? whole_vectors(end) : columns;
    const int64_t skip = shape == kUpperLeft && i < inner ? i : 0;
    const int64_t deep = (shape == kLowerLeft && end < inner ? end : inner) - skip;
    const Left from = {a.data + i * a.by_row + skip * a.by_column, a.by_row, a.by_column};
    const float* right = b + skip * b_row;
    float* to = c + i * c_row;
    switch (some) {
      case 1:
        product_rows<1, mode>(from, right, b_row, to, c_row, wide, deep);
        break;
      case 2:
        product_rows<2, mode>(from, right, b_row, to, c_row, wide, deep);
        break;
      case 3:
        product_rows<3, mode>(from, right, b_row, to, c_row, wide, deep);
        break;
      case 4:
        product_rows<4, mode>(from, right, b_row, to, c_row, wide, deep);
        break;
      case 5:
        product_rows<5, mode>(from, right, b_row, to, c_row, wide, deep);
        break;
      default:
        product_rows<6, mode>(from, right, b_row, to, c_row, wide, deep);
    }
  }
}

// c (rows x columns) = or += or -= a (rows x inner) b (inner x columns); `columns` is a multiple of VL. All rows meet a
// block of b before the next one, so that it is read once from beyond the first-level cache.
template <Mode mode>
inline void product_of(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
                       int64_t inner, Shape shape = kFull) {
  constexpr int64_t tile = TILE_VECTORS * VL, most = 4096;  // floats, half of a small first-level cache
  const int64_t block = std::max<int64_t>(most / (inner + 1) / tile, 1) * tile;
  if (shape == kLowerResult || rows <= TILE_ROWS || columns <= block)
    return product_block<mode>(a, b, b_row, c, c_row, rows, columns, inner, shape);
  for (int64_t j = 0; j < columns; j += block)
    product_block<mode>(a, b + j, b_row, c + j, c_row, rows, std::min(block, columns - j), inner, shape);
}

// x <- (I + a)^-1 x for a strictly lower triangular a (rows x rows) and x (rows x columns).
inline void solve_lower(const float* a, int64_t a_row, float* x, int64_t x_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    const int64_t some = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
    product_of<kSubtract>({a + i * a_row, a_row, 1}, x, x_row, x + i * x_row, x_row, some, columns, i);
    for (int64_t r = i + 1; r < i + some; r++)
      for (int64_t s = i; s < r; s++) {
        const vf factor = splat(a[r * a_row + s]);
        for (int64_t j = 0; j < columns; j += VL)
          store(x + r * x_row + j, load(x + r * x_row + j) - factor * load(x + s * x_row + j));
      }
  }
}

// x <- (I + a^T)^-1 x for a strictly lower triangular a (rows x rows) and x (rows x columns).
inline void solve_upper(const float* a, int64_t a_row, float* x, int64_t x_row, int64_t rows, int64_t columns) {
  for (int64_t i = (rows - 1) / TILE_ROWS * TILE_ROWS; i >= 0; i -= TILE_ROWS) {
    const int64_t end = rows - i < TILE_ROWS ? rows : i + TILE_ROWS;
    product_of<kSubtract>({a + end * a_row + i, 1, a_row}, x + end * x_row, x_row, x + i * x_row, x_row, end - i,
                          columns, rows - end);
    for (int64_t r = end - 2; r >= i; r--)
      for (int64_t s = r + 1; s < end; s++) {
        const vf factor = splat(a[s * a_row + r]);
        for (int64_t j = 0; j < columns; j += VL)
          store(x + r * x_row + j, load(x + r * x_row + j) - factor * load(x + s * x_row + j));
      }
  }
}

// Rows of `count` numbers that are `stride` apart become float32 rows of `wide` numbers, zeros at the end.
template <class T>
inline void read_rows(const T* from, int64_t stride, int64_t rows, int64_t count, float* to, int64_t wide) {
  for (int64_t r = 0; r < rows; r++) {
    int64_t j = 0;
    for (; j + VL <= count; j += VL) store(to + r * wide + j, load(from + r * stride + j));
    for (; j < wide; j += VL) store(to + r * wide + j, j < count ? load_upto(from + r * stride + j, count - j) : vf{});
  }
}

template <class T>
inline void write_rows(const float* from, int64_t wide, int64_t rows, int64_t count, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; r++) {
    int64_t j = 0;
    for (; j + VL <= count; j += VL) store_nearest(to + r * stride + j, load(from + r * wide + j));
    if (j < count) {
      T part[VL];
      store_nearest(part, load(from + r * wide + j));
      std::memcpy(to + r * stride + j, part, (count - j) * sizeof(T));
    }
  }
}

#if defined(__GNUC__) && !defined(__clang__)
// Swaps the lanes whose numbers have the bit `half` with those of the row that is `half` away: log2(VL) such steps
// transpose VL rows.
template <int half>
inline void swap_lanes(vf* rows) {
  vi first, second;
  for (int l = 0; l < VL; l++) {
    first[l] = l & half ? VL + l - half : l;
    second[l] = l & half ? VL + l : l + half;
  }
#pragma GCC unroll 16
  for (int r = 0; r < VL; r++) {
    if (r & half) continue;
    const vf a = rows[r], b = rows[r + half];
    rows[r] = __builtin_shuffle(a, b, first);
    rows[r + half] = __builtin_shuffle(a, b, second);
  }
  if constexpr (half * 2 < VL) swap_lanes<half * 2>(rows);
}
#endif

// to (columns x wide) = the transpose of from (rows x columns), with zeros behind the rows. `columns` and `wide` are
// multiples of VL.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t wide) {
#if defined(__GNUC__) && !defined(__clang__)
  for (int64_t r = 0; r < wide; r += VL)
    for (int64_t j = 0; j < columns; j += VL) {
      vf block[VL];
#pragma GCC unroll 16
      for (int l = 0; l < VL; l++) block[l] = r + l < rows ? load(from + (r + l) * from_row + j) : vf{};
      swap_lanes<1>(block);
#pragma GCC unroll 16
      for (int l = 0; l < VL; l++) store(to + (j + l) * wide + r, block[l]);
    }
#else
  for (int64_t j = 0; j < columns; j++)
    for (int64_t r = 0; r < wide; r++) to[j * wide + r] = r < rows ? from[r * from_row + j] : 0.0f;
#endif
}

// Sets what rows of a register tile read of a lower triangular matrix beyond their own columns.
inline void clear_above(float* matrix, int64_t row, int64_t i) {
  for (int64_t j = i + 1; j < i + TILE_ROWS && j < row; j++) matrix[i * row + j] = 0.0f;
}

// Each row of `to` becomes a factor times that of `from`, which may be `to`; or that is added to it. The factors are
// `step` apart.
template <Mode mode>
inline void scale_rows(const float* from, const float* factor, int64_t rows, int64_t wide, float* to,
                       int64_t step = 1) {
  static_assert(mode != kSubtract);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = r * wide; i < (r + 1) * wide; i += VL) {
      const vf found = splat(factor[r * step]) * load(from + i);
      store(to + i, mode == kSet ? found : load(to + i) + found);
    }
}

// The sum of the products of the numbers of two rows of whole vectors.
inline float dot(const float* x, const float* y, int64_t count) {
  vf total = {};
  for (int64_t j = 0; j < count; j += VL) total += load(x + j) * load(y + j);
  return sum(total);
}

// A vector of the sums of `rows` <= VL rows of VL numbers, zeros behind them.
inline vf sums_of_rows(const float* parts, int64_t rows) {
  float turned[VL * VL];
  transpose(parts, VL, rows, VL, turned, VL);
  vf total = {};
  for (int l = 0; l < VL; l++) total += load(turned + l * VL);
  return total;
}

}  // namespace

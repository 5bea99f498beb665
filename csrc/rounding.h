// Random bits for stochastic rounding, 16 for each column: the hash of ttt/ops/rounding.py.
#pragma once
#include <type_traits>

#include "philox.h"
#include "vec.h"

namespace {

constexpr uint32_t WEYL = 0x9E3779B9u;

// Hashes each word x with its key. U is one word or a vector of words.
template <class U>
inline U mix(U x, U key) {
  const auto times = [](U a, auto by) {
    if constexpr (std::is_same_v<U, vu>)
      return a * constant<by>();
    else
      return a * by;
  };
  x ^= x >> 16;
  x = times(x, std::integral_constant<uint32_t, 0x7feb352du>());
  x ^= (x >> 15) ^ key;
  x = times(x, std::integral_constant<uint32_t, 0x846ca68bu>());
  return x ^ (x >> 16);
}

// The keys of a row's words.
struct RowKey {
  uint32_t start, key;
};

// Makes the keys of the rows of one step.
class StepKey {
 public:
  StepKey(uint64_t seed, uint32_t step) { philox(0, 0, step, kRound, seed, words); }
  RowKey of_row(int64_t i) const {
    const uint32_t at = static_cast<uint32_t>(i) * WEYL;
    return {mix(words[0] + at, words[1]), mix(words[2] + at, words[3])};
  }

 private:
  uint32_t words[4];
};

// The words of columns [column, column + STRIP), one for each pair of columns.
inline vu random_words(RowKey row, int64_t column) {
  vu steps;
  for (int l = 0; l < VL; l++) steps[l] = static_cast<uint32_t>(l) * WEYL;
  return mix(steps + (row.start + static_cast<uint32_t>(column / 2) * WEYL), vu{} + row.key);
}

}  // namespace

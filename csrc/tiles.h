// Products of pairs of bfloat16 on matrix units, which each thread configures for itself.
#pragma once
#include <cstdint>

namespace ttt {

constexpr int TILE = 16;          // rows and columns of a tile of sums, and units that its factors hold
constexpr int TILE_COLUMNS = 64;  // of the right factor and of the sums, in memory

struct Tiles {
  int64_t fewest;  // matrix units are used from this many tokens on
  // Called before and after the products of a thread; `saved` (64 bytes) keeps the previous configuration.
  void (*begin)(void* saved);
  void (*end)(const void* saved);
  // sums[16 i + r][c] = the sum over units u of the products of the pairs left[i][u / 16][r][u % 16] and right[u][c],
  // for i < row_tiles and u < 16 chunks; `add` adds it to the previous sums. A pair is the lower and the upper half of
  // a word; products and sums are float32.
  void (*multiply)(const uint32_t* left, const uint32_t* right, int64_t chunks, int64_t row_tiles, bool add,
                   float* sums);
};

// AMX of Intel's processors (from Sapphire Rapids on); null where the processor, the kernel or the compiler has none.
const Tiles* amx_tiles();

// The same in plain C++, for tests on processors without matrix units.
const Tiles* emulated_tiles();

}  // namespace ttt

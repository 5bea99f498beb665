// Products of pairs of bfloat16 by matrix units, which are configured for one thread at a time.
#pragma once
#include <cstdint>

namespace ttt {

constexpr int TILE = 16;          // rows and columns of a tile of sums, and units that its factors hold
constexpr int TILE_COLUMNS = 64;  // of the right factor and of the sums, in memory

struct Tiles {
  int64_t fewest;  // tokens from which on they are used
  // Around the products of a thread; `saved` is 64 bytes for what was configured before.
  void (*begin)(void* saved);
  void (*end)(const void* saved);
  // sums[16 i + r][c] = the sum over units u of the products of the pairs left[i][u / 16][r][u % 16] and right[u][c],
  // for i < row_tiles and u < 16 chunks; with `add` in addition to what is there. A pair is the lower and the upper
  // half of a word; products and sums are float32.
  void (*multiply)(const uint32_t* left, const uint32_t* right, int64_t chunks, int64_t row_tiles, bool add,
                   float* sums);
};

// AMX of Intel's processors (from Sapphire Rapids on); null where the processor, the kernel or the compiler has none.
const Tiles* amx_tiles();

// The same in plain C++, for tests on processors without.
const Tiles* emulated_tiles();

}  // namespace ttt

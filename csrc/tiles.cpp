#include "tiles.h"

#include <cstring>

#if defined(TTT_X86) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define TTT_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ttt {
namespace {

constexpr int64_t WORDS = TILE * TILE;  // words of a tile

void nothing(void*) {}
void nothing_const(const void*) {}

float half(uint32_t word, int which) {
  const uint32_t bits = which ? word & 0xffff0000u : word << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void multiply_emulated(const uint32_t* left, const uint32_t* right, int64_t chunks, int64_t row_tiles, bool add,
                       float* sums) {
  for (int64_t row = 0; row < row_tiles * TILE; row++) {
    float* sum = sums + row * TILE_COLUMNS;
    if (!add) std::memset(sum, 0, TILE_COLUMNS * sizeof(float));
    for (int64_t u = 0; u < chunks * TILE; u++) {
      const uint32_t d = left[(row / TILE * chunks + u / TILE) * WORDS + row % TILE * TILE + u % TILE];
      const uint32_t* x = right + u * TILE_COLUMNS;
      for (int which = 0; which < 2; which++)
        for (int c = 0; c < TILE_COLUMNS; c++) sum[c] += half(d, which) * half(x[c], which);
    }
  }
}

#ifdef TTT_AMX
#define TTT_TARGET __attribute__((target("amx-tile,amx-bf16")))

bool permitted() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & (1u << 22)) || !(d & (1u << 24))) return false;  // AMX-BF16, AMX-TILE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & (3u << 17)) != (3u << 17)) return false;
  // A process must ask Linux for the tile registers (Documentation/arch/x86/xstate.rst).
  constexpr long request = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // bytes of a row of each tile
  uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64, "as the instruction wants it");

constexpr Configuration all_tiles() {
  Configuration all;
  for (int tile = 0; tile < 8; tile++) {
    all.bytes[tile] = TILE * 4;
    all.rows[tile] = TILE;
  }
  return all;
}

// Static, because the compiler knows of only the first 8 of the 64 bytes that the instruction reads.
const Configuration configuration = all_tiles();

TTT_TARGET void begin(void* saved) {
  _tile_storeconfig(saved);
  _tile_loadconfig(&configuration);
}

// Another library may rely on its own configuration, which is restored at the end.
TTT_TARGET void end(const void* saved) {
  if (*static_cast<const uint8_t*>(saved) == 0)
    _tile_release();
  else
    _tile_loadconfig(saved);
}

// Tiles 0 to 3 are the sums of 32 rows and 32 columns, 4 and 5 hold left factors, 6 and 7 right ones, so there is one
// load for each product. Without `two`, only the upper 16 rows are computed.
template <bool two>
TTT_TARGET void multiply_block(const uint32_t* left, const uint32_t* right, int64_t chunks, bool add, float* sums) {
  constexpr int64_t stride = TILE_COLUMNS * 4;
  float* below = sums + TILE * TILE_COLUMNS;
  if (add) {
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + TILE, stride);
    if constexpr (two) {
      _tile_loadd(2, below, stride);
      _tile_loadd(3, below + TILE, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < chunks; k++, left += WORDS, right += TILE * TILE_COLUMNS) {
    _tile_loadd(4, left, TILE * 4);
    _tile_loadd(6, right, stride);
    _tile_loadd(7, right + TILE, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (two) {
      _tile_loadd(5, left + chunks * WORDS, TILE * 4);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + TILE, stride);
  if constexpr (two) {
    _tile_stored(2, below, stride);
    _tile_stored(3, below + TILE, stride);
  }
}

void multiply_amx(const uint32_t* left, const uint32_t* right, int64_t chunks, int64_t row_tiles, bool add,
                  float* sums) {
  for (int64_t i = 0; i < row_tiles; i += 2)
    for (int64_t c = 0; c < TILE_COLUMNS; c += 2 * TILE) {
      const uint32_t* from = left + i * chunks * WORDS;
      float* to = sums + i * TILE * TILE_COLUMNS + c;
      if (i + 1 < row_tiles)
        multiply_block<true>(from, right + c, chunks, add, to);
      else
        multiply_block<false>(from, right + c, chunks, add, to);
    }
}
#endif

}  // namespace

const Tiles* amx_tiles() {
#ifdef TTT_AMX
  static const bool here = permitted();
  static const Tiles tiles = {33, begin, end, multiply_amx};
  return here ? &tiles : nullptr;
#else
  return nullptr;
#endif
}

const Tiles* emulated_tiles() {
  static const Tiles tiles = {1, nothing, nothing_const, multiply_emulated};
  return &tiles;
}

}  // namespace ttt

// Philox 4x32-10 (Salmon et al., SC 2011). The counters of each stream are listed in ttt/ops/philox.py.
#pragma once
#include <cstdint>

// No external linkage: the linker would keep one copy for all instruction sets, and not every processor could run it.
namespace {

enum Stream : uint32_t { kDraw = 0, kInsert = 1, kRound = 2, kToken = 3 };

// The four words of one counter.
inline void philox(uint32_t c0, uint32_t c1, uint32_t c2, Stream stream, uint64_t seed, uint32_t out[4]) {
  uint32_t c3 = stream, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

}  // namespace

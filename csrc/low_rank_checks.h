// Checks of the counters that say where the low-rank kernels read and write. They run before anything is written; the
// caller names the argument that is wrong (ttt/ops/low_rank/checks.py).
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "api.h"

namespace ttt {

// Whether every token's user is a slot or -1, and every slot that has tokens holds 0 to `capacity` rows; with
// `appends`, whether it also has room for a row of each of its tokens.
inline bool users_fit(const int32_t* users, const int32_t* rows, int64_t tokens, int64_t slots, int64_t capacity,
                      bool appends) {
  std::vector<int64_t> room(slots, -1);  // of the slots that have tokens
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t u = users[t];
    if (u < -1 || u >= slots) return false;
    if (u < 0) continue;
    if (room[u] < 0) {
      if (rows[u] < 0 || rows[u] > capacity) return false;
      room[u] = capacity - rows[u];
    }
    if (appends && room[u]-- == 0) return false;
  }
  return true;
}

// Whether slot `u` exists and its counters are ones that learning can give.
inline bool slot_fits(const LowRankCompress& a, int64_t u) {
  return 0 <= u && u < a.slots_in_pool && 0 <= a.rows[u] && a.rows[u] <= a.capacity && a.step[u] >= 0 &&
         std::isfinite(a.eta_sum[u]) && a.eta_sum[u] >= 0 && a.lost[u] >= 0;  // NaN is not >= 0
}

// Whether the replay memory can be drawn from, if it is to be.
inline bool memory_fits(const LowRankCompress& a) {
  return a.replay_rows == 0 || (a.memory_rows > 0 ? *a.seen >= 0 : *a.seen == 0);
}

}  // namespace ttt

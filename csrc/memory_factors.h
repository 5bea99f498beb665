// The gradients of gates and momenta of memories that learn: of `Factors` (memory.h), backwards through its recurrence.
#pragma once
#include <cstring>

#include "memory.h"

namespace {

// to *= by, for the lower triangles of the first `some` rows.
inline void multiply_lower(const float* by, int64_t some, int64_t bp, float* to) {
  for (int64_t i = 0; i < some; i++)
    for (int64_t j = 0; j <= i; j++) to[i * bp + j] *= by[i * bp + j];
}

// The gradients of the members of Factors, summed over the layers of a memory.
struct FactorsGradient {
  int64_t bp;
  float *seen, *kept, *moved, *newest;  // bp x bp, bp, bp, bp
  float left;
  float *momenta, *lefts, *of_seen, *of_newest;  // bp x bp, bp, bp, bp: of `finish`

  FactorsGradient(int64_t bp, Parts* parts) : bp(bp), left(0) {
    for (float** square : {&seen, &momenta}) *square = parts->take(bp * bp);
    for (float** row : {&kept, &moved, &newest, &lefts, &of_seen, &of_newest}) *row = parts->take(bp);
  }

  void begin() {
    std::memset(seen, 0, bp * bp * sizeof(float));
    for (float* row : {kept, moved, newest}) std::memset(row, 0, bp * sizeof(float));
    left = 0.0f;
  }

  // Writes the gradients of the gates and momenta of `some` tokens, `heads` apart, from those of the factors `f`; null
  // stands for none.
  void finish(const Factors& f, const float* gate, const float* momentum, int64_t heads, int64_t some, float* d_gate,
              float* d_momentum) const {
    float last = 1.0f;
    for (int64_t i = 0; i < some; i++) {
      const float b = momentum == nullptr ? 0.0f : momentum[i * heads];
      for (int64_t j = 0; j < i; j++) momenta[i * bp + j] = b * momenta[(i - 1) * bp + j];
      momenta[i * bp + i] = 1.0f;
      lefts[i] = last *= b;
    }
    float of_left = left, of_kept = 0.0f, of_moved = 0.0f;
    std::memset(of_seen, 0, bp * sizeof(float));
    std::memcpy(of_newest, newest, bp * sizeof(float));
    for (int64_t i = some - 1; i >= 0; i--) {
      const float a = gate == nullptr ? 1.0f : gate[i * heads], b = momentum == nullptr ? 0.0f : momentum[i * heads];
      of_kept += kept[i];
      of_moved += moved[i];
      of_left += of_moved;
      float of_gate = of_kept * (i == 0 ? 1.0f : f.kept[i - 1]), of_momentum = of_left * (i == 0 ? 1.0f : lefts[i - 1]);
      if (i > 0) of_gate += of_moved * f.moved[i - 1];
      for (int64_t j = 0; j <= i; j++) {
        of_seen[j] += seen[i * bp + j];
        of_newest[j] += of_seen[j];
        if (j < i) {
          of_gate += of_seen[j] * f.seen[(i - 1) * bp + j];
          of_momentum += of_newest[j] * momenta[(i - 1) * bp + j];
        }
        of_seen[j] *= a;
        of_newest[j] *= b;
      }
      of_kept *= a;
      of_moved *= a;
      of_left *= b;
      if (d_gate != nullptr) d_gate[i * heads] = of_gate;
      if (d_momentum != nullptr) d_momentum[i * heads] = of_momentum;
    }
  }
};

}  // namespace

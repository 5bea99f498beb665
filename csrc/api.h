// The boundary between the bindings and the kernels: plain structs of addresses and sizes.
// Shapes and dtypes are checked in ttt/ops/schema.py, before these structs are made.
#pragma once
#include <cstdint>

#include "tiles.h"

namespace ttt {

enum Dtype : int { kF32 = 0, kBF16 = 1, kLog8 = 2 };
enum Kind : int { kFisher = 0, kMas = 1, kSi = 2 };

struct WindowLinear {
  const void *x, *weight, *bias, *win_x, *win_delta;  // dtype; bias may be null
  const float* win_eta;                               // C
  void* y;                                            // T x m, dtype
  int64_t tokens, m, n, window;
  int dtype, threads;
  bool product_done;  // y already holds x W^T + b: only subtract the window's part
};

struct TransposedProduct {
  const void *x, *weight;  // rows x m, m x n: dtype
  void* y;                 // rows x n, likewise
  int64_t rows, m, n;
  int dtype, threads;
};

struct WindowPairs {
  const void *x, *delta, *win_x, *win_delta;  // rows x n, rows x m, window x n, window x m: dtype
  const float* weight;                        // window
  float* out;                                 // rows x window
  int64_t rows, m, n, window;
  int dtype, threads;
};

struct Commit {
  void* weight;             // m x n, dtype
  const void* anchor;       // m x n, dtype; null if neither pull nor replay needs it
  const void* importance;   // m x n, state_dtype (kLog8: rows of packed_width(n) bytes); null if lam is 0
  void* trace;              // likewise; may be null
  const void *x, *delta;    // T x n, T x m, dtype
  const float* eta;         // T
  const void* trace_delta;  // T x m, dtype
  const void* memory;       // K x n, dtype
  const int64_t* seen;      // 1; null: the memory's K = R rows are the replay rows
  int64_t* step;            // 1, bumped
  int64_t m, n, tokens, capacity, replay_rows, trace_every;
  uint64_t seed;
  float beta, eps, lam, gamma;
  int dtype, state_dtype, kind, threads;
  bool slow_dots;  // this processor multiplies float32 faster than pairs of bfloat16
  void* momentum;  // m x n, momentum_dtype; may be null
  float mu, decay;
  int momentum_dtype;
  const Tiles* tiles;  // may be null
};

struct LowRankLinear {
  const void* x;         // T x n, dtype
  const void *a, *b;     // slots x capacity x n, slots x capacity x m, dtype
  const int32_t* rows;   // slots: rows in use
  const int32_t* users;  // T: the slot of each token; -1 for none
  void* y;               // T x m, dtype: holds x W^T + b on entry, and the users' part is added
  int64_t tokens, m, n, capacity;
  int dtype, threads;
};

struct LowRankAppend {
  void *a, *b;            // as above
  int32_t* rows;          // slots
  float* eta_sum;         // slots
  const void *x, *delta;  // T x n, T x m, dtype
  const float* eta;       // T
  const int32_t* users;   // T
  int64_t tokens, m, n, capacity;
  int dtype, threads;
};

struct LowRankCompress {
  void *a, *b;                               // as above
  int32_t* rows;                             // slots
  float *eta_sum, *lost;                     // slots
  int64_t* step;                             // slots
  const int64_t* slots;                      // count
  const float *importance_m, *importance_n;  // m, n; null if lam is 0
  const void* memory;                        // K x n, dtype
  const int64_t* seen;                       // 1
  int64_t count, slots_in_pool, m, n, capacity, rank, memory_rows, replay_rows;
  uint64_t seed;
  double lam, beta, eps;
  int dtype, threads;
};

struct LowRankSquare {
  const void *a, *b;  // rows x n, rows x m: dtype
  int64_t rows, m, n;
  int dtype;
};

// Of a text in training, the state before each so many tokens is kept for the backward pass.
constexpr int64_t DELTA_KEPT_TOKENS = 256;

struct DeltaRule {
  const void *q, *k, *v;     // tokens x heads x keys, the same, tokens x heads x values: dtype
  const float *beta, *gate;  // tokens x heads; gate, in logarithms, may be null
  const int64_t* begins;     // sequences + 1: where packed sequences begin; null: each has `tokens` tokens
  float* state;              // sequences x heads x keys x values, updated
  float* kept;               // states that the backward pass begins at (delta_rule.h); null: none are kept
  void* out;                 // like v
  int64_t sequences, tokens, heads, keys, values;
  float scale;
  int dtype, threads;
};

struct DeltaRuleBackward {
  DeltaRule forward;   // as it was called; `kept` is read, and `state` and `out` are not used
  const void* out;     // the gradient of the outputs, dtype
  float* state;        // of the final state on entry, of the first one afterwards
  void *q, *k, *v;     // gradients, written: dtype
  float *beta, *gate;  // likewise; the second is null where there are no gates
};

struct MemoryLayer {
  float *weight, *bias;              // sequences x heads x inputs x outputs, sequences x heads x outputs; updated
  float *start_weight, *start_bias;  // the same before the present mini-batch
  float *velocity, *velocity_bias;   // the same of the momentum, updated; null without
  float *kept_weight, *kept_bias;    // weights that the backward pass begins at (memory.h); null: none are kept
  float *kept_velocity, *kept_velocity_bias;  // the same of the momentum
  int64_t inputs, outputs;
};

// Of a text in training, the weights before each so many mini-batches are kept for the backward pass.
constexpr int64_t MEMORY_KEPT_MINI_BATCHES = 16;

struct Memory {
  const void *q, *k, *v;                 // tokens x heads x width, dtype
  const float *rate, *gate, *momentum;   // tokens x heads; the last two may be null
  const float *norm_weight, *norm_bias;  // heads x width; null for no norm
  const int64_t* begins;                 // as above
  const MemoryLayer* layers;             // depth; the first has `width` inputs, the last as many outputs
  const int64_t* position;               // sequences: tokens of the present mini-batch
  void* out;                             // like v
  int64_t sequences, tokens, heads, width, depth, mini_batch;
  float scale, eps;
  int dtype, threads;
};

struct MemoryBackward {
  Memory forward;                  // as it was called; of the weights, those that were kept are read
  const void* out;                 // the gradient of the outputs, dtype
  const MemoryLayer* layers;       // gradients of the final state on entry, of the first one afterwards
  void *q, *k, *v;                 // gradients, written: dtype
  float *rate, *gate, *momentum;   // likewise; null where there are none
  float *norm_weight, *norm_bias;  // likewise, for each sequence: sequences x heads x width
};

struct LargeChunkText {
  const void *q, *k, *v;          // tokens x heads x inputs, the same, tokens x heads x outputs: dtype
  const float *rates, *momentum;  // tokens x heads x count, tokens x heads; the second may be null
  const int64_t* begins;          // as above
  float *weights[3], *sums[3];    // as of LargeChunkStep; updated
  float* velocity[3];             // of the same shapes, updated; null without momentum
  const float* norms[3];          // sequences x heads x columns, of the columns of each weight; may be null
  float* total_momentum;          // sequences x heads, updated; null without momentum
  const int64_t* position;        // sequences: tokens of the present chunk
  void* out;                      // like v
  int64_t sequences, tokens, heads, inputs, outputs, inner, count, size;
  bool orthogonal;
  float scale;  // of q
  int dtype, threads;

  int64_t rows_of(int64_t weight) const { return weight == 1 ? inner : inputs; }
  int64_t columns_of(int64_t weight) const { return count == 1 || weight == 1 ? outputs : inner; }
};

// A step reads one token of each sequence. These are the numbers from one sequence to the next; those of the heads of
// one sequence follow each other.
struct TokenSteps {
  int64_t q, k, v, rate, gate, momentum;
};

struct DeltaRuleStep {
  DeltaRule of;      // sequences of one token each; `out` has no gaps
  TokenSteps steps;  // `rate` is that of beta
};

struct MemoryStep {
  Memory of;          // likewise
  int64_t* position;  // sequences; those after the token are written
  TokenSteps steps;
};

struct LargeChunkStep {
  const void *q, *k, *v;    // sequences x heads x inputs, the same, sequences x heads x outputs: dtype
  const float* rates;       // sequences x heads x count
  const float* momentum;    // sequences x heads; may be null
  const float* weights[3];  // `count` of them, 1 or 3. One: sequences x heads x inputs x outputs. Three, with outputs =
                            // inputs: the first and third have `inner` outputs, and the second as many inputs
  float* sums[3];           // the same of the updates, added to
  float* total_momentum;    // sequences x heads, added to; null without momentum
  int64_t* position;        // sequences, added to
  void* out;                // sequences x heads x outputs: dtype
  int64_t sequences, heads, inputs, outputs, inner, count;
  TokenSteps steps;  // `rate` is that of rates
  int64_t rate_by_head, rate_by_weight;
  float scale;  // of q
  int dtype, threads;
};

struct Kernels {
  const char* isa;
  void (*window_linear)(const WindowLinear&);
  void (*transposed_product)(const TransposedProduct&);
  void (*window_pairs)(const WindowPairs&);
  void (*commit)(const Commit&);
  void (*low_rank_linear)(const LowRankLinear&);
  void (*low_rank_append)(const LowRankAppend&);
  int64_t (*low_rank_compress)(const LowRankCompress&);
  double (*low_rank_square)(const LowRankSquare&);
  bool (*all_finite)(const void* x, int64_t count, int dtype);
  void (*delta_rule)(const DeltaRule&);
  void (*delta_rule_backward)(const DeltaRuleBackward&);
  void (*memory)(const Memory&);
  void (*memory_backward)(const MemoryBackward&);
  void (*delta_rule_step)(const DeltaRuleStep&);
  void (*memory_step)(const MemoryStep&);
  void (*large_chunk_step)(const LargeChunkStep&);
  void (*large_chunk)(const LargeChunkText&);
};

// One table per instruction set, each from its own compilation of kernels.cpp.
const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();

}  // namespace ttt

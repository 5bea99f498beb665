// The boundary between the bindings and the kernels of attention, as api.h is of the others. They are compiled by
// themselves, as those of head_api.h are.
#pragma once
#include <cstdint>

namespace ttt {

// A tensor of (batch, heads, tokens, numbers): the steps in memory from one to the next, in numbers. Those of a token
// follow each other.
struct HeadSteps {
  int64_t batch, head, token;
};

struct AttentionBackward {
  const void *q, *k, *v, *out;  // queries, keys, values, and the gradient of the outputs: dtype (api.h)
  void *dq, *dk, *dv;           // gradients, written: dtype
  const bool* mask;             // which keys a query sees; null for all, or those that `causal` leaves
  HeadSteps q_steps, k_steps, v_steps, out_steps, dq_steps, dk_steps, dv_steps, mask_steps;
  int64_t batch, heads, key_heads;  // heads is a multiple of key_heads
  int64_t queries, keys, first;     // of keys before the first no gradient is written
  int64_t width, value_width;       // numbers of a query or key, and of a value or output
  float scale;
  bool causal;  // query i sees keys 0 to i only
  int dtype, threads;
};

struct AttentionKernels {
  void (*backward)(const AttentionBackward&);
};

// One table per instruction set, each from its own compilation of attention.cpp.
const AttentionKernels& attention_portable();
const AttentionKernels& attention_avx2();
const AttentionKernels& attention_avx512();
const AttentionKernels& attention_avx512bf16();

}  // namespace ttt

// The boundary between the bindings and the kernels of the output head, as api.h is of the others. They are compiled by
// themselves, so that a change of either leaves the other's objects as they are.
#pragma once
#include <cstdint>

namespace ttt {

struct HeadScores {
  const void* logits;            // tokens x words, dtype (api.h)
  const int64_t* targets;        // tokens
  float *nll, *highest, *total;  // tokens, written
  int64_t tokens, words;
  int dtype, threads;
};

struct HeadGradient {
  const void *logits, *weight;   // tokens x words, dtype; words x width, weight_dtype
  const void* mean;              // width, weight_dtype: the row that stands for the words that are left out
  const int64_t* targets;        // tokens
  const bool* wanted;            // tokens: whose loss counts; null for all
  const float *highest, *total;  // tokens, of HeadScores
  void* out;                     // tokens x width, weight_dtype
  int64_t tokens, words, width;
  int64_t most;  // rows of the weight, each counted once for each token; with more nothing is written
  float mass;
  int dtype, weight_dtype, threads;
};

struct HeadKernels {
  void (*scores)(const HeadScores&);
  int64_t (*gradient)(const HeadGradient&);  // the number of rows of the weight; -1 if that is more than `most`
};

// One table per instruction set, each from its own compilation of head.cpp.
const HeadKernels& head_portable();
const HeadKernels& head_avx2();
const HeadKernels& head_avx512();
const HeadKernels& head_avx512bf16();

}  // namespace ttt

// Most kernels; their bodies are in the headers that are included below.
// Compiled once for each instruction set with that set's flags (setup.py), never for the whole library.
#include "api.h"
#include "commit.h"
#include "delta_rule.h"
#include "delta_rule_backward.h"
#include "isa.h"
#include "large_chunk.h"
#include "large_chunk_text.h"
#include "low_rank.h"
#include "low_rank_compress.h"
#include "low_rank_square.h"
#include "memory.h"
#include "memory_backward.h"
#include "memory_step.h"
#include "transposed_product.h"
#include "window_linear.h"
#include "window_pairs.h"

namespace ttt {

const Kernels& TTT_FOR_ISA(kernels)() {
  static const Kernels table = {TTT_NAME,
                                run_window_linear,
                                run_transposed_product,
                                run_window_pairs,
                                run_commit,
                                run_low_rank_linear,
                                run_low_rank_append,
                                run_low_rank_compress,
                                run_low_rank_square,
                                run_all_finite,
                                run_delta_rule,
                                run_delta_rule_backward,
                                run_memory,
                                run_memory_backward,
                                run_delta_rule_step,
                                run_memory_step,
                                run_large_chunk_step,
                                run_large_chunk};
  return table;
}

}  // namespace ttt

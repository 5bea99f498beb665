// Chooses the namespace and vector length by instruction set; the bodies are in the headers that are included below.
// Compiled once for each instruction set with that set's flags (setup.py), never for the whole library.
#include "api.h"

#if defined(TTT_ISA_AVX512BF16)
#define TTT_VL 16
#define TTT_TABLE kernels_avx512bf16
#define TTT_NAME "avx512bf16"
#elif defined(TTT_ISA_AVX512)
#define TTT_VL 16
#define TTT_TABLE kernels_avx512
#define TTT_NAME "avx512"
#elif defined(TTT_ISA_AVX2)
#define TTT_VL 8
#define TTT_TABLE kernels_avx2
#define TTT_NAME "avx2"
#else
#define TTT_VL 4
#define TTT_TABLE kernels_portable
#define TTT_NAME "portable"
#endif

#include "commit.h"
#include "delta_rule.h"
#include "delta_rule_backward.h"
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

const Kernels& TTT_TABLE() {
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

// The kernels of attention, compiled once for each instruction set as kernels.cpp is.
#include "attention.h"

namespace ttt {

const AttentionKernels& TTT_FOR_ISA(attention)() {
  static const AttentionKernels table = {run_attention_backward};
  return table;
}

}  // namespace ttt

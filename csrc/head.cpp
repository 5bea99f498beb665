// The kernels of the output head, compiled once for each instruction set as kernels.cpp is.
#include "head.h"

namespace ttt {

const HeadKernels& TTT_FOR_ISA(head)() {
  static const HeadKernels table = {run_head_scores, run_head_gradient};
  return table;
}

}  // namespace ttt

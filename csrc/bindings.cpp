// ttt._C: the kernels, called with addresses and sizes. The GIL is released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa_bindings.h"
#include "layer_bindings.h"
#include "low_rank_bindings.h"
#include "many_layers_bindings.h"
#include "op_bindings.h"
#include "sequence_bindings.h"
#include "step_bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of ttt. Addresses and sizes only; ttt.ops checks the arguments.";
  bind_ops(m);
  bind_low_rank(m);
  bind_sequence(m);
  bind_steps(m);
  bind_layer(m);
  bind_many_layers(m);
  m.def("set_isa", &set_isa, py::arg("isa"), "Use the kernels of one instruction set from now on.");
  m.def("available_isas", &available_isas, "The instruction sets this processor has, slowest first.");
  m.def("active_isa", [] { return active_isa; });
}

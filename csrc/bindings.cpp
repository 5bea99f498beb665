// ttt._C: the kernels, called with addresses and sizes. The GIL is released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "instruction_sets.h"
#include "layer.h"
#include "low_rank_bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of ttt. Addresses and sizes only; ttt.ops checks the arguments.";
  m.def("window_linear", &window_linear);
  m.def("project_out", &project_out);
  const auto named = [](const char* name) { return py::arg(name); };
  py::class_<ttt::Commit>(m, "Commit")
      .def(py::init(&commit_of), py::kw_only(), named("weight"), named("anchor"), named("importance"), named("trace"),
           named("x"), named("delta"), named("eta"), named("trace_delta"), named("memory"), named("seen"),
           named("step"), named("m"), named("n"), named("tokens"), named("capacity"), named("replay_rows"),
           named("trace_every"), named("seed"), named("beta"), named("eps"), named("lam"), named("gamma"),
           named("dtype"), named("state_dtype"), named("kind"), named("threads"), named("momentum"), named("mu"),
           named("decay"), named("momentum_dtype"));
  m.def("commit", &run_commit);
  m.def("low_rank_linear", &low_rank_linear);
  m.def("low_rank_append", &low_rank_append);
  m.def("low_rank_compress", CompressArguments::call);
  m.def("all_finite", &all_finite);
  py::class_<LowRank>(m, "LowRank")
      .def(py::init(&CompressArguments::bind))
      .def("forward", &LowRank::forward)
      .def("learn", &LowRank::learn);
  m.def("reservoir_insert", &reservoir_insert);
  m.def("reservoir_draw", &reservoir_draw);
  py::class_<Layer>(m, "Layer")
      .def(py::init([](address weight, address bias, address win_x, address win_delta, address win_eta,
                       address win_trace, address recent, address recent_seen, address basis, int64_t m, int64_t n,
                       int64_t window, int64_t capacity, int64_t directions, uint64_t seed, int dtype) {
        return Layer{weight, bias, win_x, win_delta, win_eta,  win_trace,  recent, recent_seen,
                     basis,  m,    n,     window,    capacity, directions, seed,   dtype};
      }))
      .def("forward", &Layer::forward)
      .def("append", &Layer::append)
      .def("prepare", &Layer::prepare)
      .def("commit_window", &Layer::commit_window);
  m.def("set_isa", &set_isa, py::arg("isa"), "Use the kernels of one instruction set from now on.");
  m.def("available_isas", &available_isas, "The instruction sets this processor has, slowest first.");
  m.def("active_isa", [] { return active_isa; });
}

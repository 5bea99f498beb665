// ttt._C: the kernels, called with addresses and sizes. The GIL is released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "api.h"
#include "counter_checks.h"
#include "isa_bindings.h"
#include "low_rank_bindings.h"
#include "philox.h"
#include "sequence_bindings.h"

namespace {

void window_linear(address x, address weight, address bias, address win_x, address win_delta, address win_eta,
                   address y, int64_t tokens, int64_t m, int64_t n, int64_t window, int dtype, int threads,
                   bool product_done) {
  ttt::WindowLinear a{in<void>(x),
                      in<void>(weight),
                      in<void>(bias),
                      in<void>(win_x),
                      in<void>(win_delta),
                      in<float>(win_eta),
                      out<void>(y),
                      tokens,
                      m,
                      n,
                      window,
                      dtype,
                      threads,
                      product_done};
  py::gil_scoped_release release;
  active->window_linear(a);
}

// y = x - (x U^T) U: the same as subtracting from the product x the part of a window whose rows are those of U.
void project_out(address x, address basis, address y, int64_t tokens, int64_t k, int64_t n, int dtype, int threads) {
  std::memcpy(out<void>(y), in<void>(x), tokens * n * (dtype == ttt::kF32 ? 4 : 2));
  if (k == 0) return;
  const std::vector<float> ones(k, 1.0f);
  ttt::WindowLinear a{
      in<void>(x), nullptr, nullptr, in<void>(basis), in<void>(basis), ones.data(), out<void>(y), tokens,
      n,           n,       k,       dtype,           threads,         true};
  py::gil_scoped_release release;
  active->window_linear(a);
}

// Every argument is given by name: see `_bound_commit` in ttt/ops/cpu.py.
ttt::Commit commit_of(address weight, address anchor, address importance, address trace, address x, address delta,
                      address eta, address trace_delta, address memory, address seen, address step, int64_t m,
                      int64_t n, int64_t tokens, int64_t capacity, int64_t replay_rows, int64_t trace_every,
                      uint64_t seed, float beta, float eps, float lam, float gamma, int dtype, int state_dtype,
                      int kind, int threads, address momentum, float mu, float decay, int momentum_dtype) {
  ttt::Commit c = {};
  c.weight = out<void>(weight);
  c.anchor = in<void>(anchor);
  c.importance = in<void>(importance);
  c.trace = out<void>(trace);
  c.x = in<void>(x);
  c.delta = in<void>(delta);
  c.eta = in<float>(eta);
  c.trace_delta = in<void>(trace_delta);
  c.memory = in<void>(memory);
  c.seen = in<int64_t>(seen);
  c.step = out<int64_t>(step);
  c.m = m;
  c.n = n;
  c.tokens = tokens;
  c.capacity = capacity;
  c.replay_rows = replay_rows;
  c.trace_every = trace_every;
  c.seed = seed;
  c.beta = beta;
  c.eps = eps;
  c.lam = lam;
  c.gamma = gamma;
  c.dtype = dtype;
  c.state_dtype = state_dtype;
  c.kind = kind;
  c.threads = threads;
  c.slow_dots = slow_dots;
  c.momentum = out<void>(momentum);
  c.mu = mu;
  c.decay = decay;
  c.momentum_dtype = momentum_dtype;
  c.tiles = active_tiles;
  return c;
}

void run_commit(const ttt::Commit& c) {
  if (c.replay_rows) ttt::check_counter("seen", c.seen);
  if (c.m == 0 || c.n == 0) {  // there is no element to write
    ++*c.step;
    return;
  }
  py::gil_scoped_release release;
  active->commit(c);
}

bool all_finite(address x, int64_t count, int dtype) {
  py::gil_scoped_release release;
  return active->all_finite(in<void>(x), count, dtype);
}

// Algorithm R: row s goes to slot s while there is room, then to a random slot of [0, s].
void insert_rows(char* memory, int64_t* seen, const char* x, int64_t capacity, int64_t rows, int64_t row_bytes,
                 uint64_t seed) {
  for (int64_t t = 0; t < rows; t++, ++*seen) {
    const int64_t s = *seen;
    int64_t slot = s;
    if (s >= capacity) {
      uint32_t words[4];
      philox(static_cast<uint32_t>(s), 0, 0, kInsert, seed, words);
      slot = static_cast<int64_t>((static_cast<uint64_t>(words[0]) * static_cast<uint64_t>(s + 1)) >> 32);
    }
    if (slot < capacity) std::memcpy(memory + slot * row_bytes, x + t * row_bytes, row_bytes);
  }
}

void reservoir_insert(address memory, address seen, address x, int64_t capacity, int64_t rows, int64_t row_bytes,
                      uint64_t seed) {
  ttt::check_counter("seen", in<int64_t>(seen), rows);
  py::gil_scoped_release release;
  insert_rows(out<char>(memory), out<int64_t>(seen), in<char>(x), capacity, rows, row_bytes, seed);
}

void reservoir_draw(address seen, address step, address index, int64_t capacity, int64_t rows, uint64_t seed) {
  ttt::check_counter("seen", in<int64_t>(seen));
  const int64_t filled = *in<int64_t>(seen) < capacity ? *in<int64_t>(seen) : capacity;
  for (int64_t r = 0; r < rows; r++) {
    uint32_t words[4];
    philox(static_cast<uint32_t>(r / 4), 0, static_cast<uint32_t>(*in<int64_t>(step)), kDraw, seed, words);
    const uint64_t product = static_cast<uint64_t>(words[r % 4]) * static_cast<uint64_t>(filled);
    out<int64_t>(index)[r] = filled > 0 ? static_cast<int64_t>(product >> 32) : -1;
  }
}

// The addresses of one layer, bound once: unpacking twenty arguments takes longer than the decoding step of a small
// layer.
//
// `append` and `commit_window` mirror `Linear._learn` of ttt/nn/linear.py, which makes the same calls through the ops;
// a change of one must be made in the other. test_outputs_and_state_are_those_of_the_ops of
// tests/nn/test_cpu_binding.py compares the two bit for bit.
struct Layer {
  address weight, bias, win_x, win_delta, win_eta, win_trace, recent, recent_delta, recent_seen, basis, output_basis;
  int64_t m, n, window, capacity, directions, output_directions;
  uint64_t seed;
  int dtype;
  ttt::Commit prepared = {};

  void forward(address x, address y, int64_t tokens, int threads, bool product_done) const {
    window_linear(x, weight, bias, win_x, win_delta, win_eta, y, tokens, m, n, window, dtype, threads, product_done);
  }

  // Writes rows `at` to `at` + rows of the window, with the directions taken out of inputs and gradients. Inputs and
  // gradients themselves also enter the samples of recent ones. Throws, and writes nothing, if the rows or a counter
  // are out of range.
  void append(address x, address delta, address eta, address trace_delta, int64_t at, int64_t rows, int threads) const {
    ttt::check_rows("rows to append", rows, at, window);
    ttt::check_counter("recent_seen", in<int64_t>(recent_seen), rows);
    if (at + rows == window && prepared.replay_rows) ttt::check_counter("seen", prepared.seen);  // a commit follows
    const int64_t size = dtype == ttt::kF32 ? 4 : 2, x_bytes = n * size, d_bytes = m * size;
    if (recent_delta) {  // with the counter as it is: the same tokens are kept of both
      int64_t seen = *in<int64_t>(recent_seen);
      insert_rows(out<char>(recent_delta), &seen, in<char>(delta), capacity, rows, d_bytes, seed);
    }
    if (recent) insert_rows(out<char>(recent), out<int64_t>(recent_seen), in<char>(x), capacity, rows, x_bytes, seed);
    project_out(x, basis, win_x + at * x_bytes, rows, directions, n, dtype, threads);
    project_out(delta, output_basis, win_delta + at * d_bytes, rows, output_directions, m, dtype, threads);
    if (win_trace) std::memcpy(out<char>(win_trace) + at * d_bytes, in<char>(trace_delta), rows * d_bytes);
    std::memcpy(out<float>(win_eta) + at, in<float>(eta), rows * sizeof(float));
  }

  // Sets the arguments of `commit_window` other than the rows of the window.
  void prepare(const ttt::Commit& c) { prepared = c; }

  // Commits the first `rows` rows of the window and empties the window.
  void commit_window(address tokens, int64_t rows, int threads) const {
    ttt::check_rows("rows to commit", rows, 0, window);
    if (prepared.weight == nullptr) throw std::invalid_argument("prepare must be called before commit_window");
    ttt::Commit a = prepared;
    a.x = in<void>(win_x);
    a.delta = in<void>(win_delta);
    a.eta = in<float>(win_eta);
    a.trace_delta = in<void>(win_trace ? win_trace : win_delta);
    a.tokens = rows;
    a.threads = threads;
    run_commit(a);
    *out<int64_t>(tokens) += rows;
    std::memset(out<float>(win_eta), 0, window * sizeof(float));
  }
};

}  // namespace

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
  bind_low_rank(m);
  bind_sequence(m);
  m.def("all_finite", &all_finite);
  m.def("reservoir_insert", &reservoir_insert);
  m.def("reservoir_draw", &reservoir_draw);
  py::class_<Layer>(m, "Layer")
      .def(py::init([](address weight, address bias, address win_x, address win_delta, address win_eta,
                       address win_trace, address recent, address recent_delta, address recent_seen, address basis,
                       address output_basis, int64_t m, int64_t n, int64_t window, int64_t capacity, int64_t directions,
                       int64_t output_directions, uint64_t seed, int dtype) {
             return Layer{weight, bias,         win_x,       win_delta,  win_eta,           win_trace,
                          recent, recent_delta, recent_seen, basis,      output_basis,      m,
                          n,      window,       capacity,    directions, output_directions, seed,
                          dtype};
           }),
           py::kw_only(), named("weight"), named("bias"), named("win_x"), named("win_delta"), named("win_eta"),
           named("win_trace"), named("recent"), named("recent_delta"), named("recent_seen"), named("basis"),
           named("output_basis"), named("m"), named("n"), named("window"), named("capacity"), named("directions"),
           named("output_directions"), named("seed"), named("dtype"))
      .def("forward", &Layer::forward)
      .def("append", &Layer::append)
      .def("prepare", &Layer::prepare)
      .def("commit_window", &Layer::commit_window);
  m.def("set_isa", &set_isa, py::arg("isa"), "Use the kernels of one instruction set from now on.");
  m.def("available_isas", &available_isas, "The instruction sets this processor has, slowest first.");
  m.def("active_isa", [] { return active_isa; });
}

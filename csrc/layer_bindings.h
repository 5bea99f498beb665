// The binding of one `ttt.nn.Linear`: its addresses, and what it does with them. Included by bindings.cpp only.
#pragma once
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "counter_checks.h"
#include "op_bindings.h"

namespace {

// What a layer learns from one step, and where in its window that goes: rows `at` to `at` + `rows`.
struct LearntRows {
  address x, delta, eta, trace_delta;  // rows x n, rows x m, rows, rows x m; the last one only where there is win_trace
  address weight;                      // rows: of the feedback; null for zeros
  address moments, agreement;          // 3, 1: what is added to and what replaces the layer's own; may be null
  int64_t at, rows;

  // In the order in which Python gives them.
  using Given = std::tuple<address, address, address, address, address, address, address, int64_t, int64_t>;
  static LearntRows of(const Given& given) {
    return std::apply([](auto... values) { return LearntRows{values...}; }, given);
  }
};

// The addresses of one layer, bound once: unpacking twenty arguments takes longer than the decoding step of a small
// layer.
//
// `learn` mirrors `Linear.learn` of ttt/nn/linear.py, which makes the same calls through the ops; a change of one must
// be made in the other. test_outputs_and_state_are_those_of_the_ops of tests/nn/test_cpu_binding.py compares the two
// bit for bit.
struct Layer {
  address weight, bias, win_x, win_delta, win_eta, win_trace, recent, recent_delta, recent_seen, basis, output_basis;
  address tokens, win_weight, moments, agreement;  // the last three may be null
  int64_t m, n, window, capacity, directions, output_directions;
  uint64_t seed;
  int dtype;
  ttt::Commit prepared = {};

  int64_t element() const { return dtype == ttt::kF32 ? 4 : 2; }

  void forward(address x, address y, int64_t rows, int threads, bool product_done) const {
    window_linear(x, weight, bias, win_x, win_delta, win_eta, y, rows, m, n, window, dtype, threads, product_done);
  }

  // x = delta W_t, of which `x` already holds delta W if `product_done`. The window's part is that of `forward` with
  // inputs and gradients in each other's place.
  void backward(address delta, address x, int64_t rows, int threads, bool product_done) const {
    if (!product_done)
      active->transposed_product({in<void>(delta), in<void>(weight), out<void>(x), rows, m, n, dtype, threads});
    window_linear(delta, 0, 0, win_delta, win_x, win_eta, x, rows, n, m, window, dtype, threads, true);
  }

  // pairs[t, c] = (x_t . X_c) (delta_t . D_c) for row c of the window; 0 where its weight is 0.
  void pairs(address x, address delta, address pairs, int64_t rows, int threads) const {
    active->window_pairs({in<void>(x), in<void>(delta), in<void>(win_x), in<void>(win_delta), in<float>(win_weight),
                          out<float>(pairs), rows, m, n, window, dtype, threads});
  }

  // Throws if `append` would write out of range.
  void check_append(int64_t at, int64_t rows) const {
    ttt::check_rows("rows to append", rows, at, window);
    ttt::check_counter("recent_seen", in<int64_t>(recent_seen), rows);
    if (at + rows == window && prepared.replay_rows) ttt::check_counter("seen", prepared.seen);  // a commit follows
  }

  // Writes rows `at` to `at` + rows of the window, with the directions taken out of inputs and gradients. Inputs and
  // gradients themselves also enter the samples of recent ones. Throws, and writes nothing, if the rows or a counter
  // are out of range.
  void append(address x, address delta, address eta, address trace_delta, int64_t at, int64_t rows, int threads) const {
    check_append(at, rows);
    const int64_t x_bytes = n * element(), d_bytes = m * element();
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
  void commit_window(int64_t rows, int threads) const {
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

  // Appends the rows, commits the window if they fill it, and keeps what later steps are made with. Throws, and writes
  // nothing, as `append`.
  void learn(const LearntRows& learnt, int threads) const {
    const int64_t at = learnt.at, rows = learnt.rows;
    append(learnt.x, learnt.delta, learnt.eta, learnt.trace_delta, at, rows, threads);
    if (win_weight) {
      float* weights = out<float>(win_weight) + at;
      if (learnt.weight)
        std::memcpy(weights, in<float>(learnt.weight), rows * sizeof(float));
      else
        std::memset(weights, 0, rows * sizeof(float));
    }
    if (at + rows == window) commit_window(window, threads);
    for (int i = 0; i < 3 && moments && learnt.moments; i++) out<double>(moments)[i] += in<double>(learnt.moments)[i];
    if (agreement && learnt.agreement) *out<double>(agreement) = *in<double>(learnt.agreement);
  }
};

inline void bind_layer(py::module_& m) {
  const auto named = [](const char* name) { return py::arg(name); };
  const auto absent = [](const char* name) { return py::arg(name) = address{0}; };
  const py::call_guard<py::gil_scoped_release> released;
  py::class_<Layer>(m, "Layer")
      .def(py::init([](address weight, address bias, address win_x, address win_delta, address win_eta,
                       address win_trace, address recent, address recent_delta, address recent_seen, address basis,
                       address output_basis, address tokens, address win_weight, address moments, address agreement,
                       int64_t m, int64_t n, int64_t window, int64_t capacity, int64_t directions,
                       int64_t output_directions, uint64_t seed, int dtype) {
             return Layer{weight,       bias,        win_x, win_delta,    win_eta,  win_trace,  recent,
                          recent_delta, recent_seen, basis, output_basis, tokens,   win_weight, moments,
                          agreement,    m,           n,     window,       capacity, directions, output_directions,
                          seed,         dtype};
           }),
           py::kw_only(), named("weight"), named("bias"), named("win_x"), named("win_delta"), named("win_eta"),
           named("win_trace"), named("recent"), named("recent_delta"), named("recent_seen"), named("basis"),
           named("output_basis"), named("tokens"), absent("win_weight"), absent("moments"), absent("agreement"),
           named("m"), named("n"), named("window"), named("capacity"), named("directions"), named("output_directions"),
           named("seed"), named("dtype"))
      .def("forward", &Layer::forward, released)
      .def("append", &Layer::append, released)
      .def("prepare", &Layer::prepare)
      .def("commit_window", &Layer::commit_window, released)
      .def("learn", [](const Layer& layer, const LearntRows::Given& given, int threads) {
        const LearntRows rows = LearntRows::of(given);
        py::gil_scoped_release release;
        layer.learn(rows, threads);
      });
}

}  // namespace

// The binding of one `ttt.nn.Linear`: its addresses, and what it does with them. Included by bindings.cpp only.
#pragma once
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "counter_checks.h"
#include "op_bindings.h"

namespace {

// What a layer learns from one step, and where in its window that goes: rows `at` to `at` + `rows`.
struct LearntRows {
  address x, delta, eta, trace_delta;  // rows x n, rows x m, rows, rows x m; the last one only where there is win_trace
  address applied_x, applied_delta;    // like x and delta, with the directions taken out; null: that is done here
  address weight;                      // rows: of the feedback; null for zeros
  address moments, agreement;          // 3, 1: what is added to and what replaces the layer's own; may be null
  int64_t at, rows;

  // In the order in which Python gives them.
  using Given =
      std::tuple<address, address, address, address, address, address, address, address, address, int64_t, int64_t>;
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

  // Throws if counters do not allow `rows` further rows, which follow `at` rows of the window.
  void check_counters(int64_t at, int64_t rows) const {
    ttt::check_counter("recent_seen", in<int64_t>(recent_seen), rows);
    if (at + rows >= window && prepared.replay_rows) ttt::check_counter("seen", prepared.seen);  // a commit follows
  }

  // Throws if `learn` would read or write out of range.
  void check(const LearntRows& learnt) const {
    if (learnt.at < 0 || learnt.at > window)
      throw std::invalid_argument("pending must be in [0, " + std::to_string(window) + "], got " +
                                  std::to_string(learnt.at));
    if (learnt.rows < 0) throw std::invalid_argument("rows must not be negative, got " + std::to_string(learnt.rows));
    if (learnt.at + learnt.rows >= window && prepared.weight == nullptr)
      throw std::invalid_argument("prepare must be called before rows are learnt that fill the window");
    check_counters(learnt.at, learnt.rows);
  }

  // Inputs and gradients enter the samples of recent ones.
  void sample(address x, address delta, int64_t rows) const {
    const int64_t x_bytes = n * element(), d_bytes = m * element();
    if (recent_delta) {  // with the counter as it is: the same tokens are kept of both
      int64_t seen = *in<int64_t>(recent_seen);
      insert_rows(out<char>(recent_delta), &seen, in<char>(delta), capacity, rows, d_bytes, seed);
    }
    if (recent) insert_rows(out<char>(recent), out<int64_t>(recent_seen), in<char>(x), capacity, rows, x_bytes, seed);
  }

  // Writes inputs and gradients to `to_x` and `to_delta` with the directions taken out.
  void apply(const LearntRows& learnt, address to_x, address to_delta, int threads) const {
    const int64_t rows = learnt.rows;
    if (learnt.applied_x)
      std::memcpy(out<char>(to_x), in<char>(learnt.applied_x), rows * n * element());
    else
      project_out(learnt.x, basis, to_x, rows, directions, n, dtype, threads);
    if (learnt.applied_delta)
      std::memcpy(out<char>(to_delta), in<char>(learnt.applied_delta), rows * m * element());
    else
      project_out(learnt.delta, output_basis, to_delta, rows, output_directions, m, dtype, threads);
  }

  // Writes rows `at` to `at` + rows of the window, with the directions taken out of inputs and gradients. Inputs and
  // gradients themselves also enter the samples of recent ones. Throws, and writes nothing, if the rows or a counter
  // are out of range.
  void append(const LearntRows& learnt, int threads) const {
    const int64_t at = learnt.at, rows = learnt.rows, x_bytes = n * element(), d_bytes = m * element();
    ttt::check_rows("rows to append", rows, at, window);
    check_counters(at, rows);
    sample(learnt.x, learnt.delta, rows);
    apply(learnt, win_x + at * x_bytes, win_delta + at * d_bytes, threads);
    if (win_trace) std::memcpy(out<char>(win_trace) + at * d_bytes, in<char>(learnt.trace_delta), rows * d_bytes);
    std::memcpy(out<float>(win_eta) + at, in<float>(learnt.eta), rows * sizeof(float));
  }

  // Sets the arguments of `commit_window` other than the rows of the window.
  void prepare(const ttt::Commit& c) { prepared = c; }

  // Commits the first `rows` rows of the window and empties the window.
  void commit_window(int64_t rows, int threads) const {
    ttt::check_rows("rows to commit", rows, 0, window);
    if (prepared.weight == nullptr) throw std::invalid_argument("prepare must be called before commit_window");
    commit_rows(win_x, win_delta, win_eta, win_trace ? win_trace : win_delta, rows, threads);
  }

  // Commits `rows` rows and empties the window.
  void commit_rows(address x, address delta, address eta, address trace_delta, int64_t rows, int threads) const {
    ttt::Commit a = prepared;
    a.x = in<void>(x);
    a.delta = in<void>(delta);
    a.eta = in<float>(eta);
    a.trace_delta = in<void>(trace_delta);
    a.tokens = rows;
    a.threads = threads;
    run_commit(a);
    *out<int64_t>(tokens) += rows;
    std::memset(out<float>(win_eta), 0, window * sizeof(float));
  }

  // Commits the rows of the window together with those that it has no room for. For the feedback it keeps the latest.
  void commit_beyond(const LearntRows& learnt, int threads) const {
    const int64_t at = learnt.at, rows = learnt.rows, total = at + rows, x_bytes = n * element(),
                  d_bytes = m * element();
    std::vector<char> x(total * x_bytes), delta(total * d_bytes), traced(win_trace ? total * d_bytes : 0);
    std::vector<float> eta(total), weights(total);
    const auto begin = [](auto& values) { return reinterpret_cast<address>(values.data()); };
    const auto join = [&](auto& to, address held, address added, int64_t bytes) {
      std::memcpy(to.data(), in<char>(held), at * bytes);
      std::memcpy(out<char>(begin(to) + at * bytes), in<char>(added), rows * bytes);
    };
    sample(learnt.x, learnt.delta, rows);
    std::memcpy(x.data(), in<char>(win_x), at * x_bytes);
    std::memcpy(delta.data(), in<char>(win_delta), at * d_bytes);
    apply(learnt, begin(x) + at * x_bytes, begin(delta) + at * d_bytes, threads);
    join(eta, win_eta, learnt.eta, sizeof(float));
    if (win_trace) join(traced, win_trace, learnt.trace_delta, d_bytes);
    commit_rows(begin(x), begin(delta), begin(eta), win_trace ? begin(traced) : begin(delta), total, threads);
    if (!win_weight) return;
    if (learnt.weight) join(weights, win_weight, learnt.weight, sizeof(float));
    const int64_t kept = total < window ? total : window, first = total - kept;
    std::memcpy(out<char>(win_x), x.data() + first * x_bytes, kept * x_bytes);
    std::memcpy(out<char>(win_delta), delta.data() + first * d_bytes, kept * d_bytes);
    std::memcpy(out<float>(win_weight), weights.data() + first, kept * sizeof(float));
  }

  // Puts the rows into the window, commits it if it is full then, and keeps what later steps are made with. The caller
  // has called `check`.
  void learn(const LearntRows& learnt, int threads) const {
    const int64_t at = learnt.at, rows = learnt.rows;
    if (at + rows > window) {
      commit_beyond(learnt, threads);
    } else {
      append(learnt, threads);
      if (win_weight && learnt.weight)
        std::memcpy(out<float>(win_weight) + at, in<float>(learnt.weight), rows * sizeof(float));
      else if (win_weight)
        std::memset(out<float>(win_weight) + at, 0, rows * sizeof(float));
      if (at + rows == window) commit_window(window, threads);
    }
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
      .def(
          "append",
          [](const Layer& layer, address x, address delta, address eta, address trace_delta, int64_t at, int64_t rows,
             int threads) { layer.append({x, delta, eta, trace_delta, 0, 0, 0, 0, 0, at, rows}, threads); },
          released)
      .def("prepare", &Layer::prepare)
      .def("commit_window", &Layer::commit_window, released)
      .def("learn", [](const Layer& layer, const LearntRows::Given& given, int threads) {
        const LearntRows rows = LearntRows::of(given);
        py::gil_scoped_release release;
        layer.check(rows);
        layer.learn(rows, threads);
      });
}

}  // namespace

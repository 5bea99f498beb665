// The ops of one layer of the bindings: products, commits, the replay memory, and `Layer`, which makes them at
// addresses that were bound once. Included by bindings.cpp only.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

#include "api.h"
#include "counter_checks.h"
#include "instruction_sets.h"
#include "philox.h"

namespace {

using address = uintptr_t;

template <class T>
const T* in(address a) {
  return reinterpret_cast<const T*>(a);
}
template <class T>
T* out(address a) {
  return reinterpret_cast<T*>(a);
}

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
  pybind11::gil_scoped_release release;
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
  pybind11::gil_scoped_release release;
  active->window_linear(a);
}

// `_bound_commit` of ttt/ops/cpu.py gives every argument by name.
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
  if (c.m == 0 || c.n == 0) {  // only the counter of commits is written
    ++*c.step;
    return;
  }
  pybind11::gil_scoped_release release;
  active->commit(c);
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
  pybind11::gil_scoped_release release;
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

// The addresses of a `ttt.nn.Linear`, bound once: unpacking twenty arguments costs more than a step of a small layer.
//
// `append` and `commit_window` mirror `Linear._learn` of ttt/nn/linear.py, which makes the same calls through the ops;
// a change of one must be made in the other. test_outputs_and_state_are_those_of_the_ops of
// tests/nn/test_cpu_binding.py compares the two bit for bit.
struct Layer {
  address weight, bias, win_x, win_delta, win_eta, win_trace, recent, recent_seen, basis;
  int64_t m, n, window, capacity, directions;
  uint64_t seed;
  int dtype;
  ttt::Commit prepared = {};

  void forward(address x, address y, int64_t tokens, int threads, bool product_done) const {
    window_linear(x, weight, bias, win_x, win_delta, win_eta, y, tokens, m, n, window, dtype, threads, product_done);
  }

  // Writes rows `at` to `at` + `rows` of the window, with the directions taken out of the inputs. The inputs themselves
  // also enter the sample of recent inputs. Throws std::invalid_argument, and nothing is written, if the rows or a
  // counter are out of range.
  void append(address x, address delta, address eta, address trace_delta, int64_t at, int64_t rows, int threads) const {
    ttt::check_rows("rows to append", rows, at, window);
    ttt::check_counter("recent_seen", in<int64_t>(recent_seen), rows);
    if (at + rows == window && prepared.replay_rows) ttt::check_counter("seen", prepared.seen);  // a commit follows
    if (win_trace && !trace_delta)
      throw std::invalid_argument("trace_delta must be given for a layer with a trace of it");
    const int64_t size = dtype == ttt::kF32 ? 4 : 2, x_bytes = n * size, d_bytes = m * size;
    if (recent) insert_rows(out<char>(recent), out<int64_t>(recent_seen), in<char>(x), capacity, rows, x_bytes, seed);
    project_out(x, basis, win_x + at * x_bytes, rows, directions, n, dtype, threads);
    std::memcpy(out<char>(win_delta) + at * d_bytes, in<char>(delta), rows * d_bytes);
    if (win_trace) std::memcpy(out<char>(win_trace) + at * d_bytes, in<char>(trace_delta), rows * d_bytes);
    std::memcpy(out<float>(win_eta) + at, in<float>(eta), rows * sizeof(float));
  }

  // Sets the arguments of `commit_window` other than the rows of the window.
  void prepare(const ttt::Commit& c) { prepared = c; }

  // Commits the first `rows` rows of the window and empties it.
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

// The bindings of the ops of `ttt.nn.Linear`; included by bindings.cpp only. They touch no Python object: whoever binds
// them releases the GIL.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "counter_checks.h"
#include "isa_bindings.h"
#include "philox.h"

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
  active->window_linear(a);
}

// out[t, s] = x_t . y_s for rows x (rows x n) and y (others x n): the products of pairs with a window of one number, 1.
void row_products(address x, address y, address result, int64_t rows, int64_t others, int64_t n, int dtype,
                  int threads) {
  const int64_t most = std::max(rows, others);
  const std::vector<float> ones(most, 1.0f);
  const std::vector<uint16_t> half_ones(most, 0x3f80);
  const void* one = dtype == ttt::kF32 ? static_cast<const void*>(ones.data()) : half_ones.data();
  active->window_pairs(
      {in<void>(x), one, in<void>(y), one, ones.data(), out<float>(result), rows, 1, n, others, dtype, threads});
}

inline float number_at(const float* p) { return *p; }
inline float number_at(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// out[t] = x_t . y_t for rows x and y (rows x n). The lanes' sums are what compilers need to make vectors of the loop.
template <class T>
void dots_of(const T* x, const T* y, float* result, int64_t rows, int64_t n) {
  constexpr int lanes = 16;
  for (int64_t t = 0; t < rows; t++, x += n, y += n) {
    float sums[lanes] = {};
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes)
      for (int l = 0; l < lanes; l++) sums[l] += number_at(x + j + l) * number_at(y + j + l);
    for (; j < n; j++) sums[0] += number_at(x + j) * number_at(y + j);
    for (int half = lanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    result[t] = sums[0];
  }
}

void row_dots(address x, address y, address result, int64_t rows, int64_t n, int dtype) {
  if (dtype == ttt::kF32)
    dots_of(in<float>(x), in<float>(y), out<float>(result), rows, n);
  else
    dots_of(in<uint16_t>(x), in<uint16_t>(y), out<float>(result), rows, n);
}

// Throws if a target is not the number of a word.
void check_targets(const int64_t* targets, int64_t tokens, int64_t words) {
  for (int64_t t = 0; t < tokens; t++)
    if (targets[t] < 0 || targets[t] >= words)
      throw std::out_of_range("targets must be in [0, " + std::to_string(words) + "), got " +
                              std::to_string(targets[t]));
}

void head_scores(address logits, address targets, address nll, address highest, address total, int64_t tokens,
                 int64_t words, int dtype, int threads) {
  check_targets(in<int64_t>(targets), tokens, words);
  active_head->scores({in<void>(logits), in<int64_t>(targets), out<float>(nll), out<float>(highest), out<float>(total),
                       tokens, words, dtype, threads});
}

// The number of rows of the weight that the gradients were made of; -1 if that is more than `most`, and nothing is
// made.
int64_t head_gradient(address logits, address weight, address mean, address targets, address wanted, address highest,
                      address total, address gradient, int64_t tokens, int64_t words, int64_t width, int64_t most,
                      float mass, int dtype, int weight_dtype, int threads) {
  check_targets(in<int64_t>(targets), tokens, words);
  return active_head->gradient({in<void>(logits), in<void>(weight), in<void>(mean), in<int64_t>(targets),
                                in<bool>(wanted), in<float>(highest), in<float>(total), out<void>(gradient), tokens,
                                words, width, most, mass, dtype, weight_dtype, threads});
}

// tensors: the addresses of q, k, v, the gradient of the outputs, and the mask, or 0; then those of the gradients that
// are written. steps: of the same tensors in the same order, three each.
void attention_backward(const std::array<address, 8>& tensors, const std::array<std::array<int64_t, 3>, 8>& steps,
                        const std::array<int64_t, 8>& sizes, float scale, bool causal, int dtype, int threads) {
  const auto steps_of = [&](int n) { return ttt::HeadSteps{steps[n][0], steps[n][1], steps[n][2]}; };
  ttt::AttentionBackward a = {};
  a.q = in<void>(tensors[0]);
  a.k = in<void>(tensors[1]);
  a.v = in<void>(tensors[2]);
  a.out = in<void>(tensors[3]);
  a.mask = in<bool>(tensors[4]);
  a.dq = out<void>(tensors[5]);
  a.dk = out<void>(tensors[6]);
  a.dv = out<void>(tensors[7]);
  a.q_steps = steps_of(0);
  a.k_steps = steps_of(1);
  a.v_steps = steps_of(2);
  a.out_steps = steps_of(3);
  a.mask_steps = steps_of(4);
  a.dq_steps = steps_of(5);
  a.dk_steps = steps_of(6);
  a.dv_steps = steps_of(7);
  a.batch = sizes[0];
  a.heads = sizes[1];
  a.key_heads = sizes[2];
  a.queries = sizes[3];
  a.keys = sizes[4];
  a.first = sizes[5];
  a.width = sizes[6];
  a.value_width = sizes[7];
  a.scale = scale;
  a.causal = causal;
  a.dtype = dtype;
  a.threads = threads;
  active_attention->backward(a);
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
  active->commit(c);
}

bool all_finite(address x, int64_t count, int dtype) { return active->all_finite(in<void>(x), count, dtype); }

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

inline void bind_ops(py::module_& m) {
  const auto named = [](const char* name) { return py::arg(name); };
  const py::call_guard<py::gil_scoped_release> released;
  m.def("window_linear", &window_linear, released);
  m.def("project_out", &project_out, released);
  m.def("row_products", &row_products, released);
  m.def("row_dots", &row_dots, released);
  m.def("head_scores", &head_scores, released);
  m.def("head_gradient", &head_gradient, released);
  m.def("attention_backward", &attention_backward, released);
  py::class_<ttt::Commit>(m, "Commit")
      .def(py::init(&commit_of), py::kw_only(), named("weight"), named("anchor"), named("importance"), named("trace"),
           named("x"), named("delta"), named("eta"), named("trace_delta"), named("memory"), named("seen"),
           named("step"), named("m"), named("n"), named("tokens"), named("capacity"), named("replay_rows"),
           named("trace_every"), named("seed"), named("beta"), named("eps"), named("lam"), named("gamma"),
           named("dtype"), named("state_dtype"), named("kind"), named("threads"), named("momentum"), named("mu"),
           named("decay"), named("momentum_dtype"));
  m.def("commit", &run_commit, released);
  m.def("all_finite", &all_finite, released);
  m.def("reservoir_insert", &reservoir_insert, released);
  m.def("reservoir_draw", &reservoir_draw, released);
}

}  // namespace

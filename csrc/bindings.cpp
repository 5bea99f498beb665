// ttt._C: the kernels, called with addresses and sizes. The GIL is released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "api.h"
#include "low_rank_checks.h"
#include "philox.h"

namespace py = pybind11;
using address = uintptr_t;

namespace {

#ifdef TTT_X86
bool supports(const std::string& isa) {
  __builtin_cpu_init();
  if (isa == "amx") return supports("avx512bf16") && ttt::amx_tiles() != nullptr;
  if (isa == "amx, emulated") return supports("avx512bf16");
  if (isa == "avx512bf16") return supports("avx512") && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return isa == "portable";
}
#else
bool supports(const std::string& isa) { return isa == "portable"; }
#endif

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* isa : {"portable", "avx2", "avx512", "avx512bf16", "amx"})
    if (supports(isa)) names.push_back(isa);
  return names;
}

const ttt::Kernels* table_of(const std::string& isa) {
#ifdef TTT_X86
  if (isa == "avx512bf16" || isa.rfind("amx", 0) == 0) return &ttt::kernels_avx512bf16();
  if (isa == "avx512") return &ttt::kernels_avx512();
  if (isa == "avx2") return &ttt::kernels_avx2();
#endif
  return &ttt::kernels_portable();
}

// Intel's processors multiply pairs of bfloat16 at half the rate of float32 (a commit of 4096 x 4096, T = 256, on
// Emerald Rapids takes 111 ms with pairs, 71 ms with factors widened to float32), AMD's at twice that rate. With few
// tokens, pairs are faster on both.
const bool slow_dots = [] {
#ifdef TTT_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}();

std::string active_isa = available_isas().back();
const ttt::Kernels* active = table_of(active_isa);

const ttt::Tiles* tiles_of(const std::string& isa) {
  if (isa == "amx, emulated") return ttt::emulated_tiles();  // for tests
  return isa == "amx" ? ttt::amx_tiles() : nullptr;
}
const ttt::Tiles* active_tiles = tiles_of(active_isa);

void set_isa(const std::string& isa) {
  if (!supports(isa)) {
    std::string allowed;
    for (const auto& name : available_isas()) allowed += (allowed.empty() ? "" : ", ") + name;
    throw py::value_error("isa must be one that this processor has (" + allowed + "), got '" + isa + "'");
  }
  active_isa = isa;
  active = table_of(isa);
  active_tiles = tiles_of(isa);
}

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

// Counters are read from tensors, so Python has not checked them. A negative one would read or write outside a buffer.
void need_counter(const char* name, const int64_t* counter) {
  if (counter != nullptr && *counter < 0)
    throw py::value_error(std::string(name) + " must be at least 0, got " + std::to_string(*counter));
}

void need_rows(const char* name, int64_t rows, int64_t at, int64_t window) {
  if (at < 0 || rows < 0 || rows > window - at)
    throw py::value_error(std::string(name) + " must lie in the window of " + std::to_string(window) + " rows, got " +
                          std::to_string(rows) + " rows from row " + std::to_string(at) + " on");
}

void run_commit(const ttt::Commit& c) {
  if (c.replay_rows) need_counter("seen", c.seen);
  if (c.m == 0 || c.n == 0) {  // there is no element to write
    ++*c.step;
    return;
  }
  py::gil_scoped_release release;
  active->commit(c);
}

// Adds the users' part to y. Returns false and writes nothing if a user or the rows of a slot are out of range.
bool low_rank_linear(address x, address a, address b, address rows, address users, address y, int64_t tokens,
                     int64_t slots, int64_t m, int64_t n, int64_t capacity, int dtype, int threads) {
  const ttt::LowRankLinear f{
      in<void>(x), in<void>(a), in<void>(b), in<int32_t>(rows), in<int32_t>(users), out<void>(y), tokens, m, n,
      capacity,    dtype,       threads};
  if (!ttt::users_fit(f.users, f.rows, tokens, slots, capacity, false)) return false;
  py::gil_scoped_release release;
  active->low_rank_linear(f);
  return true;
}

// Appends a row for each token. Returns false and writes nothing if a user or the rows of a slot are out of range, or a
// slot has no room for the rows of its tokens.
bool low_rank_append(address a, address b, address rows, address eta_sum, address x, address delta, address eta,
                     address users, int64_t tokens, int64_t slots, int64_t m, int64_t n, int64_t capacity, int dtype,
                     int threads) {
  const ttt::LowRankAppend f{out<void>(a),
                             out<void>(b),
                             out<int32_t>(rows),
                             out<float>(eta_sum),
                             in<void>(x),
                             in<void>(delta),
                             in<float>(eta),
                             in<int32_t>(users),
                             tokens,
                             m,
                             n,
                             capacity,
                             dtype,
                             threads};
  if (!ttt::users_fit(f.users, f.rows, tokens, slots, capacity, true)) return false;
  py::gil_scoped_release release;
  active->low_rank_append(f);
  return true;
}

bool all_finite(address x, int64_t count, int dtype) {
  py::gil_scoped_release release;
  return active->all_finite(in<void>(x), count, dtype);
}

ttt::LowRankCompress compress_of(address a, address b, address rows, address eta_sum, address lost, address step,
                                 address slots, address importance_m, address importance_n, address memory,
                                 address seen, int64_t count, int64_t slots_in_pool, int64_t m, int64_t n,
                                 int64_t capacity, int64_t rank, int64_t memory_rows, int64_t replay_rows,
                                 uint64_t seed, double lam, double beta, double eps, int dtype, int threads) {
  return {out<void>(a),
          out<void>(b),
          out<int32_t>(rows),
          out<float>(eta_sum),
          out<float>(lost),
          out<int64_t>(step),
          in<int64_t>(slots),
          in<float>(importance_m),
          in<float>(importance_n),
          in<void>(memory),
          in<int64_t>(seen),
          count,
          slots_in_pool,
          m,
          n,
          capacity,
          rank,
          memory_rows,
          replay_rows,
          seed,
          lam,
          beta,
          eps,
          dtype,
          threads};
}

// Results of compressing and learning, other than the index of a slot that could not be compressed.
constexpr int64_t DONE = -1, REFUSED = -2;

// Returns `DONE`; or the first slot that was left unchanged because its rows are not finite; or `REFUSED`, having
// written nothing, if a slot or a counter is out of range.
template <class... Args>
int64_t low_rank_compress(Args... args) {
  const ttt::LowRankCompress f = compress_of(args...);
  if (!ttt::memory_fits(f)) return REFUSED;
  for (int64_t i = 0; i < f.count; i++)
    if (!ttt::slot_fits(f, f.slots[i])) return REFUSED;
  py::gil_scoped_release release;
  return active->low_rank_compress(f);
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
  need_counter("seen", in<int64_t>(seen));
  py::gil_scoped_release release;
  insert_rows(out<char>(memory), out<int64_t>(seen), in<char>(x), capacity, rows, row_bytes, seed);
}

void reservoir_draw(address seen, address step, address index, int64_t capacity, int64_t rows, uint64_t seed) {
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
struct Layer {
  address weight, bias, win_x, win_delta, win_eta, win_trace, recent, recent_seen, basis;
  int64_t m, n, window, capacity, directions;
  uint64_t seed;
  int dtype;
  ttt::Commit written = {};

  void forward(address x, address y, int64_t tokens, int threads, bool product_done) const {
    window_linear(x, weight, bias, win_x, win_delta, win_eta, y, tokens, m, n, window, dtype, threads, product_done);
  }

  // Writes rows `at` to `at` + rows of the window, with the directions taken out of the inputs. The inputs themselves
  // also enter the sample of recent inputs.
  void append(address x, address delta, address eta, address trace_delta, int64_t at, int64_t rows, int threads) const {
    need_rows("rows to append", rows, at, window);
    need_counter("recent_seen", in<int64_t>(recent_seen));
    const int64_t size = dtype == ttt::kF32 ? 4 : 2, x_bytes = n * size, d_bytes = m * size;
    if (recent) insert_rows(out<char>(recent), out<int64_t>(recent_seen), in<char>(x), capacity, rows, x_bytes, seed);
    project_out(x, basis, win_x + at * x_bytes, rows, directions, n, dtype, threads);
    std::memcpy(out<char>(win_delta) + at * d_bytes, in<char>(delta), rows * d_bytes);
    if (win_trace) std::memcpy(out<char>(win_trace) + at * d_bytes, in<char>(trace_delta), rows * d_bytes);
    std::memcpy(out<float>(win_eta) + at, in<float>(eta), rows * sizeof(float));
  }

  // Sets the arguments of `commit_window` other than the rows of the window.
  void prepare(const ttt::Commit& c) { written = c; }

  // Commits the first `rows` rows of the window and empties the window.
  void commit_window(address tokens, int64_t rows, int threads) const {
    need_rows("rows to commit", rows, 0, window);
    ttt::Commit a = written;
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

// The addresses of a `ttt.nn.LowRankLinear`, bound once like those of `Layer`.
struct LowRank {
  ttt::LowRankCompress held;  // `slots`, `count` and `threads` are set at each call
  int64_t window;

  // Adds the users' part to y, which holds x W^T + b. Returns false and writes nothing if a user or the rows of a slot
  // are out of range.
  bool forward(address x, address users, address y, int64_t tokens, int threads) const {
    const ttt::LowRankLinear f{in<void>(x), held.a, held.b, held.rows,     in<int32_t>(users), out<void>(y),
                               tokens,      held.m, held.n, held.capacity, held.dtype,         threads};
    if (!ttt::users_fit(f.users, f.rows, tokens, held.slots_in_pool, held.capacity, false)) return false;
    py::gil_scoped_release release;
    active->low_rank_linear(f);
    return true;
  }

  // Compresses the `chosen` slots. Returns `DONE`, or the first slot whose rows are not finite.
  int64_t compress(const std::vector<int64_t>& chosen, int threads, int* calls) const {
    if (chosen.empty()) return DONE;
    ttt::LowRankCompress f = held;
    f.slots = chosen.data();
    f.count = static_cast<int64_t>(chosen.size());
    f.threads = threads;
    ++*calls;
    return active->low_rank_compress(f);
  }

  // Appends a row for each token to its user's slot, and compresses slots that are full or have too little room.
  //
  // This mirrors `LowRankLinear._learn` of ttt/nn/low_rank.py, which makes the same calls through the ops; a change of
  // one must be made in the other. test_many_users_outputs_and_state_are_those_of_the_ops of
  // tests/nn/test_cpu_binding.py compares the two bit for bit.
  //
  // Returns how often rows were appended, how often slots were compressed, and `DONE`; or the slot whose rows are not
  // finite, at which it stopped; or `REFUSED`, and nothing is written, if a user or a counter is out of range.
  std::tuple<int, int, int64_t> learn(address x, address delta, address eta, address users, int64_t tokens,
                                      int threads) const {
    const int64_t slots = held.slots_in_pool;
    const int32_t* user = in<int32_t>(users);
    if (!ttt::users_fit(user, held.rows, tokens, slots, held.capacity, false) || !ttt::memory_fits(held))
      return {0, 0, REFUSED};
    for (int64_t t = 0; t < tokens; t++)
      if (user[t] >= 0 && !ttt::slot_fits(held, user[t])) return {0, 0, REFUSED};
    py::gil_scoped_release release;
    std::vector<int64_t> before(tokens), total(slots), count(slots), chosen;
    int64_t most = 0;
    for (int64_t t = 0; t < tokens; t++)
      if (user[t] >= 0) {
        before[t] = total[user[t]]++;
        most = std::max(most, total[user[t]]);
      }
    std::vector<int32_t> part(tokens);
    int appends = 0, compressions = 0;
    for (int64_t first = 0; first < most; first += window) {  // a slot has room for `window` tokens of a user at a time
      for (int64_t t = 0; t < tokens; t++)
        part[t] = user[t] >= 0 && before[t] >= first && before[t] < first + window ? user[t] : -1;
      chosen.clear();
      for (int64_t u = 0; u < slots; u++) {
        count[u] = std::min(window, std::max<int64_t>(0, total[u] - first));
        if (count[u] && held.rows[u] + count[u] > held.capacity) chosen.push_back(u);
      }
      int64_t failed = compress(chosen, threads, &compressions);
      if (failed >= 0) return {appends, compressions, failed};
      active->low_rank_append({held.a, held.b, held.rows, held.eta_sum, in<void>(x), in<void>(delta), in<float>(eta),
                               part.data(), tokens, held.m, held.n, held.capacity, held.dtype, threads});
      appends++;
      chosen.clear();
      for (int64_t u = 0; u < slots; u++)
        if (count[u] && held.rows[u] == held.capacity) chosen.push_back(u);
      failed = compress(chosen, threads, &compressions);
      if (failed >= 0) return {appends, compressions, failed};
    }
    return {appends, compressions, DONE};
  }
};

template <class R, class... Args>
struct CompressAs;
template <class R, class... Args>
struct CompressAs<R(Args...)> {
  static constexpr auto call = &low_rank_compress<Args...>;
  static LowRank bind(int64_t window, Args... args) { return {compress_of(args...), window}; }
};
using CompressArguments = CompressAs<std::remove_pointer_t<decltype(&compress_of)>>;

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

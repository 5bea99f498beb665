// The bindings of the low-rank kernels; included by bindings.cpp only.
#pragma once
#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "isa_bindings.h"
#include "low_rank_checks.h"

namespace {

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

// |B^T A|^2 of `rows` rows of each factor.
double low_rank_square(address a, address b, int64_t rows, int64_t m, int64_t n, int dtype) {
  const ttt::LowRankSquare f{in<void>(a), in<void>(b), rows, m, n, dtype};
  py::gil_scoped_release release;
  return active->low_rank_square(f);
}

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

inline void bind_low_rank(py::module_& m) {
  m.def("low_rank_linear", &low_rank_linear);
  m.def("low_rank_append", &low_rank_append);
  m.def("low_rank_compress", CompressArguments::call);
  m.def("low_rank_square", &low_rank_square);
  py::class_<LowRank>(m, "LowRank")
      .def(py::init(&CompressArguments::bind))
      .def("forward", &LowRank::forward)
      .def("learn", &LowRank::learn);
}

}  // namespace

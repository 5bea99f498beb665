// ttt._C: the kernels by address and size. The GIL is released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "api.h"
#include "philox.h"

namespace py = pybind11;
using address = uintptr_t;

namespace {

#ifdef TTT_X86
bool supports(const std::string& isa) {
  __builtin_cpu_init();
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
  for (const char* isa : {"portable", "avx2", "avx512", "avx512bf16"})
    if (supports(isa)) names.push_back(isa);
  return names;
}

const ttt::Kernels* table_of(const std::string& isa) {
#ifdef TTT_X86
  if (isa == "avx512bf16") return &ttt::kernels_avx512bf16();
  if (isa == "avx512") return &ttt::kernels_avx512();
  if (isa == "avx2") return &ttt::kernels_avx2();
#endif
  return &ttt::kernels_portable();
}

const ttt::Kernels* active = table_of(available_isas().back());

void set_isa(const std::string& isa) {
  if (!supports(isa)) {
    std::string allowed;
    for (const auto& name : available_isas()) allowed += (allowed.empty() ? "" : ", ") + name;
    throw py::value_error("isa must be one that this processor has (" + allowed + "), got '" + isa + "'");
  }
  active = table_of(isa);
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

void commit(address weight, address anchor, address importance, address trace, address x, address delta, address eta,
            address trace_delta, address memory, address seen, address step, int64_t m, int64_t n, int64_t tokens,
            int64_t capacity, int64_t replay_rows, int64_t trace_every, uint64_t seed, float beta, float eps, float lam,
            float gamma, int dtype, int state_dtype, int replay, int kind, int threads) {
  ttt::Commit a{out<void>(weight),
                in<void>(anchor),
                in<void>(importance),
                out<void>(trace),
                in<void>(x),
                in<void>(delta),
                in<float>(eta),
                in<void>(trace_delta),
                in<void>(memory),
                in<int64_t>(seen),
                out<int64_t>(step),
                m,
                n,
                tokens,
                capacity,
                replay_rows,
                trace_every,
                seed,
                beta,
                eps,
                lam,
                gamma,
                dtype,
                state_dtype,
                replay,
                kind,
                threads};
  py::gil_scoped_release release;
  active->commit(a);
}

// Algorithm R: row s goes to slot s while there is room, then to a random slot of [0, s].
void reservoir_insert(address memory, address seen, address x, int64_t capacity, int64_t rows, int64_t row_bytes,
                      uint64_t seed) {
  py::gil_scoped_release release;
  int64_t* count = out<int64_t>(seen);
  for (int64_t t = 0; t < rows; t++, ++*count) {
    const int64_t s = *count;
    int64_t slot = s;
    if (s >= capacity) {
      uint32_t words[4];
      philox(static_cast<uint32_t>(s), 0, 0, kInsert, seed, words);
      slot = static_cast<int64_t>((static_cast<uint64_t>(words[0]) * static_cast<uint64_t>(s + 1)) >> 32);
    }
    if (slot < capacity) std::memcpy(out<char>(memory) + slot * row_bytes, in<char>(x) + t * row_bytes, row_bytes);
  }
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of ttt. Addresses and sizes only; ttt.ops checks the arguments.";
  m.def("window_linear", &window_linear);
  m.def("commit", &commit);
  m.def("reservoir_insert", &reservoir_insert);
  m.def("reservoir_draw", &reservoir_draw);
  m.def("set_isa", &set_isa, py::arg("isa"), "Use the kernels of one instruction set from now on.");
  m.def("available_isas", &available_isas, "The instruction sets this processor has, slowest first.");
  m.def("active_isa", [] { return std::string(active->isa); });
}
